"""Evidence between fragments: their contacts, in integers that add up in any order.

**Classes.** A contact is a pair of 6-connected voxels with different fragments. It is *across* if
the two voxels belong to different blocks, *within* if they belong to one block.

**Units.** Affinities are stored as uint8 (``round(255 * a)``). Across a face two blocks may have
predicted the same contact; its affinity is then the mean of both. To keep means of two integers
whole, all sums here are in *half units*: affinity in 1/510, ``a_lower + a_upper`` where both blocks
read the plane, ``2 * a`` where only the upper one did, and ``2 * a`` inside a block.

**Which affinity.** On a face on axis ``d`` between a lower block A and an upper block B, channel
``d`` of the first plane of B: the mean of A's and B's predictions if A read that plane, else B's.

**Overlap.** On the planes that both blocks labelled (the first of B, if A read it, and the last of
A, if B read it): voxels that are u for A and v for B, and the voxels of u and of v there. Labels
that meet there but do not touch across the face have a row too.

Every column is additive, so partial tables can be cut and merged in any way: :func:`merge_evidence`
sorts and reduces them, and its result does not depend on the partition.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from agq.errors import InputError

HALF_UNITS = 510
"""Half units in an affinity of 1."""

SAME = 2**20
"""Sum in half units, per contact, between two pieces of one fragment: above any affinity, so that
they merge first, and small enough for sums over 10^12 contacts."""

FORMAT_VERSION = 2


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
    overlap, size_u, size_v
        On planes that two blocks labelled: voxels of both u and v, of u, and of v (int64). Zero
        where it was not collected.
    """

    u: NDArray[np.uint64]
    v: NDArray[np.uint64]
    across_sum: NDArray[np.int64]
    across_count: NDArray[np.int64]
    within_sum: NDArray[np.int64]
    within_count: NDArray[np.int64]
    overlap: NDArray[np.int64]
    size_u: NDArray[np.int64]
    size_v: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.u)

    @classmethod
    def across(
        cls, u: NDArray[np.uint64], v: NDArray[np.uint64], total: NDArray, count: NDArray
    ) -> ContactTable:
        """Return contacts across a block border, without overlap."""
        none = np.zeros(len(u), np.int64)
        return cls(u, v, total, count, none, none, none, none, none)

    @classmethod
    def within(
        cls, u: NDArray[np.uint64], v: NDArray[np.uint64], total: NDArray, count: NDArray
    ) -> ContactTable:
        """Return contacts inside blocks."""
        none = np.zeros(len(u), np.int64)
        return cls(u, v, none, none, total, count, none, none, none)

    @classmethod
    def empty(cls) -> ContactTable:
        """Return a table of no contacts."""
        ids, sums = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        return cls.across(ids, ids, sums, sums)

    @classmethod
    def concatenate(cls, tables: Sequence[ContactTable]) -> ContactTable:
        """Return the rows of several tables, without adding any up."""
        if not tables:
            return cls.empty()
        return cls(
            *(np.concatenate([getattr(t, field.name) for t in tables]) for field in fields(cls))
        )


@dataclass(frozen=True)
class NodeTable:
    """Fragments.

    Attributes
    ----------
    ids
        Fragment ids, uint64, ascending and distinct.
    sizes
        Voxels, int64.
    boxes
        Bounding box in voxels of the volume, int64 (n, 6): first voxel and one past the last.
    """

    ids: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    boxes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray) -> NodeTable:
        """Return some rows."""
        return NodeTable(self.ids[rows], self.sizes[rows], self.boxes[rows])

    @classmethod
    def concatenate(cls, tables: Sequence[NodeTable]) -> NodeTable:
        """Return the rows of several tables."""
        if not tables:
            return cls(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros((0, 6), np.int64))
        return cls(
            *(np.concatenate([getattr(t, field.name) for t in tables]) for field in fields(cls))
        )


@dataclass(frozen=True)
class Evidence:
    """Fragments and contacts of a box of blocks.

    Attributes
    ----------
    nodes
        Fragments of the blocks.
    contacts
        Contacts between two of them; distinct pairs.
    faces
        On each axis (z, y, x), the contacts across the upper faces of the box: ``u`` inside,
        ``v`` in the next box.
    """

    nodes: NodeTable
    contacts: ContactTable
    faces: tuple[ContactTable, ContactTable, ContactTable]


_COLUMNS = fields(ContactTable)


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
