"""Put the edges that all windows found of a segment together to one skeleton.

Windows agree on most edges across a border, and equal voxels are one node. Where a line ends just
behind a border because the other window found it covered by another line, it is tied to the nearest
node of another, if that is not farther than what a line covers. Loops are cut at their
longest edge, and twigs shorter than `TWIG` times the radius at their base are taken away, the
shortest first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.spatial import cKDTree

from agq.blockwise.export.rows import Rows
from agq.blockwise.export.skeletons.trace import CONSTANT_NM, SCALE
from agq.blockwise.volumes.triples import Triple

TWIG = 1.5
"""A twig is as long as so many times the radius where it leaves its branch."""


@dataclass(frozen=True)
class Skeleton:
    """One segment.

    Attributes
    ----------
    nodes
        (n, 3) float64 nanometres, (z, y, x): middles of voxels.
    radii
        (n,) float32 nanometres to the surface.
    edges
        (m, 2) int64 rows of `nodes`; without loops.
    """

    nodes: npt.NDArray[np.float64]
    radii: npt.NDArray[np.float32]
    edges: npt.NDArray[np.int64]

    @property
    def cable_nm(self) -> float:
        """Length of all edges."""
        return float(_lengths(self.nodes, self.edges).sum())


def join(
    rows: Rows,
    shape: Triple,
    core: Triple,
    size: tuple[float, float, float],
    offset: tuple[float, float, float],
) -> Skeleton:
    """Return the skeleton of a segment.

    Parameters
    ----------
    rows
        Edges: voxels ``a`` and ``b`` as flat places in the volume, and their ``radii``.
    shape, core
        Voxels of the volume, and of the core of a window.
    size, offset
        Nanometres of a voxel, and place of the first one, (z, y, x).
    """
    places, ends = np.unique(np.stack([rows["a"], rows["b"]], 1), return_inverse=True)
    ends = ends.reshape(-1, 2)
    radii = np.zeros(len(places), np.float32)
    np.maximum.at(radii, ends, rows["radii"])
    edges = np.unique(np.sort(ends, 1), axis=0)
    voxels = np.stack(np.unravel_index(places, shape), 1)
    nodes = np.asarray(offset + (voxels + 0.5) * size, np.float64)
    edges = _tied(nodes, edges, radii, voxels // core)
    tree = sparse.coo_matrix((_lengths(nodes, edges), edges.T), (len(nodes),) * 2)
    tree = sparse.csgraph.minimum_spanning_tree(tree).tocoo()
    edges = np.stack([tree.row, tree.col], 1).astype(np.int64)
    edges = edges[np.lexsort(edges.T[::-1])]
    keep = _pruned(len(nodes), edges, _lengths(nodes, edges), radii.astype(np.float64))
    edges = edges[keep[edges].all(1)]
    kept = np.unique(edges)
    return Skeleton(nodes[kept], radii[kept], np.searchsorted(kept, edges))


def _lengths(
    nodes: npt.NDArray[np.float64], edges: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    return np.asarray(np.linalg.norm(nodes[edges[:, 0]] - nodes[edges[:, 1]], axis=1))


def _tied(
    nodes: npt.NDArray[np.float64],
    edges: npt.NDArray[np.int64],
    radii: npt.NDArray[np.float32],
    cores: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Tie lines with an end just behind a border to the nearest node of another line."""
    count, component = _components(len(nodes), edges)
    across = (cores[edges[:, 0]] != cores[edges[:, 1]]).any(1)
    loose = np.bincount(edges.reshape(-1), minlength=len(nodes)) == 1
    loose &= np.isin(np.arange(len(nodes)), edges[across])
    sizes = np.bincount(component, minlength=count)
    order = np.lexsort([np.arange(count), sizes])
    ties = []
    for part in order[np.isin(order, component[loose])]:
        mine = component == part
        own = np.flatnonzero(mine)
        if not len(own) or len(own) == len(nodes):
            continue
        reach = SCALE * float(radii[own].max()) + CONSTANT_NM
        low, high = nodes[own].min(0) - reach, nodes[own].max(0) + reach
        near = ((nodes > low) & (nodes < high)).all(1)
        others = np.flatnonzero(near & ~mine)
        if not len(others):
            continue
        tree = cKDTree(nodes[others])
        for ends in (own[loose[own]], own):
            if not len(ends):
                continue
            far, place = tree.query(nodes[ends], distance_upper_bound=reach)
            best = int(far.argmin())
            if np.isfinite(far[best]):
                other = others[place[best]]
                ties.append((ends[best], other))
                component[mine] = component[other]
                break
    return np.concatenate([edges, np.array(ties, np.int64).reshape(-1, 2)])


def _components(count: int, edges: npt.NDArray[np.int64]) -> tuple[int, npt.NDArray[np.int32]]:
    graph = sparse.coo_matrix((np.ones(len(edges)), edges.T), (count, count))
    parts, component = sparse.csgraph.connected_components(graph, directed=False)
    return int(parts), component


@numba.njit(cache=True, nogil=True)
def _pruned(
    count: int,
    edges: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.float64],
    radii: npt.NDArray[np.float64],
) -> npt.NDArray[np.bool_]:  # pragma: no cover (compiled)
    """Return which nodes of a forest stay."""
    first = np.zeros(count + 1, np.int64)
    for a, b in edges:
        first[a + 1] += 1
        first[b + 1] += 1
    first = np.cumsum(first)
    place = first[:-1].copy()
    other = np.empty(2 * len(edges), np.int64)
    far = np.empty(2 * len(edges))
    for k in range(len(edges)):
        a, b = edges[k]
        other[place[a]], far[place[a]] = b, lengths[k]
        other[place[b]], far[place[b]] = a, lengths[k]
        place[a] += 1
        place[b] += 1
    degree = np.diff(first)
    keep = degree > 0
    while True:
        tips = np.flatnonzero(keep & (degree == 1))
        bases = np.full(len(tips), -1, np.int64)
        twig = np.zeros(len(tips))
        for t in range(len(tips)):
            before, here = np.int64(-1), tips[t]
            while degree[here] < 3:
                following = np.int64(-1)
                for k in range(first[here], first[here + 1]):
                    if keep[other[k]] and other[k] != before:
                        following = other[k]
                        twig[t] += far[k]
                if following < 0:
                    break
                before, here = here, following
            if degree[here] >= 3 and twig[t] < TWIG * radii[here]:
                bases[t] = here
        removed = False
        for t in np.argsort(twig, kind="mergesort"):
            if bases[t] < 0 or degree[bases[t]] < 3:
                continue
            removed = True
            here = tips[t]
            while here != bases[t]:
                keep[here] = False
                following = bases[t]
                for k in range(first[here], first[here + 1]):
                    if keep[other[k]]:
                        following = other[k]
                here = following
            degree[bases[t]] -= 1
        if not removed:
            return keep
