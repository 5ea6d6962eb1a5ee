"""Sidecar: the evidence of one block that the stitch needs, written beside its fragments.

The worker has labels and affinities in memory, so it writes what is on the faces of its block
and the contacts inside it; the stitch never reads volumes for evidence.

Labels are *local* (uint16 or uint32, 0 background); affinities are uint8,
``round(255 * affinity)``; channel ``c`` at voxel ``v`` is the affinity between ``v`` and the
previous voxel on axis ``c`` (0 = z, 1 = y, 2 = x).

File: the magic ``AGQS``, the length of a JSON header (uint32, little endian), the header, and zstd
frames. The header lists the frames in order, each with its length in the file and the name, dtype
and shape of the C-order arrays that follow each other in it. A reader takes only the frames it
needs: a face between two blocks needs one frame of each. (A zip of npy files was measured to cost
5 ms a block to read, more than relabelling it.) Equal contents give equal bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import LOCAL_BITS
from agq.blockwise.blocks.label_pairs import MaskAgreement, PairTable
from agq.blockwise.blocks.packs import sidecar_bytes, sidecar_file, sidecar_path
from agq.blockwise.storage.frames import decompressed
from agq.errors import DamagedError, InputError, repairable
from agq.reading import NotAFileError, parse_json

if TYPE_CHECKING:
    from agq.blockwise.blocks.grid import BlockGrid

FORMAT_VERSION = 2

_MAGIC = b"AGQS"
_LEVEL = 1
_TABLES = ("nodes", "sizes", "boxes", "u", "v", "aff_sum", "count", "original_labels")
_SIDES = {
    "low": ("low_labels", "low_affinity"),
    "high": ("high_labels", "after_affinity"),
    "outer": ("after_labels", "before_labels"),
}
# What a frame cannot lack, by the first word of its name.
_NEEDED = {"tables": _TABLES[:-1], "low": _SIDES["low"], "high": ("high_labels",)}
# Types of the arrays, and on how many numbers of which other array each has one entry or row.
_U4, _I8 = (np.dtype(np.uint32),), (np.dtype(np.int64),)
_LABELS, _U1 = (np.dtype(np.uint16), np.dtype(np.uint32)), (np.dtype(np.uint8),)
_FORMS: dict[str, tuple[tuple[np.dtype[Any], ...], str, int]] = {
    "nodes": (_U4, "nodes", 1),
    "sizes": (_I8, "nodes", 1),
    "boxes": ((np.dtype(np.int32),), "nodes", 2),
    "original_labels": ((np.dtype(np.uint64),), "nodes", 1),
    "u": (_U4, "u", 1),
    "v": (_U4, "u", 1),
    "aff_sum": (_I8, "u", 1),
    "count": (_I8, "u", 1),
    "low_labels": (_LABELS, "low_labels", 2),
    "low_affinity": (_U1, "low_labels", 2),
    "high_labels": (_LABELS, "high_labels", 2),
    "after_affinity": (_U1, "high_labels", 2),
    "after_labels": (_LABELS, "after_labels", 2),
    "before_labels": (_LABELS, "before_labels", 2),
}
# An array that has another name in the file.
_STORED = {"original_labels": "names"}
_ATTRIBUTES = {stored: attribute for attribute, stored in _STORED.items()}


@dataclass(frozen=True)
class AxisPlanes:
    """Planes of one block at its two faces on one axis.

    A plane has the extent of the write box on the other two axes, in z, y, x order.

    Attributes
    ----------
    low_labels, low_affinity
        Own labels and own affinity (channel = axis) on the first plane of the write box.
    high_labels
        Own labels on the last plane of the write box.
    after_affinity, after_labels
        The same on the plane just after the write box; None if the block did not read it.
    before_labels
        Own labels on the plane just before the write box; None if the block did not read it.
    """

    low_labels: NDArray
    low_affinity: NDArray[np.uint8]
    high_labels: NDArray
    after_affinity: NDArray[np.uint8] | None = None
    after_labels: NDArray | None = None
    before_labels: NDArray | None = None

    @classmethod
    def cut(
        cls, labels: NDArray, affinity: NDArray[np.uint8], inner: tuple[slice, ...], axis: int
    ) -> AxisPlanes:
        """Copy the planes on an axis out of a read box, in which the write box is `inner`."""

        def plane(array: NDArray, index: int) -> Any:
            if not 0 <= index < array.shape[axis]:
                return None
            place: tuple[slice | int, ...] = (*inner[:axis], index, *inner[axis + 1 :])
            return array[place].copy()

        first, last = inner[axis].start, inner[axis].stop - 1
        return cls(
            low_labels=plane(labels, first),
            low_affinity=plane(affinity, first),
            high_labels=plane(labels, last),
            after_affinity=plane(affinity, last + 1),
            after_labels=plane(labels, last + 1),
            before_labels=plane(labels, first - 1),
        )


@dataclass(frozen=True)
class Sidecar:
    """Evidence of one block.

    Attributes
    ----------
    number
        Block number in the grid of the whole volume.
    nodes, sizes
        Local labels present in the write box, ascending (uint32), and their voxels (int64).
    boxes
        Bounding box of each label inside the write box, int32 (n, 6): first voxel (z, y, x) and
        one past the last.
    u, v, aff_sum, count
        Contacts inside the write box: 6-connected pairs of different labels, ``u < v``
        (uint32), sorted by (u, v); sum of the block's own uint8 affinities (or of them and an
        `MaskAgreement`) and number of touching voxel pairs (int64).
    planes
        Face planes on z, y, x.
    original_labels
        For fragments that were not made block by block: the label of each in the original volume
        (uint64). Pieces with one original label are one fragment. None: every label ends at the
        border of its block.
    mask
        Checksum of what a mask has hidden of the block (`blocks.mask.Tissue`); empty: nothing.
    """

    number: int
    nodes: NDArray[np.uint32]
    sizes: NDArray[np.int64]
    boxes: NDArray[np.int32]
    u: NDArray[np.uint32]
    v: NDArray[np.uint32]
    aff_sum: NDArray[np.int64]
    count: NDArray[np.int64]
    planes: tuple[AxisPlanes, AxisPlanes, AxisPlanes]
    original_labels: NDArray[np.uint64] | None = None
    mask: str = ""

    def to_bytes(self) -> bytes:
        """Return the file contents: the same bytes for the same evidence."""
        frames, blobs = [], []
        for frame, arrays in self._frames():
            present = {name: array for name, array in arrays.items() if array is not None}
            data = b"".join(array.tobytes() for array in present.values())
            blobs.append(zstd.compress(data, _LEVEL, True) if data else b"")
            described = [
                [_STORED.get(name, name), array.dtype.str, list(array.shape)]
                for name, array in present.items()
            ]
            frames.append([frame, len(blobs[-1]), described])
        facts: dict[str, Any] = {"version": FORMAT_VERSION, "number": self.number}
        if self.mask:
            facts["mask"] = self.mask
        header = json.dumps(facts | {"frames": frames}, separators=(",", ":")).encode()
        return b"".join((_MAGIC, struct.pack("<I", len(header)), header, *blobs))

    def _frames(self) -> Iterator[tuple[str, Mapping[str, NDArray | None]]]:
        yield "tables", {name: getattr(self, name) for name in _TABLES}
        for axis, planes in enumerate(self.planes):
            for side, names in _SIDES.items():
                yield f"{side}_{axis}", {name: getattr(planes, name) for name in names}


class SidecarFile:
    """A sidecar whose frames are decoded when they are asked for.

    Parameters
    ----------
    data
        Contents of the file.

    Raises
    ------
    InputError
        If the header is damaged or of another format version.
    """

    def __init__(self, data: bytes) -> None:
        try:
            if data[:4] != _MAGIC:
                raise ValueError("not a sidecar")
            (length,) = struct.unpack_from("<I", data, 4)
            header: dict[str, Any] = parse_json(data[8 : 8 + length])
            version, self.number = int(header["version"]), int(header["number"])
            self.mask = str(header.get("mask", ""))
            frames = header["frames"] if version == FORMAT_VERSION else []
            offset, self._frames = 8 + length, {}
            for name, size, arrays in frames:
                if type(size) is not int or size < 0:
                    raise ValueError(f"frame {name} has {size} bytes")
                arrays = [(_ATTRIBUTES.get(array, array), *form) for array, *form in arrays]
                self._frames[name] = (offset, size, arrays)
                offset += size
        except (
            *(ValueError, KeyError, TypeError, AttributeError, OverflowError, struct.error),
        ) as error:
            raise _damaged(error) from None
        if version != FORMAT_VERSION:
            raise InputError(
                f"sidecar has format version {version}, this release reads {FORMAT_VERSION}:"
                " predict again with --overwrite"
            )
        if offset != len(data):
            raise _damaged(f"{len(data)} of {offset} bytes")
        self._data = data

    def has(self, frame: str, array: str) -> bool:
        """Whether a frame holds an array; without decoding it."""
        return any(array == name for name, _, _ in self._frames[frame][2])

    def frame(self, name: str) -> dict[str, NDArray]:
        """Return the arrays of a frame: ``tables``, ``low_0``, ``high_0``, ``outer_0``, ...

        Raises
        ------
        InputError
            If the frame is damaged.
        """
        try:
            offset, size, described = self._frames[name]
            arrays: dict[str, NDArray] = {}
            at = 0
            wanted = [_form(*described_array) for described_array in described]
            total = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in wanted)
            raw = decompressed(self._data[offset : offset + size], total)
            for array, dtype, shape in wanted:
                count = math.prod(shape)
                values = np.frombuffer(raw, dtype, count, at) if count else np.zeros(0, dtype)
                arrays[array] = values.reshape(shape)
                at += arrays[array].nbytes
            lacking = [a for a in _NEEDED.get(name.partition("_")[0], ()) if a not in arrays]
            if lacking:
                raise ValueError(f"frame {name} lacks {lacking}")
            _require_forms(arrays)
        except (
            *(ValueError, LookupError, TypeError, RuntimeError, OverflowError, MemoryError),
        ) as error:
            raise DamagedError(f"sidecar of block {self.number} is damaged ({error})") from None
        return arrays


def _form(name: str, dtype: str, shape: list[int]) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    """Return what a header says of an array, if that is possible."""
    types, _, ndim = _FORMS[name]
    found = next((t for t in types if t.str == dtype), None)
    if found is None or len(shape) != ndim or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{name} is {dtype} of shape {shape}")
    return name, found, tuple(shape)


def _require_forms(arrays: Mapping[str, NDArray]) -> None:
    """Check what compiled code relies on: lengths that belong together, labels in range."""
    for name, array in arrays.items():
        first = arrays[_FORMS[name][1]]
        if array.shape[: first.ndim] != first.shape or (name == "boxes" and array.shape[1] != 6):
            raise ValueError(f"{name} has shape {array.shape}")
        if name in ("nodes", "u", "v") and array.max(initial=0) >= 2**LOCAL_BITS:
            raise ValueError(f"{name} has the label {array.max()}")
    nodes = arrays.get("nodes")
    if nodes is not None and not (nodes[1:] > nodes[:-1]).all():
        raise ValueError("its labels are not in order")


def _damaged(error: object) -> DamagedError:
    return DamagedError(f"sidecar is damaged ({error})")


def open_sidecar(run_dir: Path, number: int) -> SidecarFile:
    """Open the sidecar of a block.

    Raises
    ------
    InputError
        If it is missing, damaged or another block's.
    """
    path = sidecar_path(run_dir, number)
    try:
        file = SidecarFile(sidecar_bytes(run_dir, number))
    except FileNotFoundError:
        if path.with_suffix(".npz").exists():
            raise InputError(
                f"{path.with_suffix('.npz')}: sidecar of an older release, which this one does not"
                " read: predict the run again with --overwrite"
            ) from None
        raise repairable(f"{path}: sidecar of block {number} is missing", run_dir) from None
    except DamagedError as error:
        named = str(error).startswith(str(run_dir))
        held = sidecar_file(run_dir, number)
        raise repairable(error if named else f"{held}: {error}", run_dir) from None
    except NotAFileError as error:
        raise repairable(error, run_dir) from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if file.number != number:
        raise repairable(f"{path}: holds block {file.number}, not block {number}", run_dir)
    return file


@numba.njit(cache=True, nogil=True)
def _measure(labels, sizes, boxes):  # type: ignore[no-untyped-def]
    """Count voxels and grow bounding boxes, run by run."""
    for z in range(labels.shape[0]):
        for y in range(labels.shape[1]):
            x = 0
            while x < labels.shape[2]:
                label, begin = labels[z, y, x], x
                while x < labels.shape[2] and labels[z, y, x] == label:
                    x += 1
                sizes[label] += x - begin
                box = boxes[label]
                box[0], box[1], box[2] = min(box[0], z), min(box[1], y), min(box[2], begin)
                box[3], box[4], box[5] = max(box[3], z + 1), max(box[4], y + 1), max(box[5], x)


def measure(labels: NDArray, n_labels: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return voxels (n_labels,) and bounding box (n_labels, 6) of labels below ``n_labels``."""
    sizes = np.zeros(n_labels, np.int64)
    boxes = np.tile(np.array([*labels.shape, 0, 0, 0], np.int32), (n_labels, 1))
    _measure(labels, sizes, boxes)
    return sizes, boxes


def build_sidecar(
    labels: NDArray,
    affinities: NDArray[np.uint8],
    grid: BlockGrid,
    number: int,
    original_labels: NDArray[np.uint64] | None = None,
    agreement: MaskAgreement | None = None,
    mask: str = "",
) -> Sidecar:
    """Collect the evidence of one block.

    Parameters
    ----------
    labels
        Local labels over the block's read box, uint16 or uint32, (z, y, x).
    affinities
        The block's own affinities over the read box, uint8, (3, z, y, x).
    grid
        Grid of the whole volume.
    number
        Block number.
    original_labels
        Label of local labels 0, 1, 2, ... in the original volume, where fragments were not made
        block by block.
    agreement
        What else speaks for joining two labels inside the block; it is mixed into ``aff_sum``.
    mask
        Checksum of what a mask has hidden of the block.

    Raises
    ------
    InputError
        If an array does not have the shape or type of the block.
    """
    shape = tuple(b - a for a, b in zip(*grid.read_box(number), strict=True))
    if labels.shape != shape or affinities.shape != (3, *shape):
        raise InputError(
            f"block {number}: labels {labels.shape} and affinities {affinities.shape} do not"
            f" have the read box's shape {shape}"
        )
    if labels.dtype not in (np.uint16, np.uint32) or affinities.dtype != np.uint8:
        raise InputError(
            f"block {number}: labels are {labels.dtype} (need uint16 or uint32), affinities"
            f" {affinities.dtype} (need uint8)"
        )
    inner = grid.write_in_read(number)
    written = np.ascontiguousarray(labels[inner])

    counts, boxes = measure(written, int(written.max()) + 1)
    counts[0] = 0
    nodes = np.flatnonzero(counts)

    table = PairTable()
    for axis in range(3):
        lower, upper = _neighbours(axis)
        table.add(written[lower], written[upper], affinities[axis][inner][upper])
    pairs = table.columns()

    z, y, x = (AxisPlanes.cut(labels, affinities[axis], inner, axis) for axis in range(3))
    return Sidecar(
        number=number,
        nodes=nodes.astype(np.uint32),
        sizes=counts[nodes],
        boxes=boxes[nodes],
        u=pairs.u.astype(np.uint32),
        v=pairs.v.astype(np.uint32),
        aff_sum=pairs.total if agreement is None else agreement.mixed(pairs),
        count=pairs.count,
        planes=(z, y, x),
        original_labels=None if original_labels is None else original_labels[nodes],
        mask=mask,
    )


def _neighbours(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return indices of all voxels but the last on an axis, and of all but the first."""
    lower = [slice(None)] * 3
    upper = [slice(None)] * 3
    lower[axis], upper[axis] = slice(None, -1), slice(1, None)
    return tuple(lower), tuple(upper)
