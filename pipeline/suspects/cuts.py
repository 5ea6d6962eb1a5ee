"""Places where a segment may be cut in two.

The fragments of a segment were joined by merges, best first. Of each merge, the contact with the
most evidence is kept; these contacts are a tree, and each cuts the segment in two. All contacts
between its two sides count for or against the cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from agq.blockwise.stitch.merge.agglomeration import Graph, ScoreTable, contract, positions


@dataclass(frozen=True)
class Cuts:
    """One row for each cut.

    Attributes
    ----------
    fragments
        Ids of all fragments: each cut parts those from ``begin`` to ``end`` from the others of
        ``first`` to ``last``, rows of this array.
    begin, end, first, last
        See above.
    contact
        Row of the contact that is cut.
    sides
        Voxels of the part ``begin`` to ``end``, and of the rest, (n, 2).
    span
        ``begin`` and ``end`` in voxels: of all fragments before them, (n, 2).
    numerator, denominator, pairs
        Score of all contacts between both sides, and how many pairs of fragments touch.
    merge_numerator, merge_denominator
        Score of the merge.
    boxes
        Bounding box of each side, (n, 2, 6).
    bonds
        How many bonds it would break (`evidence.bonds`).
    """

    fragments: NDArray[np.uint64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    contact: NDArray[np.int64]
    sides: NDArray[np.int64]
    span: NDArray[np.int64]
    numerator: NDArray[np.int64]
    denominator: NDArray[np.int64]
    pairs: NDArray[np.int64]
    merge_numerator: NDArray[np.int64]
    merge_denominator: NDArray[np.int64]
    boxes: NDArray[np.int64]
    bonds: NDArray[np.int64]


def find_cuts(nodes: NDArray, inside: NDArray) -> Cuts:
    """Return all cuts of some segments.

    Parameters
    ----------
    nodes, inside
        Fragments and contacts of whole segments (`evidence.Part`), fragments ascending.
    """
    ids = np.ascontiguousarray(nodes["id"])
    order = np.lexsort((inside["v"], inside["u"]))
    scored = inside[order]
    table = ScoreTable(*(np.ascontiguousarray(scored[n]) for n in ScoreTable.names()))
    # The contraction uses up the table that it is given.
    merges, _ = contract(Graph.of_fragments(ids, table.take(slice(None))))
    u, v = positions(ids, scored["u"]), positions(ids, scored["v"])
    numerator, denominator = scored["numerator"].copy(), scored["denominator"].copy()
    edge = _strongest(len(ids), positions(ids, merges.u), positions(ids, merges.v), u, v, numerator)
    start, parent, merge = _preorder(len(ids), u[edge], v[edge])
    size = _subtree(start, parent, np.ones(len(ids), np.int64))
    voxels = _subtree(start, parent, nodes["voxels"].astype(np.int64))
    crossing = _crossing(start, parent, u, v, numerator, denominator)
    bound = scored["bound"]
    broken = _crossing(start, parent, u[bound], v[bound], numerator[bound], denominator[bound])
    root = _roots(start, parent)
    cut = start[merge[start] >= 0]
    place = np.empty(len(ids), np.int64)
    place[start] = np.arange(len(ids))
    before = np.concatenate(([0], np.cumsum(nodes["voxels"][start])))
    kept, top = merge[cut], root[cut]
    return Cuts(
        fragments=ids[start],
        begin=place[cut],
        end=place[cut] + size[cut],
        first=place[top],
        last=place[top] + size[top],
        contact=order[edge[kept]],
        sides=np.stack((voxels[cut], voxels[top] - voxels[cut]), axis=1),
        span=before[np.stack((place[cut], place[cut] + size[cut]), axis=1)],
        numerator=crossing[cut, 0],
        denominator=crossing[cut, 1],
        pairs=crossing[cut, 2],
        merge_numerator=merges.numerator[kept],
        merge_denominator=merges.denominator[kept],
        boxes=_boxes(nodes["box"][start], start, parent, place, cut, top, size),
        bonds=broken[cut, 2],
    )


@numba.njit(cache=True)
def _find(home: Any, node: int) -> int:
    while home[node] != node:
        home[node] = home[home[node]]
        node = home[node]
    return node


@numba.njit(cache=True)
def _strongest(n: int, mu: Any, mv: Any, u: Any, v: Any, evidence: Any) -> Any:
    """Return, of each merge, the contact between both clusters with the most evidence."""
    edges = len(u)
    home = np.arange(n)
    # Lists of half-edges of each cluster; the shorter one is walked through and then joined.
    head, tail = np.full(n, -1), np.full(n, -1)
    length = np.zeros(n, np.int64)
    following = np.full(2 * edges, -1)
    for half in range(2 * edges):
        node = u[half // 2] if half % 2 == 0 else v[half // 2]
        following[half] = head[node]
        if head[node] < 0:
            tail[node] = half
        head[node] = half
        length[node] += 1
    best = np.full(len(mu), -1)
    for k in range(len(mu)):
        a, b = _find(home, mu[k]), _find(home, mv[k])
        if length[a] > length[b]:
            a, b = b, a
        half = head[a]
        while half >= 0:
            edge = half // 2
            other = v[edge] if half % 2 == 0 else u[edge]
            if _find(home, other) == b and (
                best[k] < 0
                or evidence[edge] > evidence[best[k]]
                or (evidence[edge] == evidence[best[k]] and edge < best[k])
            ):
                best[k] = edge
            half = following[half]
        home[a] = b
        if head[a] >= 0:
            following[tail[a]] = head[b]
            if head[b] < 0:
                tail[b] = tail[a]
            head[b] = head[a]
        length[b] += length[a]
    return best


@numba.njit(cache=True)
def _preorder(n: int, u: Any, v: Any) -> Any:
    """Return the nodes of a forest in preorder, their parents, and the edge to each parent."""
    degree = np.zeros(n + 1, np.int64)
    for e in range(len(u)):
        degree[u[e] + 1] += 1
        degree[v[e] + 1] += 1
    first = np.cumsum(degree)
    filled = first.copy()
    beside = np.empty(2 * len(u), np.int64)
    for e in range(len(u)):
        for node in (u[e], v[e]):
            beside[filled[node]] = e
            filled[node] += 1
    start = np.empty(n, np.int64)
    parent, edge = np.full(n, -1), np.full(n, -1)
    seen = np.zeros(n, np.bool_)
    stack = np.empty(n, np.int64)
    at = 0
    for root in range(n):
        if seen[root]:
            continue
        seen[root] = True
        stack[0] = root
        depth = 1
        while depth > 0:
            depth -= 1
            node = stack[depth]
            start[at] = node
            at += 1
            for k in range(first[node], first[node + 1]):
                e = beside[k]
                other = v[e] if u[e] == node else u[e]
                if not seen[other]:
                    seen[other] = True
                    parent[other], edge[other] = node, e
                    stack[depth] = other
                    depth += 1
    return start, parent, edge


@numba.njit(cache=True)
def _subtree(start: Any, parent: Any, values: Any) -> Any:
    total = values.copy()
    for k in range(len(start) - 1, -1, -1):
        node = start[k]
        if parent[node] >= 0:
            total[parent[node]] += total[node]
    return total


@numba.njit(cache=True)
def _roots(start: Any, parent: Any) -> Any:
    root = np.empty(len(start), np.int64)
    for node in start:
        root[node] = node if parent[node] < 0 else root[parent[node]]
    return root


@numba.njit(cache=True)
def _crossing(start: Any, parent: Any, u: Any, v: Any, numerator: Any, denominator: Any) -> Any:
    """Return numerator, denominator and number of the contacts that leave each subtree."""
    depth, root = np.zeros(len(start), np.int64), _roots(start, parent)
    for node in start:
        if parent[node] >= 0:
            depth[node] = depth[parent[node]] + 1
    total = np.zeros((len(start), 3), np.int64)
    for k in range(len(u)):
        a, b = u[k], v[k]
        if root[a] != root[b]:
            continue  # between two trees: on no side of a cut
        # Contacts are between neighbours, so their paths through the tree are short.
        while a != b:
            if depth[a] < depth[b]:
                a, b = b, a
            total[a, 0] += numerator[k]
            total[a, 1] += denominator[k]
            total[a, 2] += 1
            a = parent[a]
    return total


@numba.njit(cache=True)
def _boxes(boxes: Any, start: Any, parent: Any, place: Any, cut: Any, root: Any, size: Any) -> Any:
    """Return the bounding boxes of the subtree of each cut, and of the rest of its tree.

    Boxes and sizes are those of nodes in preorder, so what is not in a subtree is before or after.
    """
    n = len(boxes)
    low = boxes.copy()
    low[:, 3:] = -low[:, 3:]  # then all are minima
    before, after, below = low.copy(), low.copy(), low.copy()
    ends = np.zeros(n + 1, np.bool_)
    for k in range(n):
        if parent[start[k]] < 0:
            ends[k] = True
        else:
            before[k] = np.minimum(before[k], before[k - 1])
    ends[n] = True
    for k in range(n - 2, -1, -1):
        if not ends[k + 1]:
            after[k] = np.minimum(after[k], after[k + 1])
    for k in range(n - 1, -1, -1):
        if not ends[k]:
            above = place[parent[start[k]]]
            below[above] = np.minimum(below[above], below[k])
    out = np.empty((len(cut), 2, 6), np.int64)
    for k in range(len(cut)):
        begin = place[cut[k]]
        end = begin + size[cut[k]]
        out[k, 0] = below[begin]
        out[k, 1] = before[begin - 1]
        if end < place[root[k]] + size[root[k]]:
            out[k, 1] = np.minimum(out[k, 1], after[end])
    out[:, :, 3:] = -out[:, :, 3:]
    return out
