"""Greedy agglomeration as plainly as it can be said: exact fractions, a full search each time."""

from collections.abc import Iterable
from fractions import Fraction

Row = tuple[int, int, int, int]
"""u, v, numerator, denominator."""


def greedy(nodes: Iterable[int], rows: Iterable[Row]) -> tuple[dict[int, int], list[Row]]:
    """Return node -> smallest node of its cluster, and the merges in order."""
    cluster = {node: node for node in nodes}
    rows = list(rows)
    merges = []
    while True:
        pooled: dict[tuple[int, int], list] = {}
        for u, v, numerator, denominator in rows:
            a, b = sorted((cluster[u], cluster[v]))
            if a == b:
                continue
            entry = pooled.setdefault((a, b), [0, 0, (u, v)])
            entry[0] += numerator
            entry[1] += denominator
            entry[2] = min(entry[2], (u, v))
        best = min(
            (
                (-Fraction(numerator, denominator), tie, pair)
                for pair, (numerator, denominator, tie) in pooled.items()
                if numerator > 0
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
