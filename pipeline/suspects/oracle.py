"""What a truth says of candidates, and what mending them is worth.

A candidate is a true error if mending it lowers the variation of information. The oracle goes
through a list, mends what is a true error and leaves the rest: it parts or joins fragments, and
scores are counted again from the same table of fragments and truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import xlogy

from agq.blockwise.stitch.merge.agglomeration import positions
from agq.pipeline.evaluate.contingency import BlockCounts, Contingency
from agq.pipeline.evaluate.scores import Scores
from agq.pipeline.suspects.candidates import MERGE, Candidates, Finder


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

    def worth(self, candidates: Candidates) -> NDArray[np.float64]:
        """Return by how many bits mending each candidate alone lowers the variation of information.

        A candidate is a true error if that is more than 0.
        """
        if candidates.kind == MERGE:
            sides = [self._sides(row) for row in candidates.rows]
        else:
            ids, index = np.unique(self.segments, return_inverse=True)
            pick = csr_array((np.ones(len(index), np.int64), (index, np.arange(len(index)))))
            whole = (pick @ self.counts).tocsr()
            a, b = (positions(ids, candidates.rows[end]).tolist() for end in ("a", "b"))
            sides = [(_row(whole, i), _row(whole, j)) for i, j in zip(a, b, strict=True)]
        # Parting x and y takes what joining them has added to H(truth | segment), and adds to
        # H(segment | truth) what parting each object does; joining does the reverse.
        bits = [_joined(x.sum(), y.sum()) - 2 * _joined(x, y) for x, y in sides]
        sign = 1 if candidates.kind == MERGE else -1
        return sign * np.array(bits).reshape(-1) / max(self.table.total, 1)

    def _sides(self, row: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the voxels of each object on both sides of a cut."""
        at = self.starts[int(row["part"])]
        begin, end, first, last = (at + int(row[n]) for n in ("begin", "end", "first", "last"))
        inner = np.asarray(self.counts[begin:end].sum(axis=0))
        return inner, np.asarray(self.counts[first:last].sum(axis=0)) - inner


def _row(counts: csr_array, row: int) -> NDArray[np.int64]:
    dense = np.zeros(counts.shape[1], np.int64)
    span = slice(counts.indptr[row], counts.indptr[row + 1])
    dense[counts.indices[span]] = counts.data[span]
    return dense


def _joined(x: Any, y: Any) -> float:
    """Return the sum of n log n of sums less those of the parts."""
    return float(np.sum(xlogy(x + y, x + y) - xlogy(x, x) - xlogy(y, y)) / np.log(2))


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

    def curve(self, fixes: Iterable[tuple[str, int, int] | None]) -> list[float]:
        """Return the variation of information before and after each fix.

        Each is the kind, and the fragments to part or to join; None for what is left as it is. A
        fix that would not lower it any more, after those before it, is left too.
        """
        ids = np.unique(np.concatenate([self.truth.table.segment, self.edges.reshape(-1)]))
        edges = {(int(min(pair)), int(max(pair))) for pair in self.edges}
        values = [self._score(ids, edges)]
        for fix in fixes:
            if fix is None:
                values.append(values[-1])
                continue
            kind, u, v = fix
            pair = {(min(u, v), max(u, v))}
            mended = edges - pair if kind == MERGE else edges | pair
            value = self._score(ids, mended)
            if value < values[-1]:
                edges = mended
            values.append(min(value, values[-1]))
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


def forest(
    found: Finder, owners: tuple[NDArray[np.uint64], NDArray[np.uint64]]
) -> NDArray[np.uint64]:
    """Return contacts that hold all segments of a run together, (n, 2).

    `found` has kept its trees. The fragments of segments that it leaves out are held by pairs that
    need not touch.
    """
    known = np.concatenate([np.zeros(0, np.uint64), *found.fragments.values()])
    ids, segments = owners
    rest = (segments != 0) & ~np.isin(ids, known)
    ids, segments = ids[rest], segments[rest]
    order = np.argsort(segments, kind="stable")
    same = segments[order][1:] == segments[order][:-1]
    chains = np.stack((ids[order][:-1][same], ids[order][1:][same]), axis=1)
    return np.concatenate([np.zeros((0, 2), np.uint64), *found.trees, chains])


def ranked(
    candidates: Sequence[Candidates], values: Sequence[NDArray[np.float64]]
) -> list[tuple[int, int]]:
    """Return (which table, row) of all candidates, the highest value first."""
    flat = np.concatenate([np.zeros(0), *values])
    table = np.repeat(np.arange(len(values)), [len(value) for value in values])
    row = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(value)) for value in values)])
    order = np.argsort(-flat, kind="stable")
    return list(zip(table[order].tolist(), row[order].tolist(), strict=True))
