"""Evidence between fragments: who touches whom, in integers that add up in any order.

**Classes.** A contact is a pair of 6-connected voxels with different fragments. It is *across* if
the two voxels belong to different blocks, *within* if they belong to one block.

**Units.** Affinities are stored as uint8 (``round(255 * a)``). Across a face two blocks may have
predicted the same contact; its affinity is then the mean of both. To keep means of two integers
whole, all sums here are in *half units*: affinity in 1/510, ``a_lower + a_upper`` where both blocks
read the plane, ``2 * a`` where only the upper one did, and ``2 * a`` inside a block.

**Which affinity.** On a face on axis ``d`` between a lower block A and an upper block B, channel
``d`` of the first plane of B: the mean of A's and B's predictions if A read that plane, else B's.

Every column is additive, so partial tables can be cut and merged in any way: :func:`merge_evidence`
sorts and reduces them, and its result does not depend on the partition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from blockwise.array_files import pack_arrays, unpack_arrays
from blockwise.errors import InputError
from blockwise.grid import BlockGrid
from blockwise.pairs import PairTable
from blockwise.sidecar import Sidecar

HALF_UNITS = 510
"""Half units in an affinity of 1."""

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ContactTable:
    """Contacts between pairs of fragments, in columns.

    Attributes
    ----------
    u, v
        Fragment ids, uint64, ``u < v``; sorted by (u, v) and distinct once merged.
    across_sum, across_count
        Sum of affinities in half units, and number, of contacts across a block border (int64).
    within_sum, within_count
        The same for contacts inside one block.
    """

    u: NDArray[np.uint64]
    v: NDArray[np.uint64]
    across_sum: NDArray[np.int64]
    across_count: NDArray[np.int64]
    within_sum: NDArray[np.int64]
    within_count: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.u)

    @classmethod
    def empty(cls) -> ContactTable:
        """Return a table of no contacts."""
        ids, sums = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        return cls(ids, ids, sums, sums, sums, sums)


@dataclass(frozen=True)
class NodeTable:
    """Fragments: ``ids`` (uint64, sorted and distinct once merged), ``sizes`` (voxels, int64)."""

    ids: NDArray[np.uint64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def empty(cls) -> NodeTable:
        """Return a table of no fragments."""
        return cls(np.zeros(0, np.uint64), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Evidence:
    """Fragments and their contacts: of one block, of a batch, or of a whole run."""

    nodes: NodeTable
    contacts: ContactTable

    def to_bytes(self) -> bytes:
        """Return an npz (stored, no pickle) whose bytes depend on the contents alone."""
        members: dict[str, NDArray] = {
            "header": np.array([FORMAT_VERSION], np.int64),
            "ids": self.nodes.ids,
            "sizes": self.nodes.sizes,
        }
        members |= {field.name: getattr(self.contacts, field.name) for field in _COLUMNS}
        return pack_arrays(members, compress=False)

    @classmethod
    def from_bytes(cls, data: bytes) -> Evidence:
        """Read :meth:`to_bytes`.

        Raises
        ------
        InputError
            If the data are damaged or of another format version.
        """
        arrays = unpack_arrays(data)
        try:
            if arrays["header"].tolist() != [FORMAT_VERSION]:
                raise InputError(
                    f"contact table has format version {arrays['header'].tolist()}, this release"
                    f" reads {FORMAT_VERSION}: remove the run's contacts folder and stitch again"
                )
            return cls(
                NodeTable(arrays["ids"], arrays["sizes"]),
                ContactTable(*(arrays[field.name] for field in _COLUMNS)),
            )
        except KeyError as error:
            raise InputError(f"contact table is damaged (no {error})") from None


_COLUMNS = fields(ContactTable)


def block_evidence(sidecar: Sidecar, grid: BlockGrid) -> Evidence:
    """Return the fragments of one block and the contacts inside it."""

    def ids(local: NDArray) -> NDArray[np.uint64]:
        return grid.fragment_ids(sidecar.number, local)

    none = np.zeros(len(sidecar.u), np.int64)
    contacts = ContactTable(
        ids(sidecar.u), ids(sidecar.v), none, none, 2 * sidecar.aff_sum, sidecar.count
    )
    return Evidence(NodeTable(ids(sidecar.nodes), sidecar.sizes), contacts)


def face_contacts(lower: Sidecar, upper: Sidecar, axis: int, grid: BlockGrid) -> ContactTable:
    """Return the contacts across the face between two neighbouring blocks.

    Parameters
    ----------
    lower, upper
        Sidecars of a block and of the next block on ``axis`` (0 z, 1 y, 2 x).

    Raises
    ------
    InputError
        If the planes of the two blocks do not match.
    """
    below, above = lower.planes[axis], upper.planes[axis]
    if below.high_labels.shape != above.low_labels.shape:
        raise InputError(
            f"sidecars of blocks {lower.number} and {upper.number}: faces on axis {axis} have"
            f" shapes {below.high_labels.shape} and {above.low_labels.shape}; they come from"
            " different grids, predict again with --overwrite"
        )
    own = above.low_affinity.astype(np.uint16)
    other = own if below.after_affinity is None else below.after_affinity
    pairs = PairTable(ordered=True)
    pairs.add(below.high_labels, above.low_labels, own + other)
    found = pairs.columns()
    none = np.zeros(len(found.u), np.int64)
    # The upper block has the larger number, so u < v holds for the global ids.
    return ContactTable(
        grid.fragment_ids(lower.number, found.u),
        grid.fragment_ids(upper.number, found.v),
        found.total,
        found.count,
        none,
        none,
    )


def collect(
    numbers: Sequence[int] | NDArray[np.int64],
    grid: BlockGrid,
    present: NDArray[np.bool_],
    read: Callable[[int], Sidecar],
) -> Evidence:
    """Return the evidence that a batch of blocks owns: theirs, and that of their upper faces.

    Over any partition of the blocks of a run into batches, every contact is owned once.

    Parameters
    ----------
    numbers
        Block numbers; those not ``present`` are left out.
    present
        For each block of the grid, whether it has a sidecar that counts (done, not skipped).
    read
        Returns the sidecar of a block.
    """
    batch = {int(number) for number in numbers if present[number]}
    kept: dict[int, Sidecar] = {}
    nodes: list[NodeTable] = []
    contacts: list[ContactTable] = []
    # In ascending order a block's lower neighbours come before it, so once it has been the
    # lower one itself nothing asks for it again and memory stays at about one layer of blocks.
    for number in sorted(batch):
        own = kept.pop(number, None) or read(number)
        evidence = block_evidence(own, grid)
        nodes.append(evidence.nodes)
        contacts.append(evidence.contacts)
        for axis in range(3):
            above = grid.neighbor(number, axis)
            if above is None or not present[above]:
                continue
            upper = kept.get(above) or read(above)
            if above in batch:
                kept[above] = upper
            contacts.append(face_contacts(own, upper, axis, grid))
    return Evidence(merge_nodes(nodes), merge_contacts(contacts))


def merge_contacts(tables: Iterable[ContactTable]) -> ContactTable:
    """Add up contact tables: one sorted row for each pair.

    Raises
    ------
    InputError
        If a row does not have ``u < v`` (a fragment cannot touch itself).
    """
    parts = [table for table in tables if len(table)]
    if not parts:
        return ContactTable.empty()
    columns = [np.concatenate([getattr(part, field.name) for part in parts]) for field in _COLUMNS]
    u, v = columns[:2]
    if bool(np.any(u >= v)):
        row = int(np.flatnonzero(u >= v)[0])
        raise InputError(f"contact table: pair ({u[row]}, {v[row]}) must have u < v")
    order = np.lexsort((v, u))
    u, v = u[order], v[order]
    first = np.flatnonzero(np.concatenate(([True], (u[1:] != u[:-1]) | (v[1:] != v[:-1]))))
    sums = (np.add.reduceat(column[order], first) for column in columns[2:])
    return ContactTable(u[first], v[first], *sums)


def merge_nodes(tables: Iterable[NodeTable]) -> NodeTable:
    """Add up node tables: one sorted row for each fragment."""
    parts = [table for table in tables if len(table)]
    if not parts:
        return NodeTable.empty()
    ids = np.concatenate([part.ids for part in parts])
    sizes = np.concatenate([part.sizes for part in parts])
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    first = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1])))
    return NodeTable(ids[first], np.add.reduceat(sizes[order], first))


def merge_evidence(parts: Iterable[Evidence]) -> Evidence:
    """Add up partial evidence; the result does not depend on order or partition."""
    listed = list(parts)
    return Evidence(
        merge_nodes(part.nodes for part in listed), merge_contacts(part.contacts for part in listed)
    )


def contacts_from_volume(
    fragments: NDArray[np.uint64], affinities: NDArray, border_mask: NDArray[np.bool_]
) -> Evidence:
    """Return the evidence of a whole volume held in memory.

    Parameters
    ----------
    fragments
        Global fragment ids, uint64, (z, y, x); 0 is background.
    affinities
        (3, z, y, x): uint8 affinities, or uint16 affinities already in half units (0 to 510).
    border_mask
        (3, z, y, x): True where the contact of a voxel with its previous voxel on axis ``c``
        (channel ``c``) counts as *across*; elsewhere it counts as *within*.

    Raises
    ------
    InputError
        If shapes or types do not fit.
    """
    shape = (3, *fragments.shape)
    if fragments.ndim != 3 or affinities.shape != shape or border_mask.shape != shape:
        raise InputError(
            f"contacts: fragments {fragments.shape}, affinities {affinities.shape} and border mask"
            f" {border_mask.shape} do not fit together"
        )
    if fragments.dtype != np.uint64 or affinities.dtype not in (np.uint8, np.uint16):
        raise InputError(
            f"contacts: fragments are {fragments.dtype} (need uint64), affinities"
            f" {affinities.dtype} (need uint8, or uint16 in half units)"
        )
    scale = np.uint16(2 if affinities.dtype == np.uint8 else 1)
    across, within = PairTable(), PairTable()
    # Plane by plane, so that the copies below stay small.
    for z in range(len(fragments)):
        plane = fragments[z]
        for axis, before, after in (
            (0, fragments[z - 1] if z else None, plane),
            (1, plane[:-1], plane[1:]),
            (2, plane[:, :-1], plane[:, 1:]),
        ):
            if before is None:
                continue
            where = tuple(slice(1, None) if axis == d else slice(None) for d in (1, 2))
            values = affinities[axis, z][where].astype(np.uint16) * scale
            border = border_mask[axis, z][where]
            across.add(before, np.where(border, after, np.uint64(0)), values)
            within.add(before, np.where(border, np.uint64(0), after), values)
    a, w = across.columns(), within.columns()
    no_a, no_w = np.zeros(len(a.u), np.int64), np.zeros(len(w.u), np.int64)
    contacts = merge_contacts(
        (
            ContactTable(a.u, a.v, a.total, a.count, no_a, no_a),
            ContactTable(w.u, w.v, no_w, no_w, w.total, w.count),
        )
    )
    ids, sizes = np.unique(fragments, return_counts=True)
    foreground = ids > 0
    return Evidence(NodeTable(ids[foreground], sizes[foreground].astype(np.int64)), contacts)
