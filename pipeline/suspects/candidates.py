"""Candidates: every cut of a segment and every pair of segments, with what speaks for an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.stitch.merge.agglomeration import ROOTS
from agq.pipeline.suspects.cuts import Cuts, find_cuts
from agq.pipeline.suspects.evidence import SegmentEvidence, Segments

MERGE: Final = "merge"
SPLIT: Final = "split"

FEATURES: Final = {
    MERGE: (
        *("affinity", "joined", "contacts", "small", "large", "pairs"),
        *("small_ends", "large_ends", "through", "beside"),
    ),
    SPLIT: (
        *("affinity", "contacts", "small", "large", "share", "ahead", "behind"),
        *("small_ends", "large_ends", "through", "beside"),
    ),
}
"""What a probability is computed from.

affinity
    Mean over all contacts between both sides, above the threshold.
joined
    Score of the merge that joined them.
contacts, small, large, pairs
    Logarithms: touching voxel pairs, voxels of each side, touching fragments.
share
    Of the contacts of the smaller segment with others, those with this one.
ahead, behind
    How much better this pair is than the best other pair of the smaller, and of the larger segment.
small_ends, large_ends
    Faces of the volume that each side reaches: where it reaches none, it ends inside.
through
    1 if each side reaches two faces, and so may be whole.
beside
    Sections in which both sides lie, as a share of those of the one that has fewer.
"""

_PRIOR = 30
"""Contacts of affinity 0 above threshold that are added before pairs are compared."""


@dataclass(frozen=True)
class Candidates:
    """Possible errors of one kind.

    Attributes
    ----------
    rows
        Structured: ``a`` and ``b`` (segments), ``u`` and ``v`` (the fragments
        at which to cut or join), ``box`` (where they touch), ``sides`` (voxels, smaller first),
        ``part``, ``span``, ``begin``, ``end``, ``first``, ``last`` (see `cuts.Cuts`; 0 for pairs).
    features
        (n, features), as `FEATURES`.
    gain
        Bits of variation of information that mending it is worth if it is an error.
    """

    kind: str
    rows: NDArray
    features: NDArray[np.float64]
    gain: NDArray[np.float64]

    def take(self, rows: Any) -> Candidates:
        """Return some rows."""
        return Candidates(self.kind, self.rows[rows], self.features[rows], self.gain[rows])


ROW = np.dtype(
    [
        *((name, np.uint64) for name in ("a", "b", "u", "v")),
        ("box", np.int64, 6),
        ("sides", np.int64, 2),
        ("span", np.int64, 2),
        *((name, np.int64) for name in ("part", "begin", "end", "first", "last")),
    ]
)


def gains(sides: NDArray[np.int64], voxels: int) -> NDArray[np.float64]:
    """Return what the entropy of a volume of `voxels` changes if two sides are joined or parted."""
    a, b = sides[:, 0].astype(np.float64), sides[:, 1].astype(np.float64)
    return ((a + b) * np.log2(a + b) - a * np.log2(a) - b * np.log2(b)) / voxels


@dataclass
class Finder:
    """Makes candidates of the evidence of a run.

    Parameters
    ----------
    evidence
        Entered.
    low, high
        Voxels between which segments lie: a fragment at one of them is at the border.
    voxels
        Labelled voxels of the volume.
    """

    evidence: SegmentEvidence
    low: tuple[int, ...]
    high: tuple[int, ...]
    voxels: int
    fragments: dict[int, NDArray[np.uint64]] = field(default_factory=dict)
    """By part, the fragments in the order of `Cuts`; filled if asked for."""
    trees: list[NDArray[np.uint64]] = field(default_factory=list)
    """Contacts (fragment, fragment) of the trees of each part; filled if asked for."""

    def cuts(
        self, value: Callable[[Candidates], NDArray[np.float64]], *, keep_trees: bool = False
    ) -> list[Candidates]:
        """Return the cuts of each part that differ, those of the highest value of their like."""
        found = []
        for number, part in enumerate(self.evidence.parts()):
            if not len(part.nodes):
                continue
            cuts = find_cuts(part.nodes, part.inside)
            if keep_trees:
                contacts = part.inside[cuts.contact]
                self.fragments[number] = cuts.fragments
                self.trees.append(np.stack((contacts["u"], contacts["v"]), axis=1))
            made = self._of_cuts(cuts, part.inside, number)
            found.append(made.take(distinct(made, value(made))))
        return found

    def sides(self, rows: Sequence[NDArray]) -> list[NDArray[np.uint64]]:
        """Return the fragments of one side of each cut, ascending."""
        found = [np.zeros(0, np.uint64)] * len(rows)
        wanted = {int(row["part"]) for row in rows}
        for number, part in enumerate(self.evidence.parts()) if wanted else ():
            if number in wanted:
                fragments = find_cuts(part.nodes, part.inside).fragments
                for k, row in enumerate(rows):
                    if row["part"] == number:
                        found[k] = np.sort(fragments[row["begin"] : row["end"]])
        return found

    def pairs(self) -> list[Candidates]:
        """Return the pairs of segments that touch."""
        tables = [_pooled(part.between) for part in self.evidence.parts() if len(part.between)]
        segments = self.evidence.segments
        # Best score of each segment, and the best without the pair that has it.
        best = np.full((len(segments.ids), 2), -np.inf)
        for table in tables:
            strength = self._strength(table)
            for end in ("a", "b"):
                raise_best(best, segments.rows(table[end]), strength)
        return [self._of_pairs(table, segments, best) for table in tables]

    def shape(self, boxes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the last four features, of the boxes of the smaller and the larger side."""
        low, high = (np.array(end, np.int64) for end in (self.low, self.high))
        ends = (boxes[..., :3] <= low).sum(axis=-1) + (boxes[..., 3:] >= high).sum(axis=-1)
        begin, end = boxes[..., 0], boxes[..., 3]
        both = np.maximum(end.min(axis=1) - begin.max(axis=1), 0)
        beside = both / np.maximum((end - begin).min(axis=1), 1)
        return np.column_stack((ends, (ends >= 2).all(axis=1), beside))

    def _touching(self, weights: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return voxel pairs of contacts of a weight: as many as one contact of it would have."""
        if self.evidence.thresholds.contact_weight == "sqrt":
            return (weights / ROOTS) ** 2
        return weights.astype(np.float64)

    def _strength(self, table: NDArray) -> NDArray[np.float64]:
        """Return scores as if each contact had some more voxel pairs at the threshold."""
        score = _affinity(table["numerator"], table["denominator"], self.evidence.thresholds.units)
        pairs = self._touching(table["denominator"])
        return score * (pairs / (pairs + _PRIOR))

    def _of_cuts(self, cuts: Cuts, inside: NDArray, part: int) -> Candidates:
        """Return the cuts that leave enough on both sides and part no name or group of edits."""
        units = self.evidence.thresholds.units
        enough = cuts.sides.min(axis=1) >= self.evidence.least
        keep = np.flatnonzero(enough & (cuts.bonds == 0))
        rows = np.zeros(len(keep), ROW)
        contact = inside[cuts.contact[keep]]
        for name in ("a", "b", "u", "v", "box"):
            rows[name] = contact[name]
        sides = cuts.sides[keep]
        rows["sides"], rows["part"] = np.sort(sides, axis=1), part
        for name in ("span", "begin", "end", "first", "last"):
            rows[name] = getattr(cuts, name)[keep]
        order = np.argsort(sides, axis=1, kind="stable")
        boxes = np.take_along_axis(cuts.boxes[keep], order[..., None], axis=1)
        features = np.stack(
            (
                _affinity(cuts.numerator[keep], cuts.denominator[keep], units),
                _affinity(cuts.merge_numerator[keep], cuts.merge_denominator[keep], units),
                np.log(self._touching(cuts.denominator[keep])),
                *np.log(rows["sides"]).T,
                np.log(cuts.pairs[keep]),
                *self.shape(boxes).T,
            ),
            axis=1,
        )
        return Candidates(MERGE, rows, features, gains(rows["sides"], self.voxels))

    def _of_pairs(
        self, table: NDArray, segments: Segments, best: NDArray[np.float64]
    ) -> Candidates:
        place = np.stack([segments.rows(table[end]) for end in ("a", "b")], axis=1)
        voxels = segments.voxels[place]
        swap = voxels[:, 0] > voxels[:, 1]
        place[swap] = place[swap, ::-1]
        voxels = np.sort(voxels, axis=1)
        units = self.evidence.thresholds.units
        strength = self._strength(table)
        other = best[place]  # (n, side, best and second)
        rival = np.where(other[..., 0] == strength[:, None], other[..., 1], other[..., 0])
        ahead = strength[:, None] - np.maximum(rival, -1.0)
        rows = np.zeros(len(table), ROW)
        for name in ("a", "b", "u", "v", "box"):
            rows[name] = table[name]
        rows["sides"] = voxels
        contacts = table["denominator"]
        features = np.stack(
            (
                _affinity(table["numerator"], contacts, units),
                np.log(self._touching(contacts)),
                *np.log(voxels).T,
                contacts / np.maximum(segments.contacts[place[:, 0]], 1),
                *ahead.T,
                *self.shape(segments.boxes[place]).T,
            ),
            axis=1,
        )
        return Candidates(SPLIT, rows, features, gains(voxels, self.voxels))


def _affinity(numerator: Any, denominator: Any, units: int) -> NDArray[np.float64]:
    score: NDArray[np.float64] = numerator / denominator / units
    return score


def raise_best(
    best: NDArray[np.float64], rows: NDArray[np.int64], values: NDArray[np.float64]
) -> None:
    """Enter values into the two best of their rows, (n, 2)."""
    every = np.concatenate([rows, np.repeat(np.unique(rows), 2)])
    both = np.concatenate([values, best[np.unique(rows)].reshape(-1)])
    order = np.lexsort((-both, every))
    every, both = every[order], both[order]
    first = np.flatnonzero(np.concatenate(([True], every[1:] != every[:-1])))
    best[every[first], 0], best[every[first], 1] = both[first], both[first + 1]


def _pooled(between: NDArray) -> NDArray:
    """Add up the contacts of each pair; fragments and box are those of the largest contact."""
    order = np.lexsort((between["u"], -between["denominator"], between["b"], between["a"]))
    rows = between[order]
    new = np.ones(len(rows), bool)
    new[1:] = (rows["a"][1:] != rows["a"][:-1]) | (rows["b"][1:] != rows["b"][:-1])
    first = np.flatnonzero(new)
    pooled = rows[first]
    for name in ("numerator", "denominator"):
        pooled[name] = np.add.reduceat(rows[name], first)
    return pooled


_MOST_CUTS = 50
"""Cuts of one segment that are looked at after the best."""


def distinct(cuts: Candidates, value: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the cuts that are left when each that parts a segment like a better one is dropped.

    Two cuts are alike if the voxels in which they differ are fewer than half of the smaller side.
    """
    taken: dict[int, list[NDArray[np.int64]]] = {}
    kept = []
    spans, wholes = cuts.rows["span"], cuts.rows["sides"].sum(axis=1).tolist()
    segments = cuts.rows["a"].tolist()
    for k in np.argsort(-value, kind="stable").tolist():
        others = taken.setdefault(segments[k], [])
        if len(others) < _MOST_CUTS and not any(
            _alike(spans[k], other, wholes[k]) for other in others
        ):
            others.append(spans[k])
            kept.append(k)
    return np.array(kept, np.int64)


def _alike(one: NDArray[np.int64], other: NDArray[np.int64], whole: int) -> bool:
    """Whether two cuts, spans of the voxels of a segment, part it alike."""
    both = max(0, min(one[1], other[1]) - max(one[0], other[0]))
    sizes = (int(one[1] - one[0]), int(other[1] - other[0]))
    apart = sum(sizes) - 2 * both
    apart = min(apart, whole - apart)
    return bool(2 * apart < min(min(n, whole - n) for n in sizes))
