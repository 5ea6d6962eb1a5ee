"""Compiled core of the agglomeration: an indexed heap, edge lists and a hash of live edges.

Nodes are dense indices in the order of fragment ids, so comparing indices compares ids. The best
edge of all is the best one of both its ends. If one of them must not merge, the other has to wait
for it, which is the same as being frozen itself: its best edge can only be beaten by one that was
better before. An edge
keeps its row for life: pooling adds one row into another and kills it. All arrays are allocated
before the loop and never grow. Half-edge ``2 e`` lies in the list of the first end of edge ``e``,
``2 e + 1`` in that of the second; dead ones are dropped when their list is walked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from blockwise.errors import InputError

_MIX = np.uint64(0x9E3779B97F4A7C15)
_EXACT_FLOAT = 2**52
_LARGEST_SUM = 2**62
_EXACT_PRODUCT = 2**31
_ABSENT = -1
_DEAD = -2


@numba.njit(cache=True, nogil=True)
def compare_fractions(n1, d1, n2, d2):  # type: ignore[no-untyped-def]
    """Return the sign of ``n1 / d1 - n2 / d2`` for positive int64, without overflow.

    Large operands are compared by their continued fractions (Euclid), so that no product is
    formed: sums over 10^12 voxels would need 128 bits.
    """
    if max(max(n1, d1), max(n2, d2)) < _EXACT_PRODUCT:
        left, right = n1 * d2, n2 * d1
        return 1 if left > right else (-1 if left < right else 0)
    sign = 1
    while True:
        q1, q2 = n1 // d1, n2 // d2
        if q1 != q2:
            return sign if q1 > q2 else -sign
        r1, r2 = n1 - q1 * d1, n2 - q2 * d2
        if r1 == 0 or r2 == 0:
            if r1 == r2:
                return 0
            return sign if r1 > 0 else -sign
        # r1 / d1 > r2 / d2 exactly if d1 / r1 < d2 / r2.
        n1, d1, n2, d2 = d1, r1, d2, r2
        sign = -sign


@numba.njit(cache=True, nogil=True)
def _better(a, b, num, den, quick, key, floats):  # type: ignore[no-untyped-def]
    # Correctly rounded quotients of exactly represented integers never swap: only when they are
    # equal do the fractions have to be compared.
    if floats and quick[a] != quick[b]:
        return quick[a] > quick[b]
    sign = compare_fractions(num[a], den[a], num[b], den[b])
    if sign != 0:
        return sign > 0
    return key[a] < key[b]


@numba.njit(cache=True, nogil=True)
def _up(heap, place, i, num, den, quick, key, floats):  # type: ignore[no-untyped-def]
    edge = heap[i]
    while i > 0:
        parent = (i - 1) >> 1
        other = heap[parent]
        if not _better(edge, other, num, den, quick, key, floats):
            break
        heap[i] = other
        place[other] = i
        i = parent
    heap[i] = edge
    place[edge] = i
    return i


@numba.njit(cache=True, nogil=True)
def _down(heap, place, size, i, num, den, quick, key, floats):  # type: ignore[no-untyped-def]
    edge = heap[i]
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        right = child + 1
        if right < size and _better(heap[right], heap[child], num, den, quick, key, floats):
            child = right
        other = heap[child]
        if not _better(other, edge, num, den, quick, key, floats):
            break
        heap[i] = other
        place[other] = i
        i = child
    heap[i] = edge
    place[edge] = i


@numba.njit(cache=True, nogil=True)
def _remove(heap, place, size, edge, num, den, quick, key, floats):  # type: ignore[no-untyped-def]
    """Take an edge out of the heap; return the new size."""
    i = place[edge]
    place[edge] = _ABSENT
    size -= 1
    if i != size:
        heap[i] = heap[size]
        i = _up(heap, place, i, num, den, quick, key, floats)
        _down(heap, place, size, i, num, den, quick, key, floats)
    return size


@numba.njit(cache=True, nogil=True)
def _home(pair, mask):  # type: ignore[no-untyped-def]
    mixed = np.uint64(pair) * _MIX
    return np.int64((mixed ^ (mixed >> np.uint64(32))) & np.uint64(mask))


@numba.njit(cache=True, nogil=True)
def _pair(a, b):  # type: ignore[no-untyped-def]
    low, high = np.int64(min(a, b)), np.int64(max(a, b))
    return (low << 32) | high


@numba.njit(cache=True, nogil=True)
def _find(pairs, pair):  # type: ignore[no-untyped-def]
    """Return the slot of a pair, or the empty slot where it would go."""
    mask = pairs.size - 1
    slot = _home(pair, mask)
    while pairs[slot] != pair and pairs[slot] >= 0:
        slot = (slot + 1) & mask
    return slot


@numba.njit(cache=True, nogil=True)
def _delete(pairs, edges, slot):  # type: ignore[no-untyped-def]
    """Empty a slot and move later entries back, so that probing never meets a gap."""
    mask = pairs.size - 1
    hole = slot
    slot = (slot + 1) & mask
    while pairs[slot] >= 0:
        home = _home(pairs[slot], mask)
        if ((slot - home) & mask) >= ((slot - hole) & mask):
            pairs[hole] = pairs[slot]
            edges[hole] = edges[slot]
            hole = slot
        slot = (slot + 1) & mask
    pairs[hole] = _ABSENT


@numba.njit(cache=True, nogil=True)
def _run(  # type: ignore[no-untyped-def]
    first, second, num, den, quick, key, floats, heap, place, heads, nexts, degree, pairs, edges,
    parent, smallest, frozen, merges,
):  # fmt: skip
    n_edges = first.size
    size = 0
    for edge in range(n_edges):
        place[edge] = _ABSENT
        a, b = first[edge], second[edge]
        nexts[2 * edge], heads[a] = heads[a], 2 * edge
        nexts[2 * edge + 1], heads[b] = heads[b], 2 * edge + 1
        degree[a] += 1
        degree[b] += 1
        slot = _find(pairs, _pair(a, b))
        pairs[slot] = _pair(a, b)
        edges[slot] = edge
        if num[edge] > 0:
            heap[size] = edge
            place[edge] = size
            size += 1
    for i in range(size // 2 - 1, -1, -1):
        _down(heap, place, size, i, num, den, quick, key, floats)

    merged = 0
    while size > 0:
        best = heap[0]
        size = _remove(heap, place, size, best, num, den, quick, key, floats)
        a, b = first[best], second[best]
        if frozen[a] or frozen[b]:
            frozen[a] = frozen[b] = True
            continue
        if degree[a] > degree[b]:
            a, b = b, a
        low, high = min(smallest[a], smallest[b]), max(smallest[a], smallest[b])
        merges[merged, 0], merges[merged, 1] = low, high
        merges[merged, 2], merges[merged, 3] = num[best], den[best]
        merged += 1
        parent[a] = b
        smallest[b] = low
        _delete(pairs, edges, _find(pairs, _pair(a, b)))
        place[best] = _DEAD
        degree[b] -= 1

        # Hand the edges of a, the end with fewer, over to b.
        half = heads[a]
        while half >= 0:
            following = nexts[half]
            edge = half >> 1
            if place[edge] != _DEAD:
                other = first[edge] if half & 1 else second[edge]
                _delete(pairs, edges, _find(pairs, _pair(a, other)))
                slot = _find(pairs, _pair(b, other))
                if pairs[slot] >= 0:
                    kept = edges[slot]
                    if place[edge] >= 0:
                        size = _remove(heap, place, size, edge, num, den, quick, key, floats)
                    place[edge] = _DEAD
                    degree[other] -= 1
                    # A key that changes while its edge is in the heap would break the heap.
                    if place[kept] >= 0:
                        size = _remove(heap, place, size, kept, num, den, quick, key, floats)
                    num[kept] += num[edge]
                    den[kept] += den[edge]
                    key[kept] = min(key[kept], key[edge])
                    quick[kept] = num[kept] / den[kept]
                    if num[kept] > 0:
                        heap[size] = kept
                        place[kept] = size
                        _up(heap, place, size, num, den, quick, key, floats)
                        size += 1
                else:
                    pairs[slot] = _pair(b, other)
                    edges[slot] = edge
                    if half & 1:
                        second[edge] = b
                    else:
                        first[edge] = b
                    nexts[half] = heads[b]
                    heads[b] = half
                    degree[b] += 1
            half = following
    return merged


@numba.njit(cache=True, nogil=True)
def _root(parent, node):  # type: ignore[no-untyped-def]
    root = node
    while parent[root] != root:
        root = parent[root]
    while parent[node] != root:
        parent[node], node = root, parent[node]
    return root


@numba.njit(cache=True, nogil=True)
def _clusters(parent, smallest, frozen, cluster, waiting):  # type: ignore[no-untyped-def]
    for node in range(parent.size):
        root = _root(parent, node)
        cluster[node] = smallest[root]
        waiting[node] = frozen[root]


@numba.njit(cache=True, nogil=True)
def _unite(parent, first, second):  # type: ignore[no-untyped-def]
    for i in range(first.size):
        a, b = _root(parent, first[i]), _root(parent, second[i])
        if a < b:
            parent[b] = a
        elif b < a:
            parent[a] = b
    for node in range(parent.size):
        _root(parent, node)


def positive_components(
    n_nodes: int, first: NDArray[np.int32], second: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Return the smallest node of each node's connected component, int32, (n_nodes,)."""
    parent = np.arange(n_nodes, dtype=np.int32)
    _unite(parent, first, second)
    return parent


@dataclass(frozen=True)
class Contraction:
    """What became of nodes and edges.

    Attributes
    ----------
    cluster, waiting
        Smallest node of each node's cluster (int32), and whether the cluster is frozen or waits.
    merge_u, merge_v, merge_numerator, merge_denominator
        Merges in order: smallest node of each of the two clusters (``u < v``) and score, int64.
    edge_u, edge_v, edge_row, edge_numerator, edge_denominator
        Edges between clusters that wait: smallest nodes of both (``u < v``), row of the original
        edge with the smallest key, and score, int64.
    """

    cluster: NDArray[np.int32]
    waiting: NDArray[np.bool_]
    merge_u: NDArray[np.int64]
    merge_v: NDArray[np.int64]
    merge_numerator: NDArray[np.int64]
    merge_denominator: NDArray[np.int64]
    edge_u: NDArray[np.int32]
    edge_v: NDArray[np.int32]
    edge_row: NDArray[np.int64]
    edge_numerator: NDArray[np.int64]
    edge_denominator: NDArray[np.int64]


def agglomerate_edges(
    first: NDArray[np.int32],
    second: NDArray[np.int32],
    numerator: NDArray[np.int64],
    denominator: NDArray[np.int64],
    order: NDArray[np.int64],
    frozen: NDArray[np.bool_],
) -> Contraction:
    """Agglomerate a graph of distinct edges between dense nodes.

    Parameters
    ----------
    first, second
        Ends, int32, every pair once.
    numerator, denominator
        Score of each edge, int64, denominator positive.
    order
        Rows in ascending order of the key that breaks ties, int64.
    frozen
        Nodes that must not merge, bool, (n_nodes,).

    Raises
    ------
    InputError
        If sums over all edges could overflow int64.
    """
    n_edges, n_nodes = len(first), len(frozen)
    num, den = numerator.astype(np.int64), denominator.astype(np.int64)
    key = np.empty(n_edges, np.int64)
    key[order] = np.arange(n_edges)
    bound = float(np.abs(num).sum(dtype=np.float64) + den.sum(dtype=np.float64))
    if bound >= _LARGEST_SUM:
        raise InputError("contact graph: the sums of all contacts do not fit in 64 bits")
    slots = 1 << max(4, int(2 * n_edges - 1).bit_length())
    parent = np.arange(n_nodes, dtype=np.int32)
    smallest = np.arange(n_nodes, dtype=np.int32)
    first, second = first.astype(np.int32), second.astype(np.int32)
    frozen = frozen.astype(np.bool_)
    place = np.zeros(n_edges, np.int32)
    merges = np.zeros((min(max(n_nodes - 1, 0), n_edges), 4), np.int64)
    merged = _run(
        first,
        second,
        num,
        den,
        num / den,
        key,
        bound < _EXACT_FLOAT,
        np.zeros(n_edges, np.int32),
        place,
        np.full(n_nodes, -1, np.int32),
        np.zeros(2 * n_edges, np.int32),
        np.zeros(n_nodes, np.int32),
        np.full(slots, _ABSENT, np.int64),
        np.zeros(slots, np.int32),
        parent,
        smallest,
        frozen,
        merges,
    )
    cluster, waiting = np.empty(n_nodes, np.int32), np.empty(n_nodes, np.bool_)
    _clusters(parent, smallest, frozen, cluster, waiting)
    live = np.flatnonzero(place != _DEAD)
    a, b = cluster[first[live]], cluster[second[live]]
    keep = waiting[a] & waiting[b]
    live, a, b = live[keep], a[keep], b[keep]
    return Contraction(
        cluster,
        waiting,
        merge_u=merges[:merged, 0],
        merge_v=merges[:merged, 1],
        merge_numerator=merges[:merged, 2],
        merge_denominator=merges[:merged, 3],
        edge_u=np.minimum(a, b),
        edge_v=np.maximum(a, b),
        edge_row=order[key[live]],
        edge_numerator=num[live],
        edge_denominator=den[live],
    )
