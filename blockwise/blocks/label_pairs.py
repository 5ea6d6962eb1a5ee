"""Touching pairs of labels: how often they touch, and what speaks for joining them.

They are counted in numba, by run-length caching and a hash table.

The hash table grows outside the compiled loop. Rebinding arrays inside it makes numba count
references in every iteration, which was measured 20 to 40 times slower. All keys are uint64
throughout: numba turns int64 mixed with uint64 into float64, which loses ids above 2**53.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from agq.blockwise.storage.arrays import Columns, Ids, Numbers
from agq.errors import InputError

_MIX_U = np.uint64(0x9E3779B97F4A7C15)
_MIX_V = np.uint64(0xC2B2AE3D27D4EB4F)
_SHIFT = np.uint64(32)
_ZERO = np.uint64(0)


@dataclass(frozen=True)
class PairColumns(Columns):
    """Distinct pairs of labels, sorted by (u, v), with the sum and number of their contacts."""

    u: Ids
    v: Ids
    total: Numbers
    count: Numbers


@numba.njit(cache=True, nogil=True)
def _slot(slots, keys, u, v):  # type: ignore[no-untyped-def]
    mask = np.uint64(slots.size - 1)
    mixed = u * _MIX_U + v * _MIX_V
    position = (mixed ^ (mixed >> _SHIFT)) & mask
    while True:
        row = slots[position]
        if row < 0 or (keys[row, 0] == u and keys[row, 1] == v):
            return position
        position = (position + np.uint64(1)) & mask


@numba.njit(cache=True, nogil=True)
def _rehash(slots, keys, rows):  # type: ignore[no-untyped-def]
    for row in range(rows):
        slots[_slot(slots, keys, keys[row, 0], keys[row, 1])] = row


@numba.njit(cache=True, nogil=True)
def _count(first, second, values, ordered, start, slots, keys, sums, rows):  # type: ignore[no-untyped-def]
    """Add rows ``start``.. of the (z, y) plane of lines; return (next line, rows used)."""
    n_y, n_x = first.shape[1], first.shape[2]
    lines = first.shape[0] * n_y
    capacity = keys.shape[0]
    last_u, last_v, last_row = _ZERO, _ZERO, -1
    for line in range(start, lines):
        if rows + n_x > capacity:
            return line, rows
        z, y = line // n_y, line % n_y
        for x in range(n_x):
            a, b = first[z, y, x], second[z, y, x]
            if a == b and not ordered:
                continue
            if a == 0 or b == 0:
                continue
            u, v = np.uint64(a), np.uint64(b)
            if v < u and not ordered:
                u, v = v, u
            if u != last_u or v != last_v or last_row < 0:
                position = _slot(slots, keys, u, v)
                if slots[position] < 0:
                    slots[position] = rows
                    keys[rows, 0] = u
                    keys[rows, 1] = v
                    rows += 1
                last_u, last_v, last_row = u, v, slots[position]
            sums[last_row, 0] += np.int64(values[z, y, x])
            sums[last_row, 1] += 1
    return lines, rows


class PairTable:
    """Sum of values and number of contacts for every pair of labels seen.

    Parameters
    ----------
    ordered
        False: pairs are unordered and equal labels do not count (labels of one array).
        True: the first label belongs to the first array, and labels of equal value are a pair
        (labels of two blocks, numbered independently).
    """

    def __init__(self, *, ordered: bool = False) -> None:
        self._ordered = ordered
        self._rows = 0
        self._keys = np.zeros((0, 2), np.uint64)
        self._sums = np.zeros((0, 2), np.int64)
        self._allocate(1024)

    def _allocate(self, capacity: int) -> None:
        keys = np.zeros((capacity, 2), np.uint64)
        sums = np.zeros((capacity, 2), np.int64)
        keys[: self._rows] = self._keys[: self._rows]
        sums[: self._rows] = self._sums[: self._rows]
        self._keys, self._sums = keys, sums
        # At most half full, so that linear probing stays short.
        self._slots = np.full(2 * capacity, -1, np.int64)
        _rehash(self._slots, self._keys, self._rows)

    def add(self, first: NDArray, second: NDArray, values: NDArray) -> None:
        """Add the contacts between ``first[i]`` and ``second[i]`` with value ``values[i]``.

        Parameters
        ----------
        first, second
            Labels, any unsigned dtype, (z, y, x) or (y, x), same shape; 0 is background.
        values
            Non-negative integers of the same shape.

        Raises
        ------
        ValueError
            If the shapes differ.
        """
        if not first.shape == second.shape == values.shape:
            raise ValueError(f"planes of shapes {first.shape}, {second.shape}, {values.shape}")
        if first.ndim == 2:
            first, second, values = first[None], second[None], values[None]
        line, lines = 0, first.shape[0] * first.shape[1]
        while line < lines:
            capacity = self._keys.shape[0]
            if self._rows + first.shape[2] > capacity:
                while self._rows + first.shape[2] > capacity:
                    capacity *= 2
                self._allocate(capacity)
            line, self._rows = _count(
                first,
                second,
                values,
                self._ordered,
                line,
                self._slots,
                self._keys,
                self._sums,
                self._rows,
            )

    def columns(self) -> PairColumns:
        """Return the distinct pairs, sorted by (u, v)."""
        keys, sums = self._keys[: self._rows], self._sums[: self._rows]
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        return PairColumns(keys[order, 0], keys[order, 1], sums[order, 0], sums[order, 1])


@dataclass(frozen=True)
class MaskAgreement:
    """What speaks for joining two labels of a block besides their affinities.

    A predictor may give every label a row of coordinates (`predict.predictor.Prediction`). The
    agreement of two labels is the cosine of the angle between their rows, from 0 to 1 because
    coordinates are not negative. Where they touch inside the block, each contact counts as
    (1 - weight) affinity + weight agreement: the same range and the same units, so the stitch
    needs to know nothing of it.

    Parameters
    ----------
    memberships
        Non-negative integers (1 + labels, coordinates); row 0 is the background's. A row of zeros
        agrees and disagrees with nothing: its contacts count by their affinities alone.
    weight
        From 0 (affinities alone) to 1 (agreement alone).

    Raises
    ------
    InputError
        If the table is no two-dimensional one of non-negative integers, or the weight is out of
        range.
    """

    memberships: NDArray[np.integer]
    weight: float

    def __post_init__(self) -> None:
        table = self.memberships
        if table.ndim != 2 or table.dtype.kind not in "iu" or (table.size and table.min() < 0):
            raise InputError(
                f"memberships of shape {table.shape} and dtype {table.dtype}: expected "
                "non-negative integers (1 + labels, coordinates)"
            )
        if not 0 <= self.weight <= 1:
            raise InputError(f"weight of memberships: {self.weight} is not between 0 and 1")

    def of_pieces(self, origin: NDArray[np.int64]) -> MaskAgreement:
        """Return the agreement of pieces, each with the row of the label that it is a piece of.

        Raises
        ------
        InputError
            If a label has no row.
        """
        self._require_row(int(origin.max()))
        return MaskAgreement(self.memberships[origin], self.weight)

    def _require_row(self, label: int) -> None:
        if label >= len(self.memberships):
            raise InputError(
                f"memberships have {len(self.memberships)} rows, but there is a label {label}"
            )

    def mixed(self, pairs: PairColumns) -> NDArray[np.int64]:
        """Return the sums of pairs of labels in 1/255, with the agreement mixed in.

        Raises
        ------
        InputError
            If a label has no row.
        """
        u, v = pairs.u.astype(np.int64), pairs.v.astype(np.int64)
        if len(v):
            self._require_row(int(v.max()))
        rows = self.memberships.astype(np.float64)
        length = np.sqrt((rows * rows).sum(axis=1))
        lengths = length[u] * length[v]
        has_cosine = lengths > 0
        cosine = (rows[u] * rows[v]).sum(axis=1) / np.where(has_cosine, lengths, 1)
        # Rounding may leave a cosine a little above 1.
        agreement = 255 * np.minimum(cosine, 1) * pairs.count
        mixed = np.rint((1 - self.weight) * pairs.total + self.weight * agreement)
        return np.where(has_cosine, mixed, pairs.total).astype(np.int64)
