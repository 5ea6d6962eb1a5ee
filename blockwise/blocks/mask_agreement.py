"""What speaks for joining two labels of a block besides their affinities.

A predictor may give every label a row of coordinates (see `predict.predictor.Prediction`). The
cosine of the angle between two rows, from 0 to 1 as coordinates are not negative, is the agreement
of two labels. Where they touch inside the block, each contact counts as (1 - weight) affinity +
weight agreement: the same range and the same units, so the stitch needs to know nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.blocks.label_pairs import PairColumns
from agq.errors import InputError


@dataclass(frozen=True)
class Agreement:
    """Coordinates of the labels of one block, and their weight.

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

    def mixed(self, pairs: PairColumns) -> NDArray[np.int64]:
        """Return the sums of pairs of labels in 1/255, with the agreement mixed in.

        Raises
        ------
        InputError
            If a label has no row.
        """
        u, v = pairs.u.astype(np.int64), pairs.v.astype(np.int64)
        if len(v) and int(v.max()) >= len(self.memberships):
            raise InputError(
                f"memberships have {len(self.memberships)} rows, but there is a label {v.max()}"
            )
        rows = self.memberships.astype(np.float64)
        length = np.sqrt((rows * rows).sum(axis=1))
        both = length[u] * length[v]
        known = both > 0
        cosine = (rows[u] * rows[v]).sum(axis=1) / np.where(known, both, 1)
        # Rounding may leave a cosine a little above 1.
        agreement = 255 * np.minimum(cosine, 1) * pairs.count
        mixed = np.rint((1 - self.weight) * pairs.total + self.weight * agreement)
        return np.where(known, mixed, pairs.total).astype(np.int64)
