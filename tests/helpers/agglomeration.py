"""Agglomeration by others: plainly by exact fractions, and by waterz; and graphs to try it on."""

import itertools
import shutil
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from agq.blockwise.blocks.grid import LOCAL_BITS

Row = tuple[int, int, int, int]
"""u, v, numerator, denominator."""

SCORES = [-300, -20, -1, 0, 1, 20, 20, 20, 150]

SCORING = "OneMinus<MeanAffinity<RegionGraphType, ScoreValue>>"

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="waterz compiles its scoring function with g++"
)


def greedy(
    nodes: Iterable[int],
    rows: Iterable[Row],
    classes: Mapping[int, int] | None = None,
    may_merge: Collection[tuple[int, int]] = (),
    together: Collection[tuple[int, int]] = (),
    apart: Collection[tuple[int, int]] = (),
) -> tuple[dict[int, int], list[Row]]:
    """Return node -> smallest node of its cluster, and the merges in order.

    Each merge is searched among all edges. Nodes of different classes, 0 aside, are never in one
    cluster, unless they are one of the pairs that may merge. Pairs ``together`` are in one cluster
    from the outset (no merge is listed for it), and pairs ``apart`` never.
    """
    cluster = {node: node for node in nodes}
    for u, v in together:
        low, high = sorted((cluster[u], cluster[v]))
        cluster = {node: low if root == high else root for node, root in cluster.items()}
    rows = list(rows)

    def forbidden(one: set[int], other: set[int]) -> bool:
        return any(
            c != d and (c, d) not in may_merge and (d, c) not in may_merge
            for c, d in itertools.product(one, other)
        )

    merges = []
    while True:
        held: dict[int, set[int]] = {}
        for node, root in cluster.items():
            held.setdefault(root, set()).update({(classes or {}).get(node, 0)} - {0})
        pooled: dict[tuple[int, int], list] = {}
        for u, v, numerator, denominator in rows:
            a, b = sorted((cluster[u], cluster[v]))
            if a == b:
                continue
            entry = pooled.setdefault((a, b), [0, 0, (u, v)])
            entry[0] += numerator
            entry[1] += denominator
            entry[2] = min(entry[2], (u, v))
        kept_apart = {tuple(sorted((cluster[u], cluster[v]))) for u, v in apart}
        best = min(
            (
                (-Fraction(numerator, denominator), tie, pair)
                for pair, (numerator, denominator, tie) in pooled.items()
                if numerator > 0
                and pair not in kept_apart
                and not forbidden(held[pair[0]], held[pair[1]])
            ),
            default=None,
        )
        if best is None:
            return cluster, merges
        a, b = best[2]
        merges.append((a, b, pooled[a, b][0], pooled[a, b][1]))
        cluster = {node: a if root == b else root for node, root in cluster.items()}


def greedy_pooled(nodes: Iterable[int], rows: Iterable[Row]) -> tuple[dict[int, int], list[Row]]:
    """Return the same as `greedy`, quicker: parallel edges are pooled when they become so."""
    cluster = {node: node for node in nodes}
    edges: dict[tuple[int, int], list] = {}

    def add(a: int, b: int, numerator: int, denominator: int, tie: tuple[int, int]) -> None:
        entry = edges.setdefault((min(a, b), max(a, b)), [0, 0, tie, None])
        entry[0] += numerator
        entry[1] += denominator
        entry[2] = min(entry[2], tie)
        entry[3] = -Fraction(entry[0], entry[1])

    for u, v, numerator, denominator in rows:
        add(u, v, numerator, denominator, (u, v))
    merges = []
    while True:
        best = min(
            ((score, tie, pair) for pair, (n, _, tie, score) in edges.items() if n > 0),
            default=None,
        )
        if best is None:
            return cluster, merges
        a, b = best[2]
        merges.append((a, b, *edges.pop((a, b))[:2]))
        for pair in [pair for pair in edges if b in pair]:
            numerator, denominator, tie, _ = edges.pop(pair)
            add(a, pair[0] + pair[1] - b, numerator, denominator, tie)
        cluster = {node: a if root == b else root for node, root in cluster.items()}


def by_waterz(fragments, affinities, border, bins=0):
    """Apply the published rule as published: thresholds by a shift of the affinities."""
    import waterz

    _, dense = np.unique(fragments, return_inverse=True)
    dense = np.where(fragments > 0, dense.reshape(fragments.shape) + 1, 0).astype(np.uint64)
    shifted = np.ascontiguousarray((affinities + 0.3 * border) / 2, dtype=np.float32)
    # waterz works in place and yields the same array for every threshold.
    return next(
        waterz.agglomerate(
            shifted, [0.5], fragments=dense, scoring_function=SCORING, discretize_queue=bins
        )
    ).copy()


@st.composite
def block_graphs(draw):
    """Fragments of a few blocks; contacts inside a block or across a face, often of equal score."""
    shape = draw(
        st.tuples(*[st.integers(1, 4)] * 3).filter(lambda s: 2 <= s[0] * s[1] * s[2] <= 16)
    )
    blocks = list(np.ndindex(shape))
    counts = draw(st.lists(st.integers(0, 3), min_size=len(blocks), max_size=len(blocks)))
    nodes = {
        place: [(int(np.ravel_multi_index(place, shape)) << LOCAL_BITS) | (i + 1) for i in range(n)]
        for place, n in zip(blocks, counts, strict=True)
    }
    pairs = []
    for place in blocks:
        pairs += itertools.combinations(nodes[place], 2)
        for axis in range(3):
            other = tuple(p + (d == axis) for d, p in enumerate(place))
            pairs += itertools.product(nodes[place], nodes.get(other, []))
    score = st.tuples(st.sampled_from(SCORES), st.sampled_from([1, 1, 2, 3]))
    chosen = draw(
        st.lists(st.one_of(st.none(), score, score), min_size=len(pairs), max_size=len(pairs))
    )
    rows = [
        (u, v, s[0] * s[1] if s[0] != 150 else 150, s[1])
        for (u, v), s in zip(pairs, chosen, strict=True)
        if s is not None
    ]
    leaf = draw(st.tuples(*[st.integers(1, 4)] * 3))
    return shape, leaf, [n for own in nodes.values() for n in own], rows
