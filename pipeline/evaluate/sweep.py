"""Scores of many agglomeration thresholds from one count of fragments against the truth.

Joining fragments only renames rows of the contingency table, so a threshold costs milliseconds and
no volume is written. Predicted background is filled by the nearest fragment, and small segments
are kept: with `stitch.min_size` the final figures differ slightly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from agq.blockwise.stitch.classes import Kinds
from agq.blockwise.stitch.contacts import Evidence
from agq.blockwise.stitch.merge.agglomeration import Agglomeration, agglomerate, positions
from agq.blockwise.stitch.merge.kernel import connected_components
from agq.blockwise.stitch.settings import Thresholds, exact
from agq.pipeline.evaluate.contingency import BlockCounts
from agq.pipeline.evaluate.scores import LEGEND, SHORT, Scores, scores_of
from agq.terminal import WholeTable

Ids = npt.NDArray[np.uint64]
Criterion = Literal["voi_sum", "adapted_rand_error"]

_THRESHOLDS = ("across", "within", "affinity")
"""Names of thresholds, as settings and as headings."""

COLUMNS = ("voi_split", "voi_merge", "voi_sum", "adapted_rand_error")


@dataclass(frozen=True)
class Point:
    """One setting and what it scores.

    Attributes
    ----------
    setting
        Thresholds by name, as affinities.
    scores
        By the names of `agq.pipeline.evaluate.scores.VARIANTS`.
    """

    method: str
    setting: dict[str, float]
    segments: int
    scores: dict[str, Scores | None]

    def value(self, criterion: Criterion) -> float:
        """Return what a search minimises: of the scores with background filled."""
        filled = self.scores["background_filled"]
        return float("inf") if filled is None else float(getattr(filled, criterion))

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON types."""
        return {
            "method": self.method,
            "setting": self.setting,
            "segments": self.segments,
            "scores": {n: s.to_dict() if s else None for n, s in self.scores.items()},
        }

    def row(self) -> list[str]:
        """Return cells for a table: scores with background filled, and the Rand error as is."""
        thresholds = [self.setting.get(name) for name in _THRESHOLDS]
        filled, as_is = self.scores["background_filled"], self.scores["as_is"]
        cells = [f"{getattr(filled, name):.4f}" if filled else "-" for name in COLUMNS]
        return [
            self.method,
            *("" if value is None else f"{value:g}" for value in thresholds),
            str(self.segments),
            *cells,
            f"{as_is.adapted_rand_error:.4f}" if as_is else "-",
        ]


def points_table(points: Iterable[Point], title: str) -> WholeTable:
    """Return a table for a rich console, one row per point."""
    numbers = (*_THRESHOLDS, "segments", *SHORT, "as is")
    table = WholeTable(
        title,
        ("method", *numbers),
        numbers=numbers,
        legend=f"{LEGEND}; predicted 0 is filled, but one segment in the last column (Rand as is)",
    )
    for point in points:
        table.add_row(*point.row())
    return table


def best(points: Sequence[Point], criterion: Criterion = "voi_sum") -> Point:
    """Return the point with the lowest criterion, the first of equals."""
    return min(points, key=lambda point: point.value(criterion))


def point(
    method: str, setting: dict[str, float], counts: BlockCounts, ids: Ids, segments: Ids
) -> Point:
    """Score fragments joined to segments (`ids` sorted, `segments` in the same order)."""
    scores = scores_of(counts.with_segments(ids, segments))
    return Point(method, setting, len(np.unique(segments)), scores)


def two_thresholds(
    method: str,
    counts: BlockCounts,
    evidence: Evidence,
    across: Iterable[float],
    within: Iterable[float],
    kinds: Kinds | None = None,
    base: Thresholds | None = None,
) -> list[Point]:
    """Agglomerate evidence with every pair of thresholds and score each.

    What else contacts must show is taken from `base`, but for its margin.
    """
    points = []
    for w in within:
        for a in across:
            thresholds = thresholds_of(base, across=a, within=w)
            result = agglomerate(
                evidence.nodes.ids, evidence.contacts, thresholds, kinds, names=evidence.names
            )
            setting = {"across": a, "within": w}
            points.append(point(method, setting, counts, result.ids, result.representatives))
    return points


def thresholds_of(base: Thresholds | None, **values: Any) -> Thresholds:
    """Return the thresholds of some settings with other values, without a margin."""
    fields = {} if base is None else {n: getattr(base, n) for n in Thresholds.model_fields}
    return Thresholds(**{**fields, "margin": 0.0, **values})


MOST_ROUNDS: Final = 4
"""How often a search goes on beyond its edge: at steps of 0.1 that is all there is."""

_BEYOND: Final = 3
"""Values that each round adds at an edge."""


@dataclass(frozen=True)
class Search:
    """What a search for two thresholds has tried.

    Attributes
    ----------
    points
        One for each pair of `across` and `within`, the best first.
    across, within
        Values tried, ascending.
    rounds
        How often the search went on beyond its edge.
    """

    points: tuple[Point, ...]
    across: tuple[float, ...]
    within: tuple[float, ...]
    rounds: int = 0

    @property
    def best(self) -> Point:
        """The best pair."""
        return self.points[0]

    def beyond(self) -> dict[str, tuple[float, ...]]:
        """Return, by threshold, values to try beyond the edge on which the best pair lies.

        Empty if it lies on none. A threshold of which a single value was tried has no edge, nor
        has 0 or 1.
        """
        found = {}
        for name in ("across", "within"):
            tried = getattr(self, name)
            if len(tried) < 2:
                continue
            for edge, inner in ((tried[0], tried[1]), (tried[-1], tried[-2])):
                steps = (round(edge + k * (edge - inner), 4) for k in range(1, _BEYOND + 1))
                values = tuple(sorted({min(1.0, max(0.0, value)) for value in steps} - {edge}))
                if self.best.setting[name] == edge and values:
                    found[name] = values
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON types."""
        return {
            "best": self.best.to_dict(),
            "edges": sorted(self.beyond()),
            "points": [item.to_dict() for item in self.points],
        }


def search_pairs(
    score: Callable[[Sequence[float], Sequence[float]], Iterable[Point]],
    across: Iterable[float],
    within: Iterable[float],
    criterion: Criterion = "voi_sum",
    rounds: int = 0,
) -> Search:
    """Score all pairs of thresholds, and go on where the best lies on an edge.

    Parameters
    ----------
    score
        Scores all pairs of some values, see `two_thresholds`.
    across, within
        Values to begin with.
    criterion
        Score that is minimised.
    rounds
        How often to go on at most.
    """
    tried = {"across": tuple(sorted(set(across))), "within": tuple(sorted(set(within)))}
    points = list(score(tried["across"], tried["within"]))
    for done in range(rounds + 1):
        points.sort(key=lambda item: item.value(criterion))
        search = Search(tuple(points), **tried, rounds=done)
        more = search.beyond() if done < rounds else {}
        if not more:
            break
        for name, values in more.items():
            new = tried | {name: values}
            points += score(new["across"], new["within"])
            tried[name] = tuple(sorted({*tried[name], *values}))
    return search


def one_threshold(
    method: str, counts: BlockCounts, evidence: Evidence, thresholds: Sequence[float]
) -> list[Point]:
    """Agglomerate by the mean affinity of all contacts of a pair, at several thresholds.

    With one threshold for all contacts a higher one cuts the same dendrogram earlier, so the
    agglomeration runs once.
    """
    lowest = Thresholds(across=min(thresholds), within=min(thresholds))
    whole = agglomerate(evidence.nodes.ids, evidence.contacts, lowest, names=evidence.names)
    return [
        point(method, {"affinity": t}, counts, whole.ids, cut(whole, lowest, t)) for t in thresholds
    ]


def cut(whole: Agglomeration, lowest: Thresholds, threshold: float) -> Ids:
    """Return what an agglomeration at a higher threshold gives: a segment per fragment.

    `lowest` is the threshold that the whole was made at, the same for both classes of contacts.
    """
    raised = (exact(threshold) - exact(lowest.across)) * lowest.units
    merges, ids = whole.merges.above(raised), whole.ids
    roots = connected_components(len(ids), positions(ids, merges.u), positions(ids, merges.v))
    return ids[roots]
