"""What a truth says of candidates, and what mending them is worth.

A cut is a true error if the truth objects that most voxels of its two sides have differ; a pair of
segments is one if they are the same. The oracle goes through a list, mends what is a true error
and leaves the rest: it parts or joins fragments, and scores are counted again from the same table
of fragments and truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from agq.blockwise.stitch.merge.agglomeration import positions
from agq.pipeline.evaluate.contingency import BlockCounts, Contingency
from agq.pipeline.evaluate.scores import Scores
from agq.pipeline.suspects.candidates import MERGE, Candidates


@dataclass(frozen=True)
class Truth:
    """Fragments of a run against a truth.

    Attributes
    ----------
    fragments
        Ids in the order of the cuts of all parts, one part after the other.
    starts
        Row of the first fragment of each part.
    segments
        Segment of each fragment.
    counts
        Voxels of each fragment (rows) in each truth object.
    table
        The same as it is scored: predicted 0 filled.
    """

    fragments: NDArray[np.uint64]
    starts: dict[int, int]
    segments: NDArray[np.uint64]
    counts: csr_array
    table: Contingency

    @classmethod
    def of(
        cls,
        parts: dict[int, NDArray[np.uint64]],
        owners: tuple[NDArray[np.uint64], NDArray[np.uint64]],
        counts: BlockCounts,
    ) -> Truth:
        """Arrange counts of fragments (`fragment_counts`) by the fragments of cuts.

        `owners` are all fragments of the run, ascending, and the segment of each.
        """
        fragments = np.concatenate([np.zeros(0, np.uint64), *parts.values()])
        sizes = np.cumsum([0, *(len(part) for part in parts.values())]).tolist()
        table = Contingency.merge([counts.labelled, counts.filled])
        order = np.argsort(fragments, kind="stable")
        place = np.searchsorted(fragments[order], table.segment)
        listed = place < len(fragments)
        listed[listed] = fragments[order[place[listed]]] == table.segment[listed]
        objects, column = np.unique(table.truth, return_inverse=True)
        rows = (table.count[listed], (order[place[listed]], column[listed]))
        ids, segments = owners
        return cls(
            fragments,
            dict(zip(parts, sizes, strict=False)),
            segments[positions(ids, fragments)],
            csr_array(rows, shape=(len(fragments), len(objects))),
            table,
        )

    def wrong(self, candidates: Candidates) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Tell which candidates are true errors, and of which the truth knows both sides."""
        if candidates.kind == MERGE:
            both = np.array([self._sides(row) for row in candidates.rows]).reshape(-1, 2)
            return self._judged(both[:, 0] != both[:, 1], both)
        ids, index = np.unique(self.segments, return_inverse=True)
        pick = csr_array((np.ones(len(index)), (index, np.arange(len(index)))))
        main = _majority((pick @ self.counts).tocsr())
        both = np.stack([main[positions(ids, candidates.rows[end])] for end in ("a", "b")], axis=1)
        return self._judged(both[:, 0] == both[:, 1], both)

    @staticmethod
    def _judged(
        wrong: NDArray[np.bool_], objects: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        known: NDArray[np.bool_] = np.all(objects >= 0, axis=1)
        return known & wrong, known

    def _sides(self, row: NDArray) -> tuple[int, int]:
        """Return the object that most voxels of each side of a cut have; -1 for none."""
        at = self.starts[int(row["part"])]
        begin, end, first, last = (at + int(row[n]) for n in ("begin", "end", "first", "last"))
        inner = self.counts[begin:end].sum(axis=0)
        outer = self.counts[first:last].sum(axis=0) - inner
        one, other = (int(side.argmax()) if side.any() else -1 for side in (inner, outer))
        return one, other


def _majority(counts: csr_array) -> NDArray[np.int64]:
    """Return the column of the largest entry of each row; -1 for a row without any."""
    filled = np.diff(counts.indptr) > 0
    return np.where(filled, np.asarray(counts.argmax(axis=1)).reshape(-1), -1)


@dataclass
class Oracle:
    """Mends true errors in the order of a list.

    Parameters
    ----------
    truth
        What it knows.
    edges
        Contacts (fragment, fragment) that hold the segments together, (n, 2): a forest.
    """

    truth: Truth
    edges: NDArray[np.uint64]

    def curve(self, fixes: Iterable[tuple[str, int, int]]) -> list[float]:
        """Return the variation of information before and after each fix.

        Each is the kind, and the fragments to part or to join.
        """
        ids = np.unique(np.concatenate([self.truth.table.segment, self.edges.reshape(-1)]))
        edges = {(int(u), int(v)) for u, v in self.edges}
        values = [self._score(ids, edges)]
        for kind, u, v in fixes:
            pair = (min(u, v), max(u, v))
            if kind == MERGE:
                edges.discard(pair)
            else:
                edges.add(pair)
            values.append(self._score(ids, edges))
        return values

    def _score(self, ids: NDArray[np.uint64], edges: set[tuple[int, int]]) -> float:
        ends = np.array(sorted(edges), np.uint64).reshape(-1, 2)
        u, v = positions(ids, ends[:, 0]), positions(ids, ends[:, 1])
        graph = csr_array((np.ones(len(u), np.int8), (u, v)), shape=(len(ids), len(ids)))
        _, label = connected_components(graph, directed=False)
        segments = (label + 1).astype(np.uint64)
        segments[ids == 0] = 0
        scores = Scores.of(self.truth.table.with_segments(ids, segments))
        return float("nan") if scores is None else scores.voi_sum


def ranked(
    candidates: Sequence[Candidates], values: Sequence[NDArray[np.float64]]
) -> list[tuple[int, int]]:
    """Return (which table, row) of all candidates, the highest value first."""
    flat = np.concatenate([np.zeros(0), *values])
    table = np.repeat(np.arange(len(values)), [len(value) for value in values])
    row = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(value)) for value in values)])
    order = np.argsort(-flat, kind="stable")
    return list(zip(table[order].tolist(), row[order].tolist(), strict=True))
