"""Hash of edges by their ends: rows of an edge table, found by the pair of nodes they join.

A slot holds a row; the pair itself is read from the table, so a slot takes four bytes. Code
that changes the ends of a row takes it out of the hash before and puts it back after.

numba caches compiled code by the date of the file that holds the caller: after a change here, save
`merge/kernel.py` again or remove its ``__pycache__``.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

_MIX = np.uint64(0x9E3779B97F4A7C15)
EMPTY = -1


def empty_slots(rows: int) -> NDArray[np.int32]:
    """Return slots for so many rows, at most two thirds of them in use (probing stays short)."""
    return np.full(1 << max(4, (rows + rows // 2).bit_length()), EMPTY, np.int32)


@numba.njit(cache=True, nogil=True)
def _home(a, b, mask):  # type: ignore[no-untyped-def]
    mixed = ((np.uint64(min(a, b)) << np.uint64(32)) | np.uint64(max(a, b))) * _MIX
    return np.int64((mixed ^ (mixed >> np.uint64(32))) & np.uint64(mask))


@numba.njit(cache=True, nogil=True)
def find(slots, ends, a, b):  # type: ignore[no-untyped-def]
    """Return the slot of the edge between two nodes, or the empty slot where it would go."""
    mask = slots.size - 1
    slot = _home(a, b, mask)
    while True:
        row = slots[slot]
        if row < 0:
            return slot
        first, second = ends[row, 0], ends[row, 1]
        if (first == a and second == b) or (first == b and second == a):
            return slot
        slot = (slot + 1) & mask


@numba.njit(cache=True, nogil=True)
def delete(slots, ends, slot):  # type: ignore[no-untyped-def]
    """Empty a slot and move later entries back, so that probing never meets a gap."""
    mask = slots.size - 1
    hole = slot
    slot = (slot + 1) & mask
    while slots[slot] >= 0:
        row = slots[slot]
        home = _home(ends[row, 0], ends[row, 1], mask)
        if ((slot - home) & mask) >= ((slot - hole) & mask):
            slots[hole] = row
            hole = slot
        slot = (slot + 1) & mask
    slots[hole] = EMPTY


@numba.njit(cache=True, nogil=True)
def lower_key(keys, kept, other):  # type: ignore[no-untyped-def]
    """Give row ``kept`` the smaller one of its key and that of row ``other``."""
    if keys[other, 0] < keys[kept, 0] or (
        keys[other, 0] == keys[kept, 0] and keys[other, 1] < keys[kept, 1]
    ):
        keys[kept, 0], keys[kept, 1] = keys[other, 0], keys[other, 1]


@numba.njit(cache=True, nogil=True)
def pool(slots, ends, num, den, keys):  # type: ignore[no-untyped-def]
    """Add up parallel edges in place and fill the empty slots; return how many rows remain.

    The rows that remain come first, in the order in which their pairs came.
    """
    rows = 0
    for row in range(ends.shape[0]):
        a, b = ends[row, 0], ends[row, 1]
        slot = find(slots, ends, a, b)
        kept = slots[slot]
        if kept < 0:
            ends[rows, 0], ends[rows, 1] = a, b
            num[rows], den[rows] = num[row], den[row]
            keys[rows, 0], keys[rows, 1] = keys[row, 0], keys[row, 1]
            slots[slot] = rows
            rows += 1
        else:
            num[kept] += num[row]
            den[kept] += den[row]
            lower_key(keys, kept, row)
    return rows
