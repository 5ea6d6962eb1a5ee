"""Exact agglomeration of one part of a larger graph: merge what is certain, hand up the rest.

A *superblock* holds a box of blocks. Its nodes are clusters, named by their smallest fragment id.
A node that touches a fragment outside the superblock is *open*: not all of its edges are known, so
it must not merge here. Any two other nodes that are each other's best neighbour would merge in the
global run too (reducibility, see :mod:`blockwise.agglomerate`), so they merge now. A node whose
best neighbour may not merge here has to wait: no later merge can change its best edge, because
pooled edges never beat the better of their parents.

Nodes that are neither open nor waiting have no positive edge left; they can never merge again and
leave with their edges. What remains, the *residual* graph, goes up to the parent superblock, where
it is joined with its siblings' and with the contacts between them. Open nodes have never merged,
so those contacts still name original fragments. At the root nothing is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from blockwise.agglomerate_kernel import Contraction, agglomerate_edges, positive_components
from blockwise.errors import InputError

MAX_EDGES = 2**30
"""Edges that one process can agglomerate (half-edges are numbered in 32 bits)."""


@dataclass(frozen=True)
class MergeTable:
    """Merges in the order made (the dendrogram).

    Attributes
    ----------
    u, v
        Smallest fragment id of each of the two clusters, uint64, ``u < v``; ``u`` is the
        smallest id of the merged one.
    numerator, denominator
        Score in half units as an exact fraction, int64; affinity above threshold is
        ``numerator / denominator / 510``.
    """

    u: NDArray[np.uint64]
    v: NDArray[np.uint64]
    numerator: NDArray[np.int64]
    denominator: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.u)

    def above(self, margin: int) -> MergeTable:
        """Return the merges that remain if every threshold rises by ``margin`` half units.

        Raising all thresholds alike lowers every score by the same amount, so the order stays and
        the dendrogram is cut higher.
        """
        keep = self.numerator > margin * self.denominator
        return MergeTable(*(getattr(self, field.name)[keep] for field in fields(self)))


@dataclass(frozen=True)
class EdgeTable:
    """Scored edges between clusters.

    Attributes
    ----------
    u, v
        Smallest fragment id of each end, uint64, ``u < v``; distinct pairs.
    numerator, denominator
        Score as an exact fraction in half units, int64, denominator positive.
    key_u, key_v
        Smallest original edge pooled in this one, uint64: what orders equal scores.
    """

    u: NDArray[np.uint64]
    v: NDArray[np.uint64]
    numerator: NDArray[np.int64]
    denominator: NDArray[np.int64]
    key_u: NDArray[np.uint64]
    key_v: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.u)

    @classmethod
    def original(
        cls,
        u: NDArray[np.uint64],
        v: NDArray[np.uint64],
        numerator: NDArray[np.int64],
        denominator: NDArray[np.int64],
    ) -> EdgeTable:
        """Return edges between fragments, each its own key."""
        return cls(u, v, numerator, denominator, u, v)

    @classmethod
    def concatenate(cls, tables: Sequence[EdgeTable]) -> EdgeTable:
        """Return the rows of several tables."""
        if not tables:
            none, sums = np.zeros(0, np.uint64), np.zeros(0, np.int64)
            return cls(none, none, sums, sums, none, none)
        return cls(
            *(np.concatenate([getattr(t, field.name) for t in tables]) for field in fields(cls))
        )


@dataclass(frozen=True)
class Graph:
    """Clusters of a superblock and the edges among them.

    Attributes
    ----------
    nodes
        Smallest fragment id of each cluster, uint64, ascending.
    outside
        Bit mask of the faces across which a node touches fragments outside, uint8; 0: all its
        edges are in ``edges``. Bit ``d`` is the lower face on axis ``d``, bit ``3 + d`` the upper.
    edges
        All edges between these nodes.
    """

    nodes: NDArray[np.uint64]
    outside: NDArray[np.uint8]
    edges: EdgeTable


def positions(ids: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Return where ``values`` lie in the ascending ``ids``, int32.

    Raises
    ------
    InputError
        If a value is not there.
    """
    position = np.searchsorted(ids, values)
    known = position < len(ids)
    known[known] = ids[position[known]] == values[known]
    if not bool(known.all()):
        raise InputError(
            f"contact table: fragment {values[~known][0]} is not among the {len(ids)} fragments"
        )
    return position.astype(np.int32)


def contract(graph: Graph) -> tuple[MergeTable, Graph]:
    """Merge all that is certain in a part of the graph.

    Returns
    -------
    MergeTable
        Merges made, best first.
    Graph
        The residual: nodes that may merge with more knowledge, and the edges among them.

    Raises
    ------
    InputError
        If there are more than :data:`MAX_EDGES` edges, or sums do not fit in 64 bits.
    """
    nodes, edges = graph.nodes, graph.edges
    first, second = positions(nodes, edges.u), positions(nodes, edges.v)
    is_open = graph.outside != 0

    # Clusters grow along positive edges only, so an edge between two components of the graph of
    # positive edges cannot become positive here; and never, if one of them has no open node.
    positive = edges.numerator > 0
    component = positive_components(len(nodes), first[positive], second[positive])
    alive = np.zeros(len(nodes), bool)
    alive[component[is_open]] = True
    inner = component[first] == component[second]
    veto = np.flatnonzero(~inner & alive[component[first]] & alive[component[second]])
    inner = np.flatnonzero(inner)
    if len(inner) > MAX_EDGES:
        raise InputError(
            f"contact graph: {len(inner)} edges are more than one process can hold ({MAX_EDGES});"
            " set a smaller stitch.superblock"
        )
    order = np.lexsort((edges.key_v[inner], edges.key_u[inner]))
    done = agglomerate_edges(
        first[inner],
        second[inner],
        edges.numerator[inner],
        edges.denominator[inner],
        order,
        is_open,
    )
    merges = MergeTable(
        nodes[done.merge_u], nodes[done.merge_v], done.merge_numerator, done.merge_denominator
    )
    # From here on a cluster is known by its smallest node.
    least = inner[done.edge_row]
    residual = EdgeTable.concatenate(
        [
            EdgeTable(
                nodes[done.edge_u],
                nodes[done.edge_v],
                done.edge_numerator,
                done.edge_denominator,
                edges.key_u[least],
                edges.key_v[least],
            ),
            _pooled(nodes, done, first[veto], second[veto], edges, veto),
        ]
    )
    stays = np.flatnonzero(done.waiting & (done.cluster == np.arange(len(nodes))))
    return merges, Graph(nodes[stays], graph.outside[stays], residual)


def _pooled(
    nodes: NDArray[np.uint64],
    done: Contraction,
    first: NDArray[np.int32],
    second: NDArray[np.int32],
    edges: EdgeTable,
    rows: NDArray[np.int64],
) -> EdgeTable:
    """Return rows of ``edges``, with these ends, added up between the clusters that wait."""
    a, b = done.cluster[first], done.cluster[second]
    stay = done.waiting[a] & done.waiting[b]
    a, b, rows = a[stay], b[stay], rows[stay]
    if not len(rows):
        return EdgeTable.concatenate([])
    pair = (np.minimum(a, b).astype(np.int64) << 32) | np.maximum(a, b)
    order = np.lexsort((edges.key_v[rows], edges.key_u[rows], pair))
    pair, rows = pair[order], rows[order]
    new = np.flatnonzero(np.concatenate(([True], pair[1:] != pair[:-1])))
    pair, least = pair[new], rows[new]
    return EdgeTable(
        nodes[pair >> 32],
        nodes[pair & 0xFFFFFFFF],
        np.add.reduceat(edges.numerator[rows], new),
        np.add.reduceat(edges.denominator[rows], new),
        edges.key_u[least],
        edges.key_v[least],
    )
