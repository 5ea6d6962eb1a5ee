"""Exact greedy agglomeration of a contact graph.

Every contact contributes its affinity minus the threshold of its class; an edge's score is the sum
of contributions over the number of contacts. The best edge merges while its score is positive;
parallel edges add up. (Mean-affinity hierarchical agglomeration: Funke et al., TPAMI 2019; with
per-class thresholds it is the stitching rule published with AGQ. Background is not a node.)

The result is a function of the contacts alone:

- Scores are ratios of integers and are compared exactly, never as rounded floats.
- Equal scores are ordered by the smallest original edge ``(u0, v0)`` among the contacts pooled in
  an edge. It is inherited as a minimum, so no two live edges are equal: a strict total order.
- A pooled score is a mediant, never above the larger of its parents, so merges come in
  non-increasing order, and any order of reciprocal-best merges gives the same result
  (reducibility: Bruynooghe 1977, Murtagh 1983). A hierarchical version rests on this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockwise.agglomerate_kernel import agglomerate_edges, positive_components
from blockwise.contacts import HALF_UNITS, ContactTable, merge_contacts
from blockwise.errors import InputError

MAX_EDGES = 2**30
"""Edges that one process can agglomerate (half-edges are numbered in 32 bits)."""


@dataclass(frozen=True)
class Thresholds:
    """Affinity above which a contact speaks for a merge.

    Attributes
    ----------
    across
        For contacts across a block border.
    within
        For contacts inside a block. 1.0 (published): they can only speak against a merge.

    Raises
    ------
    InputError
        If a threshold is outside 0 to 1.
    """

    across: float = 0.7
    within: float = 1.0

    def __post_init__(self) -> None:
        for name in ("across", "within"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise InputError(f"threshold {name}: {value} is not between 0 and 1")

    @property
    def half_units(self) -> tuple[int, int]:
        """Both thresholds as integers in 1/510 (0.7 is exactly 357), to the nearest."""
        return round(self.across * HALF_UNITS), round(self.within * HALF_UNITS)


@dataclass(frozen=True)
class MergeTable:
    """Merges in the order made (the dendrogram).

    Attributes
    ----------
    u, v
        Smallest fragment id of each of the two clusters, uint64, ``u < v``; ``u`` is the
        smallest id of the merged one.
    numerator, denominator
        Score in half units as an exact fraction, int64; affinity above threshold is
        ``numerator / denominator / 510``.
    """

    u: NDArray[np.uint64]
    v: NDArray[np.uint64]
    numerator: NDArray[np.int64]
    denominator: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.u)


@dataclass(frozen=True)
class Agglomeration:
    """Segments of all fragments.

    Attributes
    ----------
    ids
        Fragment ids, uint64, sorted.
    representatives
        Smallest fragment id of each fragment's segment, uint64, in the order of ``ids``.
    merges
        The merges that made them.
    """

    ids: NDArray[np.uint64]
    representatives: NDArray[np.uint64]
    merges: MergeTable


def scores(
    contacts: ContactTable, thresholds: Thresholds
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the score of every contact row as numerator (half units) and denominator (count)."""
    across, within = thresholds.half_units
    numerator = (
        contacts.across_sum
        - across * contacts.across_count
        + contacts.within_sum
        - within * contacts.within_count
    )
    return numerator, contacts.across_count + contacts.within_count


def agglomerate(
    ids: NDArray[np.uint64], contacts: ContactTable, thresholds: Thresholds
) -> Agglomeration:
    """Merge fragments best first while the score is positive.

    Parameters
    ----------
    ids
        All fragment ids, uint64, any order, distinct, without 0 (background is not a node).
    contacts
        Contacts between them; repeated rows add up.

    Raises
    ------
    InputError
        If a contact names an unknown fragment or has no voxels, an id is 0 or repeated, or there
        are more than :data:`MAX_EDGES` edges.
    """
    ids = np.sort(np.asarray(ids, np.uint64))
    if len(ids) and (ids[0] == 0 or bool(np.any(ids[1:] == ids[:-1]))):
        raise InputError("fragment ids: they must be distinct and not 0 (background)")
    contacts = merge_contacts([contacts])
    first, second = _dense(ids, contacts.u), _dense(ids, contacts.v)
    numerator, denominator = scores(contacts, thresholds)
    if bool(np.any(denominator <= 0)):
        raise InputError("contact table: a row counts no contacts")

    # Clusters grow along positive edges only, so an edge between two components of the graph
    # of positive edges can never be pooled into a positive one.
    positive = numerator > 0
    component = positive_components(len(ids), first[positive], second[positive])
    keep = component[first] == component[second]
    first, second = first[keep], second[keep]
    if len(first) > MAX_EDGES:
        raise InputError(
            f"contact graph: {len(first)} edges are more than one process can hold ({MAX_EDGES})"
        )
    roots, u, v, num, den = agglomerate_edges(
        len(ids), first, second, numerator[keep], denominator[keep]
    )
    return Agglomeration(ids, ids[roots], MergeTable(ids[u], ids[v], num, den))


def _dense(ids: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.int32]:
    position = np.searchsorted(ids, values)
    known = position < len(ids)
    known[known] = ids[position[known]] == values[known]
    if not bool(known.all()):
        raise InputError(
            f"contact table: fragment {values[~known][0]} is not among the {len(ids)} fragments"
        )
    return position.astype(np.int32)
