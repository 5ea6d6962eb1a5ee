"""Scores of a contingency table, and the report of an evaluation.

Variation of information (Meilă 2007): split = H(segment | truth), merge = H(truth | segment), in
bits. Adapted Rand error (Arganda-Carreras et al. 2015): one less the F-score of precision (of the
voxel pairs joined in the segmentation, those joined in the truth) and recall (the reverse).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Group

from agq.blockwise.volumes.triples import Triple, commas, voxel_at
from agq.tables import Tabled
from agq.terminal import WholeTable, facts

if TYPE_CHECKING:
    from agq.pipeline.evaluate.contingency import BlockCounts, Contingency

VARIANTS = {
    "as_is": "as is (predicted 0 is one segment)",
    "background_filled": "predicted 0 filled by the nearest segment within {distance:g} {unit}",
    "background_ignored": "voxels of predicted 0 ignored",
}
"""Name of each way to treat predicted background, and what it means."""

_ROWS = {"as_is": "as is", "background_filled": "filled", "background_ignored": "ignored"}

SHORT = ("split", "merge", "sum", "Rand")
"""Headings of the main scores in tables."""

LEGEND = (
    "split, merge, sum: variation of information in bits, too much cut, too much joined, both; "
    "Rand: adapted Rand error; 0 is best"
)
"""Meaning of these headings."""


def shares(whole: npt.NDArray[np.uint64], count: npt.NDArray[np.int64]) -> tuple[Any, Any]:
    """Return the labels, and what each adds in bits to the conditional entropy of its parts.

    `whole` has the label of each row of a table, its segments for mergers and its truth for splits,
    and `count` the voxels.
    """
    ids, index = np.unique(whole, return_inverse=True)
    sizes = _sums(index, count, len(ids))
    parts = count / count.sum() * np.log2(sizes[index] / count)
    return ids, np.bincount(index, weights=parts, minlength=len(ids))


def _sums(index: Any, count: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    total = np.zeros(n, np.int64)
    np.add.at(total, index, count)
    return total


@dataclass(frozen=True)
class Scores:
    """Figures of one comparison.

    Attributes
    ----------
    voi_split, voi_merge
        Bits; 0 is best.
    adapted_rand_error
        Between 0 (best) and 1.
    rand_precision, rand_recall
        Between 0 and 1 (best); mergers lower the precision, splits the recall.
    """

    voi_split: float
    voi_merge: float
    adapted_rand_error: float
    rand_precision: float
    rand_recall: float

    @property
    def voi_sum(self) -> float:
        """Variation of information in bits."""
        return self.voi_split + self.voi_merge

    def to_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return {**asdict(self), "voi_sum": self.voi_sum}

    @classmethod
    def of(cls, table: Contingency) -> Scores | None:
        """Score a table; None if it has no voxels."""
        if table.total == 0:
            return None
        _, splits = shares(table.truth, table.count)
        _, mergers = shares(table.segment, table.count)
        both = _pairs(table.count)
        in_truth = _pairs(_sums_of(table.truth, table.count))
        in_segments = _pairs(_sums_of(table.segment, table.count))
        ends = in_truth + in_segments
        return cls(
            voi_split=float(splits.sum()),
            voi_merge=float(mergers.sum()),
            adapted_rand_error=1 - 2 * both / ends if ends else 0.0,
            rand_precision=both / in_segments if in_segments else 1.0,
            rand_recall=both / in_truth if in_truth else 1.0,
        )


def scores_of(counts: BlockCounts) -> dict[str, Scores | None]:
    """Score tables in every way of `VARIANTS`."""
    # Reports alone are read without scipy, which is slow to load.
    from agq.pipeline.evaluate.contingency import Contingency

    return {
        "as_is": Scores.of(Contingency.merge([counts.labelled, counts.background])),
        "background_filled": Scores.of(Contingency.merge([counts.labelled, counts.filled])),
        "background_ignored": Scores.of(counts.labelled),
    }


def _sums_of(labels: npt.NDArray[np.uint64], count: npt.NDArray[np.int64]) -> Any:
    ids, index = np.unique(labels, return_inverse=True)
    return _sums(index, count, len(ids))


def _pairs(sizes: npt.NDArray[np.int64]) -> float:
    """Ordered pairs of different voxels of one set; float64, for squares pass 2**63."""
    exact = sizes.astype(np.float64)
    return float(np.sum(exact * (exact - 1)))


@dataclass(frozen=True)
class Disagreement:
    """One segment that merges truth objects, or one truth object that is split.

    Attributes
    ----------
    label
        The segment, or the truth object.
    bits
        What it adds to the merge, or split, entropy.
    parts
        Objects it joins, or segments it is cut into.
    largest
        (label, voxels, world position (z, y, x)) of its largest parts; each position lies inside.
    """

    label: int
    bits: float
    parts: int
    largest: tuple[tuple[int, int, tuple[int, ...]], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON types."""
        largest = [{"label": n, "voxels": v, "at": list(at)} for n, v, at in self.largest]
        return {"label": self.label, "bits": self.bits, "parts": self.parts, "largest": largest}


@dataclass(frozen=True)
class EvaluationReport(Tabled):
    """Scores of a segmentation; the attributes named like `VARIANTS` treat background that way.

    Attributes
    ----------
    offset, shape, voxel_size, unit
        Where: world units, voxels, world units; (z, y, x).
    ignored_border
        Radius in voxels and axes of the border of truth objects that is not scored, and labels
        that are not.
    voxels
        Voxels scored: those whose truth is not 0.
    background
        Share of them whose prediction is 0.
    unfilled
        Share of them with no segment within the fill distance; 0 also when filled.
    fill_distance
        World units.
    truth_objects, segments
        Distinct labels in the scored voxels, without 0.
    as_is, background_filled, background_ignored
        Scores; None where no voxel is left.
    worst_mergers, worst_splits
        Largest first, counted without predicted background.
    reserved
        Scored voxels of each label that often means unlabelled.
    origin
        World position of the first voxel of the segmentation, from which its voxels are counted.
    """

    segmentation: str
    truth: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    voxel_size: tuple[int, ...]
    unit: str
    ignored_border: dict[str, Any]
    voxels: int
    background: float
    unfilled: float
    fill_distance: float
    truth_objects: int
    segments: int
    as_is: Scores | None
    background_filled: Scores | None
    background_ignored: Scores | None
    worst_mergers: list[Disagreement]
    worst_splits: list[Disagreement]
    reserved: dict[str, int] = field(default_factory=dict)
    origin: tuple[int, ...] = (0, 0, 0)

    def scores(self) -> dict[str, Scores | None]:
        """Return the scores by the name of the variant."""
        return {name: getattr(self, name) for name in VARIANTS}

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types."""
        plain = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(self).items()
            if key not in VARIANTS and not key.startswith("worst_")
        }
        return {
            **plain,
            "scores": {
                name: {"meaning": self.meaning(name), **(scores.to_dict() if scores else {})}
                for name, scores in self.scores().items()
            },
            "worst_mergers": [item.to_dict() for item in self.worst_mergers],
            "worst_splits": [item.to_dict() for item in self.worst_splits],
        }

    def summary(self) -> dict[str, Any]:
        """Return the main figures, flat, for a run's record."""
        flat: dict[str, Any] = {"voxels": self.voxels, "background": self.background}
        for name, scores in self.scores().items():
            if scores is not None:
                flat.update({f"{name}.{key}": value for key, value in scores.to_dict().items()})
        return flat

    def meaning(self, variant: str) -> str:
        """Say how a variant treats predicted background."""
        return VARIANTS[variant].format(distance=self.fill_distance, unit=self.unit)

    def voxel(self, item: Disagreement) -> Triple:
        """Return the voxel, counted from the first of the segmentation, where an error shows.

        It lies in the second largest part: in the largest, the segment is right.
        """
        place = item.largest[min(1, len(item.largest) - 1)][2]
        return voxel_at(place, self.voxel_size, self.origin)

    def table(self) -> Group:
        """Return tables for a rich console."""
        border = self.ignored_border
        scored = [
            f"{self.voxels:,} voxels: {self.segments:,} segments, {self.truth_objects:,} objects; "
            f"{self.background:.1%} of them predicted 0"
        ]
        if border["radius"]:
            scored.append(f"{border['radius']} voxels at borders ignored ({border['axes']})")
        if "labels" in border:
            scored.append(f"labels ignored: {', '.join(map(str, border['labels']))}")
        scored += [
            f"as one object: {voxels:,} voxels of label {name}, which often means unlabelled "
            "(--ignore-labels, evaluate.ignore_labels)"
            for name, voxels in self.reserved.items()
        ]
        about = facts(
            "Scores",
            [
                ("segmentation", self.segmentation),
                ("truth", self.truth),
                ("scored", "\n".join(scored)),
            ],
        )
        columns = (*SHORT, "precision", "recall")
        main = WholeTable(
            "",
            ("predicted 0", *columns),
            numbers=columns,
            legend=f"{LEGEND}; precision, recall: of voxel pairs, 1 is best\npredicted 0: as is, "
            f"one segment; filled, by the nearest within {self.fill_distance:g} {self.unit}; "
            "ignored, not scored",
        )
        for name, scores in self.scores().items():
            cells = ["-"] * 6
            if scores is not None:
                row = (scores.voi_split, scores.voi_merge, scores.voi_sum)
                rand = (scores.adapted_rand_error, scores.rand_precision, scores.rand_recall)
                cells = [f"{value:.4f}" for value in (*row, *rand)]
            main.add_row(_ROWS[name], *cells)
        worst = [("merger", self.worst_mergers), ("split", self.worst_splits)]
        return Group(about, main, *(self._worst(kind, items) for kind, items in worst if items))

    def _worst(self, kind: str, items: list[Disagreement]) -> WholeTable:
        """Return the worst errors of a kind, a row for each of the largest parts."""
        whole, part = ("segment", "object") if kind == "merger" else ("object", "segment")
        numbers = (whole, "VOI", "parts", part, "voxels")
        table = WholeTable(
            f"Worst {kind}s",
            (*numbers, "at voxel z,y,x", f"{self.unit} z,y,x"),
            numbers=numbers,
            legend=f"Each {whole}, what it adds to the VOI, how many {part}s it "
            + ("joins" if kind == "merger" else "is cut into")
            + f", and the largest {part}s with a place inside",
        )
        for item in items:
            head = (str(item.label), f"{item.bits:.4f}", str(item.parts))
            for label, voxels, at in item.largest:
                voxel = voxel_at(at, self.voxel_size, self.origin)
                table.add_row(*head, str(label), f"{voxels:,}", commas(voxel), commas(at))
                head = ("", "", "")
        return table
