"""How a volume is cut into blocks: numbers, voxel boxes, world ROIs and fragment ids.

Everything here is a function of the *whole* volume, never of the part that one run covers: the
same block has the same number, and its fragments the same ids, in every run. Axes are (z, y, x).

A block *writes* its write box; write boxes tile the volume, the last one on an axis is clipped.
It *reads* its write box plus context. All read windows have the same shape, so a network sees one
input size: a window that would leave the volume is shifted inward (no invented data). Only where
the volume itself is smaller than the window is the read box smaller.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from funlib.geometry import Coordinate, Roi
from pydantic import field_validator

from agq.blockwise.volumes.triples import Box, Triple, checked_triple, triple
from agq.errors import InputError
from agq.settings import Settings

LOCAL_BITS = 21
"""Bits of a fragment id that hold the label inside its block (17 x 257 x 257 voxels need 21)."""

_MOST_SELECTED = 2**32
MAX_BLOCKS = 2 ** (64 - LOCAL_BITS)
"""Number of blocks whose fragment ids still fit in uint64."""

_LOCAL_MASK = np.uint64(2**LOCAL_BITS - 1)
_SHIFT = np.uint64(LOCAL_BITS)


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of one volume.

    Parameters
    ----------
    volume_shape
        Size of the volume in voxels, (z, y, x).
    voxel_size
        World units (nm) per voxel, (z, y, x).
    write_shape
        Voxels that one block writes, (z, y, x); also the chunk shape of the block outputs.
    before, after
        Context in voxels read before and after the write box on each axis.
    offset
        World position (nm) of the volume's first voxel, (z, y, x).

    Attributes
    ----------
    read_shape
        Voxels of every read window (write shape plus context), even where the volume is smaller.
    shape
        Number of blocks on each axis.
    n_blocks
        Number of blocks of the whole volume.

    Raises
    ------
    InputError
        If a size is not positive, a context is negative, or fragment ids would not fit in uint64.
    """

    volume_shape: Triple
    voxel_size: Coordinate
    write_shape: Triple = (16, 256, 256)
    before: Triple = (0, 0, 0)
    after: Triple = (1, 1, 1)
    offset: Coordinate = field(default_factory=lambda: Coordinate((0, 0, 0)))

    def __post_init__(self) -> None:
        for name, least in (("volume_shape", 1), ("write_shape", 1), ("before", 0), ("after", 0)):
            object.__setattr__(self, name, checked_triple(name, getattr(self, name), least))
        for name, smallest in (("voxel_size", 1), ("offset", None)):
            values = checked_triple(name, getattr(self, name), smallest)
            object.__setattr__(self, name, Coordinate(values))
        if self.n_blocks > MAX_BLOCKS:
            raise InputError(
                f"block grid: {self.n_blocks} blocks leave no room for {LOCAL_BITS} label bits in "
                "64-bit fragment ids; use larger blocks"
            )

    @property
    def read_shape(self) -> Triple:
        """Voxels of every read window, (z, y, x)."""
        parts = zip(self.before, self.write_shape, self.after, strict=True)
        return triple(sum(part) for part in parts)

    @property
    def shape(self) -> Triple:
        """Number of blocks on each axis, (z, y, x)."""
        return triple(-(-v // w) for v, w in zip(self.volume_shape, self.write_shape, strict=True))

    @property
    def n_blocks(self) -> int:
        """Number of blocks of the whole volume."""
        return math.prod(self.shape)

    def number(self, index: Sequence[int]) -> int:
        """Return the number of the block at `index` (z, y, x): its place in C order.

        Raises
        ------
        IndexError
            If the grid has no such block.
        """
        nz, ny, nx = self.shape
        z, y, x = (int(i) for i in index)
        if not (0 <= z < nz and 0 <= y < ny and 0 <= x < nx):
            raise IndexError(f"no block at {(z, y, x)} in a grid of {self.shape} blocks")
        return (z * ny + y) * nx + x

    def index(self, number: int) -> Triple:
        """Return the place (z, y, x) of block `number`; the inverse of `number`.

        Raises
        ------
        IndexError
            If the grid has no such block.
        """
        number = int(number)
        if not 0 <= number < self.n_blocks:
            raise IndexError(f"no block {number} in a grid of {self.n_blocks} blocks")
        _, ny, nx = self.shape
        rest, x = divmod(number, nx)
        z, y = divmod(rest, ny)
        return z, y, x

    def write_box(self, number: int) -> Box:
        """Return the voxels that block `number` writes, clipped to the volume."""
        start = self._origin(number)
        stop = (
            min(s + w, v)
            for s, w, v in zip(start, self.write_shape, self.volume_shape, strict=True)
        )
        return start, triple(stop)

    def read_box(self, number: int) -> Box:
        """Return the voxels that block `number` reads: its window, shifted to stay inside.

        It has `read_shape` voxels except on axes where the volume has fewer; there it is the
        whole axis. It always contains the write box.
        """
        start = triple(
            max(0, min(s - b, v - r))
            for s, b, v, r in zip(
                self._origin(number), self.before, self.volume_shape, self.read_shape, strict=True
            )
        )
        stop = (
            min(s + r, v) for s, r, v in zip(start, self.read_shape, self.volume_shape, strict=True)
        )
        return start, triple(stop)

    def write_in_read(self, number: int) -> tuple[slice, slice, slice]:
        """Return where the write box of block `number` lies in an array of its read box."""
        (lo, hi), (origin, _) = self.write_box(number), self.read_box(number)
        z, y, x = (
            slice(start - zero, stop - zero)
            for start, stop, zero in zip(lo, hi, origin, strict=True)
        )
        return z, y, x

    def write_roi(self, number: int) -> Roi:
        """Return the write box of block `number` in world units."""
        return self.to_world(*self.write_box(number))

    def read_roi(self, number: int) -> Roi:
        """Return the read box of block `number` in world units."""
        return self.to_world(*self.read_box(number))

    def number_at(self, write_roi: Roi) -> int:
        """Return the number of the block whose write box, not clipped to the volume, is a ROI.

        Raises
        ------
        ValueError
            If no block has it.
        """
        write = Coordinate(self.write_shape) * self.voxel_size
        begin = write_roi.offset - self.offset
        if write_roi.shape != write or any(b % w for b, w in zip(begin, write, strict=True)):
            raise ValueError(f"{write_roi} is not the write ROI of a block")
        return self.number(begin // write)

    def middle_voxel(self, number: int) -> Triple:
        """Return the voxel (z, y, x) in the middle of a block's written part."""
        low, high = self.write_box(number)
        return triple((a + b) // 2 for a, b in zip(low, high, strict=True))

    def place(self, number: int) -> dict[str, Any]:
        """Return `roi` and `voxels` of a block as its journal record has them."""
        roi = self.write_roi(number)
        return {
            "roi": (tuple(roi.offset), tuple(roi.shape)),
            "voxels": math.prod(roi.shape // self.voxel_size),
        }

    def to_world(self, start: Sequence[int], stop: Sequence[int]) -> Roi:
        """Return the voxel box `start`:`stop` as a ROI in world units."""
        begin, end = Coordinate(start), Coordinate(stop)
        return Roi(self.offset + begin * self.voxel_size, (end - begin) * self.voxel_size)

    def to_voxels(self, roi: Roi) -> Box:
        """Return a world ROI as a voxel box.

        Raises
        ------
        InputError
            If the ROI is unbounded or does not start and end on voxel borders.
        """
        if None in tuple(roi.offset) or None in tuple(roi.shape):
            raise InputError(f"ROI {roi} is empty or unbounded; give an offset and a shape")
        begin, size = roi.offset - self.offset, roi.shape
        if any(b % v for b, v in zip(begin, self.voxel_size, strict=True)) or any(
            s % v for s, v in zip(size, self.voxel_size, strict=True)
        ):
            raise InputError(
                f"ROI {roi} is not on the voxel grid: voxel size {tuple(self.voxel_size)}, "
                f"offset {tuple(self.offset)}"
            )
        start = begin // self.voxel_size
        return triple(start), triple(start + size // self.voxel_size)

    def neighbor(self, number: int, axis: int) -> int | None:
        """Return the number of the next block on `axis` (0 z, 1 y, 2 x), None at the end."""
        index = list(self.index(number))
        index[axis] += 1
        return self.number(index) if index[axis] < self.shape[axis] else None

    def select(self, start: Sequence[int], stop: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the numbers, ascending, of blocks that write at least one voxel of a box.

        Parts of the box outside the volume are ignored.

        Raises
        ------
        InputError
            If there are too many to list.
        """
        ranges = []
        for lo, hi, size, blocks, length in zip(
            start, stop, self.write_shape, self.shape, self.volume_shape, strict=True
        ):
            lo, hi = max(0, int(lo)), min(int(hi), length)
            first, last = (lo // size, min(blocks, -(-hi // size))) if lo < hi else (0, 0)
            ranges.append(np.arange(first, last, dtype=np.int64))
        _, ny, nx = self.shape
        z, y, x = np.ix_(*ranges)
        if (count := math.prod(map(len, ranges))) > _MOST_SELECTED:
            raise InputError(
                f"block grid: {count} blocks are more than one command can list "
                f"({_MOST_SELECTED}); use larger blocks, or a smaller ROI"
            )
        return ((z * ny + y) * nx + x).ravel()

    def fragment_ids(self, number: int, local: npt.ArrayLike) -> npt.NDArray[np.uint64]:
        """Return fragment ids, uint64 (number << LOCAL_BITS) | label, of labels of a block.

        Background 0 stays 0.

        Raises
        ------
        ValueError
            If a label is negative or needs more than `LOCAL_BITS` bits.
        """
        self.index(number)
        labels = np.asarray(local)
        negative = labels.dtype.kind != "u" and labels.size and int(labels.min()) < 0
        if negative or (labels.size and int(labels.max()) >> LOCAL_BITS):
            raise ValueError(
                f"block {number}: labels {labels.min()}..{labels.max()} do not fit in "
                f"{LOCAL_BITS} bits"
            )
        base = np.uint64(int(number) << LOCAL_BITS)
        ids = np.asarray(labels.astype(np.uint64))
        ids |= base
        ids[labels == 0] = 0
        return ids

    @staticmethod
    def split_ids(
        ids: npt.ArrayLike,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Return the block numbers (int64) and local labels (uint32) of fragment ids."""
        values = np.asarray(ids, dtype=np.uint64)
        return (values >> _SHIFT).astype(np.int64), (values & _LOCAL_MASK).astype(np.uint32)

    def to_dict(self) -> dict[str, Any]:
        """Return the grid as plain lists of numbers, for JSON; `from_dict` reads it."""
        return {
            name: [int(v) for v in getattr(self, name)]
            for name in ("volume_shape", "voxel_size", "write_shape", "before", "after", "offset")
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BlockGrid":
        """Return the grid that `to_dict` described.

        Raises
        ------
        InputError
            If a key is missing or unknown, or a value is not a valid size.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"block grid: {error}") from None

    def _origin(self, number: int) -> Triple:
        return triple(i * w for i, w in zip(self.index(number), self.write_shape, strict=True))


class GridSpec(Settings):
    """What the specifications of a prediction and of a stitch share; JSON round trip."""

    grid: dict[str, Any]
    """`BlockGrid.to_dict` of the whole volume."""

    @field_validator("grid")
    @classmethod
    def _grid_is_valid(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            return BlockGrid.from_dict(value).to_dict()
        except InputError as error:
            raise ValueError(str(error)) from None

    def block_grid(self) -> BlockGrid:
        """Return the grid of the whole volume."""
        return BlockGrid.from_dict(self.grid)
