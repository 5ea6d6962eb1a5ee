"""Where there is tissue: a mask of any scale hides blocks and voxels.

`mask_blocks` finds the blocks that a mask touches. Mask voxels are read tile by tile, each tile
once however many blocks fall into it, and counted with a summed-area table, so that neither a
coarse mask under 10^7 blocks nor a fine one under a few costs a Python loop over blocks or memory
beyond a tile.

`Tissue` hides voxels of one block: those whose centre lies in no nonzero voxel of the mask.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.overlay import read_overlay, require_overlap
from agq.blockwise.storage.files import checksum
from agq.blockwise.volumes.open import Volume

TILE_VOXELS = 2**24
"""Most mask voxels held at once (x 5 bytes), unless one plane of a storage chunk is larger."""

BATCH = 2**19
"""Blocks looked up at once: about 300 bytes each."""

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Tissue:
    """The voxels of a block's read box that a mask shows.

    Attributes
    ----------
    shown
        bool, (z, y, x).
    pairs
        bool, (3, z, y, x): on each axis, whether a voxel and the one before it are shown; the
        first voxel of the volume has none before it.
    """

    shown: Bools
    pairs: Bools

    @classmethod
    def read(
        cls,
        mask: Volume | None,
        grid: BlockGrid,
        number: int,
        hidden: Collection[int] = (),
    ) -> "Tissue":
        """Read what a mask shows of a block; some sections may be hidden besides."""
        start, stop = grid.read_box(number)
        before = [min(1, first) for first in start]
        begin = [first - n for first, n in zip(start, before, strict=True)]
        if mask is None:
            around = np.ones([b - a for a, b in zip(begin, stop, strict=True)], np.bool_)
        else:
            around = read_overlay(mask, grid, begin, stop) != 0
        around[[z - begin[0] for z in range(begin[0], stop[0]) if z in hidden]] = False
        shown = np.ascontiguousarray(around[tuple(slice(n, None) for n in before)])
        pairs = np.stack([shown] * 3)
        for axis, n in enumerate(before):
            ahead, here = [slice(m, None) for m in before], [slice(None)] * 3
            ahead[axis], here[axis] = slice(-1), slice(1 - n, None)
            pairs[axis][tuple(here)] &= around[tuple(ahead)]
        return cls(shown, pairs)

    @property
    def hides(self) -> bool:
        """Whether anything is hidden."""
        return not (self.shown.all() and self.pairs.all())

    def checksum(self) -> str:
        """Return a checksum of what is hidden; empty if nothing is."""
        return checksum(np.packbits([self.shown, *self.pairs])) if self.hides else ""

    def hide(
        self, labels: npt.NDArray[Any], affinities: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8], Ints | None]:
        """Take labels and affinities off the hidden voxels.

        A label that loses voxels is cut into its 6-connected pieces: what held them together is
        hidden, and other blocks would not see it.

        Parameters
        ----------
        labels, affinities
            Over the read box, as for `blocks.writer`.

        Returns
        -------
        labels, affinities
            Zero where hidden; affinities also at the voxel after a hidden one.
        origin
            int64: the label given that each label returned is a piece of; None: all labels are
            what they were.
        """
        if not self.hides:
            return labels, affinities, None
        affinities = np.where(self.pairs, affinities, np.uint8(0))
        lost = np.zeros(int(labels.max()) + 1, np.bool_)
        lost[labels[~self.shown]] = True
        kept = np.where(self.shown, labels, labels.dtype.type(0))
        if not lost[1:].any():
            return kept, affinities, None
        pieces, count = cc3d.connected_components(kept, connectivity=6, return_N=True)
        origin = np.zeros(count + 1, np.int64)
        origin[pieces.reshape(-1)] = kept.reshape(-1)
        # A label that lost nothing stays one, whatever it is made of.
        whole, first = np.unique(origin, return_index=True)
        number = np.arange(count + 1)
        number = np.where(lost[origin], number, first[np.searchsorted(whole, origin)])
        return number.astype(np.uint32)[pieces], affinities, origin


def mask_blocks(
    mask: Volume,
    grid: BlockGrid,
    numbers: npt.ArrayLike,
    *,
    tile_voxels: int = TILE_VOXELS,
) -> npt.NDArray[np.bool_]:
    """Find the blocks whose write box touches any nonzero mask voxel.

    Parameters
    ----------
    mask
        Any voxel size and offset, in the world unit of the grid; what lies outside the mask is
        not tissue.
    grid
        The blocks.
    numbers
        Block numbers, in any order.
    tile_voxels
        Most mask voxels to hold at once.

    Returns
    -------
    ndarray
        bool, for each number: True if there is tissue.

    Raises
    ------
    InputError
        If the mask does not overlap the volume at all, which means a wrong offset or unit.
    """
    wanted = np.asarray(numbers, dtype=np.int64).reshape(-1)
    require_overlap(mask, grid)
    tile = _tile_shape(mask, tile_voxels)
    touched = [
        _touched(mask, grid, wanted[first : first + BATCH], tile)
        for first in range(0, wanted.size, BATCH)
    ]
    return np.concatenate([np.zeros(0, dtype=bool), *touched])


def _touched(mask: Volume, grid: BlockGrid, numbers: Ints, tile: Ints) -> npt.NDArray[np.bool_]:
    low, high = _mask_boxes(mask, grid, numbers)
    touched = np.zeros(numbers.size, dtype=bool)
    for place, members in _tiles(low, high, tile):
        members = members[~touched[members]]
        if members.size == 0:
            continue
        origin = place * tile
        inner_low = np.maximum(low[members], origin)
        inner_high = np.minimum(high[members], origin + tile)
        start, stop = inner_low.min(axis=0), inner_high.max(axis=0)
        counts = _summed(mask.read(tuple(start.tolist()), tuple(stop.tolist())))
        touched[members] = _count(counts, inner_low - start, inner_high - start) > 0
    return touched


def _mask_boxes(mask: Volume, grid: BlockGrid, numbers: Ints) -> tuple[Ints, Ints]:
    """Return the mask voxels that each write box touches, clipped to the mask (maybe empty)."""
    index = np.stack(np.unravel_index(numbers, grid.shape), axis=1).astype(np.int64)
    start = index * grid.write_shape
    stop = np.minimum(start + grid.write_shape, grid.volume_shape)
    shift = np.array(grid.offset - mask.offset, dtype=np.int64)
    voxel = np.array(grid.voxel_size, dtype=np.int64)
    mask_voxel = np.array(mask.voxel_size, dtype=np.int64)
    low = (start * voxel + shift) // mask_voxel
    high = -((-stop * voxel - shift) // mask_voxel)
    return np.clip(low, 0, mask.shape), np.clip(high, 0, mask.shape)


def _tile_shape(mask: Volume, tile_voxels: int) -> Ints:
    """Return a tile of whole storage chunks; a chunk too large alone is cut along z."""
    tile = np.minimum(np.array(mask.chunks, dtype=np.int64), np.array(mask.shape))
    if tile.prod() > tile_voxels:
        tile[0] = max(1, tile_voxels // int(tile[1] * tile[2]))
        return tile
    for axis in (2, 1, 0):
        room = tile_voxels // int(tile.prod())
        chunks = math.ceil(mask.shape[axis] / int(tile[axis]))
        tile[axis] *= max(1, min(room, chunks))
    return tile


def _tiles(low: Ints, high: Ints, tile: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yield each tile that any box touches, with the places in the list of the boxes it meets."""
    boxes = np.flatnonzero((low < high).all(axis=1))
    if boxes.size == 0:
        return
    first = low[boxes] // tile
    extent = (high[boxes] - 1) // tile - first + 1
    total = extent.prod(axis=1)
    owner = np.repeat(np.arange(boxes.size), total)
    step = np.arange(owner.size) - np.repeat(np.cumsum(total) - total, total)
    spans = extent[owner]
    places = first[owner] + np.stack(
        [
            step // (spans[:, 1] * spans[:, 2]),
            step // spans[:, 2] % spans[:, 1],
            step % spans[:, 2],
        ],
        axis=1,
    )
    key = np.ravel_multi_index(tuple(places.T), tuple(places.max(axis=0) + 1))
    order = np.argsort(key, kind="stable")
    places, owner, key = places[order], owner[order], key[order]
    cuts = np.flatnonzero(key[1:] != key[:-1]) + 1
    begins = np.concatenate([[0], cuts])
    for begin, members in zip(begins, np.split(boxes[owner], cuts), strict=True):
        yield places[begin], members


def _summed(voxels: npt.NDArray[np.generic]) -> npt.NDArray[np.uint32]:
    """Return the summed-area table of nonzero voxels, one larger on each axis."""
    z, y, x = voxels.shape
    table = np.zeros((z + 1, y + 1, x + 1), dtype=np.uint32)
    inner = table[1:, 1:, 1:]
    np.not_equal(voxels, 0, out=inner, casting="unsafe")
    for axis in range(3):
        np.cumsum(inner, axis=axis, out=inner)
    return table


def _count(table: npt.NDArray[np.uint32], low: Ints, high: Ints) -> npt.NDArray[np.int64]:
    """Return the number of nonzero voxels in each box."""
    total = np.zeros(len(low), dtype=np.int64)
    for corner in np.ndindex(2, 2, 2):
        at = np.where(np.array(corner, dtype=bool), high, low)
        sign = 1 if sum(corner) % 2 == 1 else -1
        total += sign * table[at[:, 0], at[:, 1], at[:, 2]].astype(np.int64)
    return total
