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
  (reducibility: Bruynooghe 1977, Murtagh 1983). The hierarchy in
  :mod:`merge.graph` rests on this; :func:`agglomerate` is its case of one part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.stitch.evidence.contacts import HALF_UNITS, ContactTable, merge_contacts
from agq.blockwise.stitch.merge.components import connected_components
from agq.blockwise.stitch.merge.graph import Graph, MergeTable, ScoreTable, contract, positions
from agq.blockwise.stitch.settings import EvidenceKind
from agq.errors import InputError


@dataclass(frozen=True)
class Thresholds:
    """What a contact must show to speak for a merge.

    Attributes
    ----------
    across
        Affinity of contacts across a block border.
    within
        Affinity of contacts inside a block. 1.0 (published): they can only speak against a merge.
    evidence
        ``affinity``: borders count by their affinities. ``overlap``: by the intersection over
        union of the labels where both blocks predicted. ``both``: by their affinities, but a
        contact whose own overlap is below its threshold counts like one inside a block.
    overlap
        Intersection over union; for ``overlap`` and ``both``.
    min_contact
        Border contacts of fewer touching voxel pairs are left out. (A contact is complete in one
        face, so this is a filter on evidence. One on pooled edges would not be exact.)
    margin
        Added to the thresholds of the score (for ``both``, not to that of the filter).

    Raises
    ------
    InputError
        If a value is out of range.
    """

    across: float = 0.7
    within: float = 1.0
    evidence: EvidenceKind = "affinity"
    overlap: float = 0.5
    min_contact: int = 0
    margin: float = 0.0

    def __post_init__(self) -> None:
        for name in ("across", "within", "overlap"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise InputError(f"threshold {name}: {value} is not between 0 and 1")
        if self.min_contact < 0:
            raise InputError(f"min_contact: {self.min_contact} is negative")
        if not -1.0 <= self.margin <= 1.0:
            raise InputError(f"margin: {self.margin} is not between -1 and 1")

    @property
    def half_units(self) -> tuple[int, int, int]:
        """Thresholds across, within and overlap as integers in 1/510 (0.7 is exactly 357)."""
        across, within, overlap = (
            round(value * HALF_UNITS) for value in (self.across, self.within, self.overlap)
        )
        return across, within, overlap

    @property
    def margin_half_units(self) -> int:
        """The margin in 1/510."""
        return round(self.margin * HALF_UNITS)


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
    """Return the score of every contact row as numerator (half units) and denominator.

    Rows with denominator 0 are left out of the graph: they hold no evidence of the chosen kind.
    """
    across, within, overlap = thresholds.half_units
    margin, rows = thresholds.margin_half_units, contacts
    weight = rows.across_count
    value = rows.across_sum - across * weight
    if thresholds.evidence != "affinity":
        union = rows.size_u + rows.size_v - rows.overlap
        agreement = HALF_UNITS * rows.overlap - overlap * union
        if thresholds.evidence == "both":
            value = np.where(agreement < 0, rows.across_sum - within * weight, value)
        else:
            value, weight = agreement, union
    if thresholds.min_contact > 0:
        enough = rows.across_count >= thresholds.min_contact
        value, weight = value * enough, weight * enough
    # Pieces of one fragment belong together whatever the evidence.
    same = rows.across_sum > HALF_UNITS * rows.across_count
    if bool(same.any()):
        value = np.where(same, rows.across_sum, value)
        weight = np.where(same, rows.across_count, weight)
    numerator = value + rows.within_sum - within * rows.within_count
    denominator = weight + rows.within_count
    return numerator - margin * denominator, denominator


def score_contacts(contacts: ContactTable, thresholds: Thresholds) -> ScoreTable:
    """Return the contacts that count, with their scores."""
    numerator, denominator = scores(contacts, thresholds)
    keep = denominator > 0
    if bool(keep.all()):
        return ScoreTable(contacts.u, contacts.v, numerator, denominator)
    return ScoreTable(contacts.u[keep], contacts.v[keep], numerator[keep], denominator[keep])


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
        If a contact names an unknown fragment, an id is 0 or repeated, or there are more edges
        than one process can hold.
    """
    ids = np.sort(np.asarray(ids, np.uint64))
    if len(ids) and (ids[0] == 0 or bool(np.any(ids[1:] == ids[:-1]))):
        raise InputError("fragment ids: they must be distinct and not 0 (background)")
    contacts = merge_contacts([contacts])
    merges, _ = contract(Graph.of_fragments(ids, score_contacts(contacts, thresholds)))
    roots = connected_components(len(ids), positions(ids, merges.u), positions(ids, merges.v))
    return Agglomeration(ids, ids[roots], merges)
