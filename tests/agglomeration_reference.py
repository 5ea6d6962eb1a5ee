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
