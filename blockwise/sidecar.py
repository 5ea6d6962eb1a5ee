"""Sidecar: the evidence of one block that the stitch needs, written beside its fragments.

The worker has labels and affinities in memory, so it writes what is on the faces of its block
and the contacts inside it; the stitch never reads volumes for evidence.

File: a zip of npy members (``numpy.load`` opens it without pickle), with fixed time stamps and
member order, so that equal contents give equal bytes. Labels are *local* (uint16 or uint32, 0
background); affinities are uint8, ``round(255 * affinity)``; channel ``c`` at voxel ``v`` is
the affinity between ``v`` and the previous voxel on axis ``c`` (0 = z, 1 = y, 2 = x).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from blockwise.array_files import pack_arrays, unpack_arrays
from blockwise.errors import InputError
from blockwise.pairs import PairTable

if TYPE_CHECKING:
    from blockwise.grid import BlockGrid

FORMAT_VERSION = 1

_OVERLAP = ("after_labels", "before_labels")


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
    after_affinity: NDArray[np.uint8] | None
    after_labels: NDArray | None
    before_labels: NDArray | None


@dataclass(frozen=True)
class Sidecar:
    """Evidence of one block.

    Attributes
    ----------
    number
        Block number in the grid of the whole volume.
    nodes, sizes
        Local labels present in the write box, ascending (uint32), and their voxels (int64).
    u, v, aff_sum, count
        Contacts inside the write box: 6-connected pairs of different labels, ``u < v``
        (uint32), sorted by (u, v); sum of the block's own uint8 affinities and number of
        touching voxel pairs (int64).
    planes
        Face planes on z, y, x.
    """

    number: int
    nodes: NDArray[np.uint32]
    sizes: NDArray[np.int64]
    u: NDArray[np.uint32]
    v: NDArray[np.uint32]
    aff_sum: NDArray[np.int64]
    count: NDArray[np.int64]
    planes: tuple[AxisPlanes, AxisPlanes, AxisPlanes]

    def to_bytes(self) -> bytes:
        """Return the file contents: the same bytes for the same evidence."""
        members: dict[str, NDArray] = {
            "header": np.array([FORMAT_VERSION, self.number], np.int64),
            "nodes": self.nodes,
            "sizes": self.sizes,
            "u": self.u,
            "v": self.v,
            "aff_sum": self.aff_sum,
            "count": self.count,
        }
        for axis, planes in enumerate(self.planes):
            for field in fields(planes):
                plane = getattr(planes, field.name)
                if plane is not None:
                    members[f"{field.name}_{axis}"] = plane
        return pack_arrays(members)

    @classmethod
    def from_bytes(cls, data: bytes, *, overlap: bool = True) -> Sidecar:
        """Read :meth:`to_bytes`; without ``overlap`` its label planes outside the block are None.

        Raises
        ------
        InputError
            If the data are damaged or of another format version.
        """
        arrays = unpack_arrays(data, () if overlap else _OVERLAP)
        try:
            version, number = (int(value) for value in arrays["header"])
            if version != FORMAT_VERSION:
                raise InputError(
                    f"sidecar has format version {version}, this release reads {FORMAT_VERSION}:"
                    " predict again with --overwrite"
                )
            planes = [
                AxisPlanes(
                    low_labels=arrays[f"low_labels_{axis}"],
                    low_affinity=arrays[f"low_affinity_{axis}"],
                    high_labels=arrays[f"high_labels_{axis}"],
                    after_affinity=arrays.get(f"after_affinity_{axis}"),
                    after_labels=arrays.get(f"after_labels_{axis}"),
                    before_labels=arrays.get(f"before_labels_{axis}"),
                )
                for axis in range(3)
            ]
            columns = {name: arrays[name] for name in ("nodes", "sizes", "u", "v", "aff_sum")}
            return cls(
                number, **columns, count=arrays["count"], planes=(planes[0], planes[1], planes[2])
            )
        except (KeyError, ValueError) as error:
            raise InputError(f"sidecar is damaged ({error}): predict the block again") from None


def sidecar_path(run_dir: Path, number: int) -> Path:
    """Return the path of a block's sidecar; at most 1000 files share a folder."""
    return Path(run_dir) / "sidecars" / f"{number // 1000:07d}" / f"{number}.npz"


def read_sidecar(run_dir: Path, number: int, *, overlap: bool = True) -> Sidecar:
    """Read the sidecar of a block, with or without its label planes outside the block.

    Raises
    ------
    InputError
        If it is missing, damaged or another block's.
    """
    path = sidecar_path(run_dir, number)
    try:
        sidecar = Sidecar.from_bytes(path.read_bytes(), overlap=overlap)
    except FileNotFoundError:
        raise InputError(
            f"{path}: sidecar of block {number} is missing: predict it again"
        ) from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if sidecar.number != number:
        raise InputError(f"{path}: holds block {sidecar.number}, not block {number}")
    return sidecar


def build_sidecar(
    labels: NDArray, affinities: NDArray[np.uint8], grid: BlockGrid, number: int
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
    own = np.ascontiguousarray(labels[inner])

    counts = np.bincount(own.reshape(-1))
    counts[0] = 0
    nodes = np.flatnonzero(counts)

    pairs = PairTable()
    for axis in range(3):
        lower, upper = _shifted(axis)
        pairs.add(own[lower], own[upper], affinities[axis][inner][upper])
    columns = pairs.columns()

    def plane(array: NDArray, axis: int, index: int) -> NDArray | None:
        if not 0 <= index < shape[axis]:
            return None
        return array[_at(inner, axis, index)].copy()

    def face(axis: int) -> AxisPlanes:
        first, last = inner[axis].start, inner[axis].stop - 1
        return AxisPlanes(
            low_labels=labels[_at(inner, axis, first)].copy(),
            low_affinity=affinities[axis][_at(inner, axis, first)].copy(),
            high_labels=labels[_at(inner, axis, last)].copy(),
            after_affinity=plane(affinities[axis], axis, last + 1),
            after_labels=plane(labels, axis, last + 1),
            before_labels=plane(labels, axis, first - 1),
        )

    return Sidecar(
        number=number,
        nodes=nodes.astype(np.uint32),
        sizes=counts[nodes].astype(np.int64),
        u=columns.u.astype(np.uint32),
        v=columns.v.astype(np.uint32),
        aff_sum=columns.total,
        count=columns.count,
        planes=(face(0), face(1), face(2)),
    )


def _at(box: tuple[slice, ...], axis: int, index: int) -> tuple[slice | int, ...]:
    return (*box[:axis], index, *box[axis + 1 :])


def _shifted(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Index pairs of neighbouring voxels on an axis: (all but the last, all but the first)."""
    lower = [slice(None)] * 3
    upper = [slice(None)] * 3
    lower[axis], upper[axis] = slice(None, -1), slice(1, None)
    return tuple(lower), tuple(upper)
