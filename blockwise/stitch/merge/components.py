"""Connected components of a graph (union-find, compiled)."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray


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


EdgeColumns = tuple[NDArray, NDArray, NDArray, NDArray]
"""Ends int32 (n, 2), numerators and denominators int64, and keys uint64 (n, 2) of edges."""


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
