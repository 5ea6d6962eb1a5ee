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
