"""Compiled core of the agglomeration: an indexed heap, edge lists and a hash of live edges.

Nodes are dense indices in the order of fragment ids, so comparing indices compares ids. The best
edge of all is the best one of both its ends. If one of them may not merge, because the best edge
that it has to the outside is as good or because it waits for another, both wait: its best edge can
only be beaten by one that was better before. An edge keeps its row for life: pooling adds one row
into another and kills it. All arrays are allocated before the loop and never grow. Half-edge
``2 e`` lies in the list of the first end of edge ``e``, ``2 e + 1`` in that of the second; dead
ones are dropped when their list is walked. Only positive edges are in the heap, with their score as
a float beside them. An edge between kinds that may not merge is dropped when it is the best:
whatever is pooled with it before may not merge either, as a cluster has the kinds of all its nodes.
The same holds for marks: a cluster has those of all its nodes, as a linked list, and marks have
rivals. Nodes may be frozen from the start.

Live edges are found by the pair of nodes they join, in a hash whose slots hold rows: the pair
itself is read from the edge's ends, so a slot takes four bytes. Code that changes the ends of a row
takes the row out of the hash before and puts it back after.

All that one compiled function calls is in this module: numba keeps what it compiled by the date of
the file, and does not see a change in another file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from agq.errors import InputError

_EXACT_FLOAT = 2**52
_EXACT_PRODUCT = 2**31
_ABSENT = -1
_DEAD = -2

_MIX = np.uint64(0x9E3779B97F4A7C15)
EMPTY = -1

LARGEST_SUM = 2**62
"""What sums over all edges of a graph stay below."""

TOO_LARGE = (
    "contact graph: the sums of all contacts do not fit in 64 bits; thresholds and margins of fewer"
    " decimals make them smaller"
)
"""What is said of a graph whose sums do not."""

TABLED = np.uint64(2**63)
"""Set in the kind of a cluster whose other bits are classes of the table of pairs that may merge;
other kinds are a class, or 0."""
_NO_KIND = np.uint64(0)
_ONE = np.uint64(1)

NO_ROWS = np.zeros(0, np.int32)
NO_PAIRS = np.zeros((0, 2), np.int32)

EdgeColumns = tuple[NDArray, NDArray, NDArray, NDArray]
"""Ends int32 (n, 2), numerators and denominators int64, and keys uint64 (n, 2) of edges."""


def empty_slots(rows: int) -> NDArray[np.int32]:
    """Return slots for so many rows, at most two thirds of them in use (probing stays short)."""
    return np.full(1 << max(4, (rows + rows // 2).bit_length()), EMPTY, np.int32)


@numba.njit(cache=True, nogil=True)
def _home(a, b, mask):  # type: ignore[no-untyped-def]
    mixed = ((np.uint64(min(a, b)) << np.uint64(32)) | np.uint64(max(a, b))) * _MIX
    return np.int64((mixed ^ (mixed >> np.uint64(32))) & np.uint64(mask))


@numba.njit(cache=True, nogil=True)
def find(slots, ends, a, b):  # type: ignore[no-untyped-def]
    """Return the slot of the edge between two nodes, or the empty slot where it would go."""
    mask = slots.size - 1
    slot = _home(a, b, mask)
    while True:
        row = slots[slot]
        if row < 0:
            return slot
        first, second = ends[row, 0], ends[row, 1]
        if (first == a and second == b) or (first == b and second == a):
            return slot
        slot = (slot + 1) & mask


@numba.njit(cache=True, nogil=True)
def delete(slots, ends, slot):  # type: ignore[no-untyped-def]
    """Empty a slot and move later entries back, so that probing never meets a gap."""
    mask = slots.size - 1
    hole = slot
    slot = (slot + 1) & mask
    while slots[slot] >= 0:
        row = slots[slot]
        home = _home(ends[row, 0], ends[row, 1], mask)
        if ((slot - home) & mask) >= ((slot - hole) & mask):
            slots[hole] = row
            hole = slot
        slot = (slot + 1) & mask
    slots[hole] = EMPTY


@numba.njit(cache=True, nogil=True)
def lower_key(keys, kept, other):  # type: ignore[no-untyped-def]
    """Give row ``kept`` the smaller one of its key and that of row ``other``."""
    if keys[other, 0] < keys[kept, 0] or (
        keys[other, 0] == keys[kept, 0] and keys[other, 1] < keys[kept, 1]
    ):
        keys[kept, 0], keys[kept, 1] = keys[other, 0], keys[other, 1]


@numba.njit(cache=True, nogil=True)
def pool(slots, ends, num, den, keys):  # type: ignore[no-untyped-def]
    """Add up parallel edges in place and fill the empty slots; return how many rows remain.

    The rows that remain come first, in the order in which their pairs came.
    """
    rows = 0
    for row in range(ends.shape[0]):
        a, b = ends[row, 0], ends[row, 1]
        slot = find(slots, ends, a, b)
        kept = slots[slot]
        if kept < 0:
            ends[rows, 0], ends[rows, 1] = a, b
            num[rows], den[rows] = num[row], den[row]
            keys[rows, 0], keys[rows, 1] = keys[row, 0], keys[row, 1]
            slots[slot] = rows
            rows += 1
        else:
            num[kept] += num[row]
            den[kept] += den[row]
            lower_key(keys, kept, row)
    return rows


@numba.njit(cache=True, nogil=True)
def root_of(parent, node):  # type: ignore[no-untyped-def]
    """Return the root of a node's tree, and hang all on the way there directly below it."""
    root = node
    while parent[root] != root:
        root = parent[root]
    while parent[node] != root:
        parent[node], node = root, parent[node]
    return root


@numba.njit(cache=True, nogil=True)
def _unite(parent, first, second, num):  # type: ignore[no-untyped-def]
    for i in range(first.size):
        if num.size and num[i] <= 0:
            continue
        a, b = root_of(parent, first[i]), root_of(parent, second[i])
        if a < b:
            parent[b] = a
        elif b < a:
            parent[a] = b
    for node in range(parent.size):
        root_of(parent, node)


def connected_components(
    n_nodes: int,
    first: NDArray[np.int32],
    second: NDArray[np.int32],
    numerator: NDArray[np.int64] | None = None,
) -> NDArray[np.int32]:
    """Return the smallest node of each node's connected component, int32, (n_nodes,).

    With numerators, only edges with a positive one connect.
    """
    parent = np.arange(n_nodes, dtype=np.int32)
    _unite(parent, first, second, np.zeros(0, np.int64) if numerator is None else numerator)
    return parent


@numba.njit(cache=True, nogil=True)
def _count(component, alive, ends):  # type: ignore[no-untyped-def]
    inside = between = 0
    for row in range(ends.shape[0]):
        a, b = component[ends[row, 0]], component[ends[row, 1]]
        if a == b:
            inside += 1
        elif alive[a] and alive[b]:
            between += 1
    return inside, between


@numba.njit(cache=True, nogil=True)
def _split(component, alive, ends, num, den, keys, other_ends, other_num, other_den, other_keys):  # type: ignore[no-untyped-def]
    inside = between = 0
    for row in range(ends.shape[0]):
        a, b = component[ends[row, 0]], component[ends[row, 1]]
        if a == b:
            ends[inside, 0], ends[inside, 1] = ends[row, 0], ends[row, 1]
            num[inside], den[inside] = num[row], den[row]
            keys[inside, 0], keys[inside, 1] = keys[row, 0], keys[row, 1]
            inside += 1
        elif alive[a] and alive[b]:
            other_ends[between, 0], other_ends[between, 1] = ends[row, 0], ends[row, 1]
            other_num[between], other_den[between] = num[row], den[row]
            other_keys[between, 0], other_keys[between, 1] = keys[row, 0], keys[row, 1]
            between += 1


def split_edges(
    component: NDArray[np.int32], alive: NDArray[np.bool_], edges: EdgeColumns
) -> tuple[EdgeColumns, EdgeColumns]:
    """Return the edges inside components, and those between two components that are alive.

    The first are moved to the front of the arrays given; others are lost.

    Parameters
    ----------
    component
        Of each node, int32.
    alive
        By component, bool.
    """
    inside, between = _count(component, alive, edges[0])
    ends, numerator, denominator, keys = (
        np.empty((between, *column.shape[1:]), column.dtype) for column in edges
    )
    other = ends, numerator, denominator, keys
    _split(component, alive, *edges, *other)
    ends, numerator, denominator, keys = (column[:inside] for column in edges)
    return (ends, numerator, denominator, keys), other


@numba.njit(cache=True, nogil=True)
def compare_fractions(n1, d1, n2, d2):  # type: ignore[no-untyped-def]
    """Return the sign of ``n1 / d1 - n2 / d2`` for int64 that are not negative, without overflow.

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
def exceed(num, den, numerator, denominator):  # type: ignore[no-untyped-def]
    """Return, for fractions of int64 that are not negative, whether each is above one of them."""
    above = np.empty(num.size, np.bool_)
    for i in range(num.size):
        above[i] = compare_fractions(num[i], den[i], numerator, denominator) > 0
    return above


@numba.njit(cache=True, nogil=True)
def _better(a, fast_a, b, fast_b, num, den, keys, floats):  # type: ignore[no-untyped-def]
    # Correctly rounded quotients of exactly represented integers never swap: only when they are
    # equal do the fractions have to be compared.
    if floats and fast_a != fast_b:
        return fast_a > fast_b
    sign = compare_fractions(num[a], den[a], num[b], den[b])
    if sign != 0:
        return sign > 0
    return keys[a, 0] < keys[b, 0] or (keys[a, 0] == keys[b, 0] and keys[a, 1] < keys[b, 1])


@numba.njit(cache=True, nogil=True)
def _up(heap, fast, place, i, num, den, keys, floats):  # type: ignore[no-untyped-def]
    edge, score = heap[i], fast[i]
    while i > 0:
        parent = (i - 1) >> 1
        if not _better(edge, score, heap[parent], fast[parent], num, den, keys, floats):
            break
        heap[i], fast[i] = heap[parent], fast[parent]
        place[heap[i]] = i
        i = parent
    heap[i], fast[i] = edge, score
    place[edge] = i
    return i


@numba.njit(cache=True, nogil=True)
def _down(heap, fast, place, size, i, num, den, keys, floats):  # type: ignore[no-untyped-def]
    edge, score = heap[i], fast[i]
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        right = child + 1
        if right < size and _better(
            heap[right], fast[right], heap[child], fast[child], num, den, keys, floats
        ):
            child = right
        if not _better(heap[child], fast[child], edge, score, num, den, keys, floats):
            break
        heap[i], fast[i] = heap[child], fast[child]
        place[heap[i]] = i
        i = child
    heap[i], fast[i] = edge, score
    place[edge] = i


@numba.njit(cache=True, nogil=True)
def _remove(heap, fast, place, size, edge, num, den, keys, floats):  # type: ignore[no-untyped-def]
    """Take an edge out of the heap; return the new size."""
    i = place[edge]
    place[edge] = _ABSENT
    size -= 1
    if i != size:
        heap[i], fast[i] = heap[size], fast[size]
        i = _up(heap, fast, place, i, num, den, keys, floats)
        _down(heap, fast, place, size, i, num, den, keys, floats)
    return size


@numba.njit(cache=True, nogil=True)
def may_join(a, b, bars):  # type: ignore[no-untyped-def]
    """Whether clusters of two kinds may merge; ``bars`` are the bits that each bit keeps out."""
    if _NO_KIND in (a, b) or a == b:
        return True
    if (a & b & TABLED) == _NO_KIND:
        return False
    for bit in range(bars.size):
        if (a >> np.uint64(bit)) & _ONE and (bars[bit] & b) != _NO_KIND:
            return False
    return True


@numba.njit(cache=True, nogil=True)
def may_join_each(a, b, bars):  # type: ignore[no-untyped-def]
    """Return, for pairs of kinds, whether clusters of them may merge."""
    allowed = np.empty(a.size, np.bool_)
    for i in range(a.size):
        allowed[i] = may_join(a[i], b[i], bars)
    return allowed


@numba.njit(cache=True, nogil=True)
def _are_rivals(a, b, marks, parent, mark_node, starts, rivals):  # type: ignore[no-untyped-def]
    """Whether a mark of one cluster has a rival in the other."""
    head, _, following, count = marks
    if count[a] > count[b]:
        a, b = b, a
    mark = head[a]
    while mark >= 0:
        for i in range(starts[mark], starts[mark + 1]):
            if root_of(parent, mark_node[rivals[i]]) == b:
                return True
        mark = following[mark]
    return False


@numba.njit(cache=True, nogil=True)
def _pin(marks, mark_node):  # type: ignore[no-untyped-def]
    """Give every node the list of its marks."""
    head, tail, following, count = marks
    for mark in range(mark_node.size):
        node = mark_node[mark]
        following[mark] = head[node]
        if head[node] < 0:
            tail[node] = mark
        head[node] = mark
        count[node] += 1


@numba.njit(cache=True, nogil=True)
def _hand_over(a, b, marks):  # type: ignore[no-untyped-def]
    """Append the marks of a cluster to those of another."""
    head, tail, following, count = marks
    if head[a] < 0:
        return
    if head[b] < 0:
        head[b] = head[a]
    else:
        following[tail[b]] = head[a]
    tail[b] = tail[a]
    count[b] += count[a]


@numba.njit(cache=True, nogil=True)
def _held_back(node, edge, num, den, reach_num, reach_den):  # type: ignore[no-untyped-def]
    """Whether a node has an edge to the outside that is as good, or may be."""
    return reach_num[node] > 0 and (
        compare_fractions(reach_num[node], reach_den[node], num[edge], den[edge]) >= 0
    )


@numba.njit(cache=True, nogil=True)
def _run(  # type: ignore[no-untyped-def]
    ends, num, den, keys, floats, reach_num, reach_den, heap, fast, place, heads, nexts, degree,
    slots, parent, smallest, frozen, merges, kinds, bars, marks, mark_node, starts, rivals,
):  # fmt: skip
    size = 0
    _pin(marks, mark_node)
    for edge in range(ends.shape[0]):
        place[edge] = _ABSENT
        a, b = ends[edge, 0], ends[edge, 1]
        nexts[2 * edge], heads[a] = heads[a], 2 * edge
        nexts[2 * edge + 1], heads[b] = heads[b], 2 * edge + 1
        degree[a] += 1
        degree[b] += 1
        if num[edge] > 0:
            heap[size], fast[size] = edge, num[edge] / den[edge]
            place[edge] = size
            size += 1
    for i in range(size // 2 - 1, -1, -1):
        _down(heap, fast, place, size, i, num, den, keys, floats)

    merged = 0
    while size > 0:
        best = heap[0]
        size = _remove(heap, fast, place, size, best, num, den, keys, floats)
        a, b = ends[best, 0], ends[best, 1]
        if (kinds.size and not may_join(kinds[a], kinds[b], bars)) or (
            mark_node.size and _are_rivals(a, b, marks, parent, mark_node, starts, rivals)
        ):
            # Both only grow, so it may never merge; and its ends still have their best edge ahead.
            delete(slots, ends, find(slots, ends, a, b))
            place[best] = _DEAD
            degree[a] -= 1
            degree[b] -= 1
            continue
        if (
            frozen[a]
            or frozen[b]
            or _held_back(a, best, num, den, reach_num, reach_den)
            or _held_back(b, best, num, den, reach_num, reach_den)
        ):
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
        if kinds.size:
            kinds[b] |= kinds[a]
        if mark_node.size:
            _hand_over(a, b, marks)
        if compare_fractions(reach_num[a], reach_den[a], reach_num[b], reach_den[b]) > 0:
            reach_num[b], reach_den[b] = reach_num[a], reach_den[a]
        delete(slots, ends, find(slots, ends, a, b))
        place[best] = _DEAD
        degree[b] -= 1

        # Hand the edges of a, the end with fewer, over to b.
        half = heads[a]
        while half >= 0:
            following = nexts[half]
            edge = half >> 1
            if place[edge] != _DEAD:
                end = half & 1
                other = ends[edge, 1 - end]
                delete(slots, ends, find(slots, ends, a, other))
                slot = find(slots, ends, b, other)
                kept = slots[slot]
                if kept >= 0:
                    if place[edge] >= 0:
                        size = _remove(heap, fast, place, size, edge, num, den, keys, floats)
                    place[edge] = _DEAD
                    degree[other] -= 1
                    # A key that changes while its edge is in the heap would break the heap.
                    if place[kept] >= 0:
                        size = _remove(heap, fast, place, size, kept, num, den, keys, floats)
                    num[kept] += num[edge]
                    den[kept] += den[edge]
                    lower_key(keys, kept, edge)
                    if num[kept] > 0:
                        heap[size], fast[size] = kept, num[kept] / den[kept]
                        place[kept] = size
                        _up(heap, fast, place, size, num, den, keys, floats)
                        size += 1
                else:
                    slots[slot] = edge
                    ends[edge, end] = b
                    nexts[half] = heads[b]
                    heads[b] = half
                    degree[b] += 1
            half = following
    return merged


@numba.njit(cache=True, nogil=True)
def _clusters(parent, smallest, frozen, reach_num, cluster, waiting):  # type: ignore[no-untyped-def]
    for node in range(parent.size):
        root = root_of(parent, node)
        cluster[node] = smallest[root]
        waiting[node] = frozen[root] or reach_num[root] > 0


@numba.njit(cache=True, nogil=True)
def _survivors(ends, num, den, keys, dead, place, cluster, waiting):  # type: ignore[no-untyped-def]
    """Move the edges between waiting clusters to the front, by cluster; return how many."""
    rows = 0
    for row in range(ends.shape[0]):
        if dead and place[row] == _DEAD:
            continue
        a, b = ends[row, 0], ends[row, 1]
        if not (waiting[a] and waiting[b]):
            continue
        a, b = cluster[a], cluster[b]
        ends[rows, 0], ends[rows, 1] = min(a, b), max(a, b)
        num[rows], den[rows] = num[row], den[row]
        keys[rows, 0], keys[rows, 1] = keys[row, 0], keys[row, 1]
        rows += 1
    return rows


@numba.njit(cache=True, nogil=True)
def raise_reach(reach_num, reach_den, node, num, den):  # type: ignore[no-untyped-def]
    """Raise the best score that nodes have outside to those of some edges (only if positive)."""
    for i in range(node.size):
        n = node[i]
        if num[i] > 0 and compare_fractions(num[i], den[i], reach_num[n], reach_den[n]) > 0:
            reach_num[n], reach_den[n] = num[i], den[i]


@numba.njit(cache=True, nogil=True)
def _weight(num, den):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(num.size):
        total += abs(float(num[i])) + float(den[i])
    return total


@dataclass(frozen=True)
class Contraction:
    """Clusters, merges and remaining edges of a graph.

    Attributes
    ----------
    cluster, waiting
        Smallest node of each node's cluster (int32), and whether the cluster may still merge.
    merge_u, merge_v, merge_numerator, merge_denominator
        Merges in order: smallest node of each of the two clusters (``u < v``) and score, int64.
    kinds
        Kind of each node's cluster, uint64; of no nodes if none were given.
    edges
        Number of edges between clusters that wait; they are the first rows of the arrays given,
        their ends the smallest nodes of both clusters, in ascending order.
    """

    cluster: NDArray[np.int32]
    waiting: NDArray[np.bool_]
    merge_u: NDArray[np.int64]
    merge_v: NDArray[np.int64]
    merge_numerator: NDArray[np.int64]
    merge_denominator: NDArray[np.int64]
    kinds: NDArray[np.uint64]
    edges: int


def _bound(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> float:
    """Return what no sum over some of the edges exceeds; refuse what could overflow."""
    bound = float(_weight(numerator, denominator))
    if bound >= LARGEST_SUM:
        raise InputError(TOO_LARGE)
    return bound


def agglomerate_edges(
    ends: NDArray[np.int32],
    numerator: NDArray[np.int64],
    denominator: NDArray[np.int64],
    keys: NDArray[np.uint64],
    reach_numerator: NDArray[np.int64],
    reach_denominator: NDArray[np.int64],
    kinds: NDArray[np.uint64],
    bars: NDArray[np.uint64],
    frozen: NDArray[np.int32] = NO_ROWS,
    mark_node: NDArray[np.int32] = NO_ROWS,
    rivals: NDArray[np.int32] = NO_PAIRS,
) -> Contraction:
    """Agglomerate a graph between dense nodes, in the memory of its arrays.

    Parameters
    ----------
    ends
        Nodes of each edge, int32 (n, 2); parallel edges add up.
    numerator, denominator
        Score of each edge, int64, denominator positive.
    keys
        Smallest original edge pooled in each, uint64 (n, 2): what orders equal scores.
    reach_numerator, reach_denominator
        For each node a bound on the score of its edges to nodes outside, int64; numerator 0: it
        has no positive one.
    kinds, bars
        Kind of each node, and the table of kinds that may merge (:mod:`merge.classes`); kinds of no
        nodes: all may.
    frozen
        Nodes that wait, whatever their edges.
    mark_node, rivals
        Node that has each mark, and pairs of marks that may not come into one cluster, int32
        (n, 2).

    Raises
    ------
    InputError
        If sums over all edges could overflow int64.
    """
    bound = _bound(numerator, denominator)
    slots = empty_slots(len(ends))
    rows = pool(slots, ends, numerator, denominator, keys)
    ends, num, den, keys = ends[:rows], numerator[:rows], denominator[:rows], keys[:rows]
    n_nodes, positive = len(reach_numerator), int(np.count_nonzero(num > 0))
    parent = np.arange(n_nodes, dtype=np.int32)
    smallest = np.arange(n_nodes, dtype=np.int32)
    waits = np.zeros(n_nodes, np.bool_)
    waits[frozen] = True
    both = np.concatenate((rivals, rivals[:, ::-1]))
    both = both[np.argsort(both[:, 0], kind="stable")]
    starts = np.searchsorted(both[:, 0], np.arange(len(mark_node) + 1))
    marked = n_nodes if len(mark_node) else 0
    marks = (
        np.full(marked, -1, np.int32),
        np.full(marked, -1, np.int32),
        np.full(len(mark_node), -1, np.int32),
        np.zeros(marked, np.int32),
    )
    place = np.empty(rows, np.int32)
    merges = np.zeros((min(max(n_nodes - 1, 0), positive), 4), np.int64)
    kinds = kinds.copy()
    merged = _run(
        ends,
        num,
        den,
        keys,
        bound < _EXACT_FLOAT,
        reach_numerator,
        reach_denominator,
        np.empty(positive, np.int32),
        np.empty(positive, np.float64),
        place,
        np.full(n_nodes, -1, np.int32),
        np.empty(2 * rows, np.int32),
        np.zeros(n_nodes, np.int32),
        slots,
        parent,
        smallest,
        waits,
        merges,
        kinds,
        bars,
        marks,
        mark_node,
        starts,
        np.ascontiguousarray(both[:, 1]),
    )
    cluster, waiting = np.empty(n_nodes, np.int32), np.empty(n_nodes, np.bool_)
    _clusters(parent, smallest, waits, reach_numerator, cluster, waiting)
    return Contraction(
        cluster,
        waiting,
        kinds=kinds[parent[: len(kinds)]],
        merge_u=merges[:merged, 0],
        merge_v=merges[:merged, 1],
        merge_numerator=merges[:merged, 2],
        merge_denominator=merges[:merged, 3],
        edges=_survivors(ends, num, den, keys, True, place, cluster, waiting),
    )


def pooled_edges(
    ends: NDArray[np.int32],
    numerator: NDArray[np.int64],
    denominator: NDArray[np.int64],
    keys: NDArray[np.uint64],
    done: Contraction,
) -> int:
    """Add edges that took no part up between the clusters that wait, in place; return how many.

    Raises
    ------
    InputError
        If sums over all edges could overflow int64.
    """
    _bound(numerator, denominator)
    arrays = (ends, numerator, denominator, keys)
    none = np.zeros(0, np.int32)
    rows = _survivors(*arrays, False, none, done.cluster, done.waiting)
    return int(pool(empty_slots(rows), *(array[:rows] for array in arrays)))
