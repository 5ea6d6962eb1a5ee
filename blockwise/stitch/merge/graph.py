"""Exact agglomeration of one part of a larger graph: merge what is certain, hand up the rest.

A *superblock* holds a box of blocks. Its nodes are clusters, named by their smallest fragment id.
All contacts of its fragments are known, those with fragments outside too; what is not known is what
happens outside. But pooled edges never beat the better of their parents, so whatever happens there,
no edge of a node to the outside will beat the best one that the contacts say it has: its *reach*.
Two nodes that are each other's best neighbour, better than the reach of both, would merge in the
global run too (reducibility, see :mod:`merge.rule`), so they merge now. A node whose
reach is as good as its best edge inside has to wait, and so has a node whose best neighbour waits.

Nodes that neither wait nor have a positive edge to the outside have none inside either; they can
never merge again and leave with their edges. What remains, the *residual* graph, goes up to the
parent superblock, where it is joined with its siblings' and with the contacts between them. For
that, each contact across a face keeps the original fragment outside, and the superblock there
keeps which of its clusters holds that fragment. At the root nothing lies outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.stitch.merge.components import connected_components, split_edges
from agq.blockwise.stitch.merge.kernel import (
    Contraction,
    agglomerate_edges,
    pooled_edges,
    raise_reach,
)
from agq.errors import InputError

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
class ScoreTable:
    """Scored contacts between fragments.

    Attributes
    ----------
    u, v
        Fragment ids, uint64, ``u < v``.
    numerator, denominator
        Score as an exact fraction in half units, int64, denominator positive.
    """

    u: NDArray[np.uint64]
    v: NDArray[np.uint64]
    numerator: NDArray[np.int64]
    denominator: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.u)


_IDS, _SUMS = np.zeros(0, np.uint64), np.zeros(0, np.int64)
_NOTHING = ScoreTable(_IDS, _IDS, _SUMS, _SUMS)


@dataclass(frozen=True)
class EdgeTable:
    """Scored edges between clusters.

    Attributes
    ----------
    ends
        Rows of both ends in the list of nodes, int32 (n, 2).
    numerator, denominator
        Score as an exact fraction in half units, int64, denominator positive.
    keys
        Smallest original edge pooled in this one, uint64 (n, 2): what orders equal scores.
    """

    ends: NDArray[np.int32]
    numerator: NDArray[np.int64]
    denominator: NDArray[np.int64]
    keys: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.ends)


NO_EDGES = EdgeTable(np.zeros((0, 2), np.int32), _SUMS, _SUMS, np.zeros((0, 2), np.uint64))


@dataclass(frozen=True)
class UpperFace:
    """Contacts across an upper face of a superblock.

    Attributes
    ----------
    node
        Row of the cluster inside, int32.
    fragments
        The original contact: fragment inside and fragment outside, uint64 (n, 2).
    numerator, denominator
        Its score, int64.
    """

    node: NDArray[np.int32]
    fragments: NDArray[np.uint64]
    numerator: NDArray[np.int64]
    denominator: NDArray[np.int64]

    @classmethod
    def of_fragments(cls, ids: NDArray[np.uint64], rows: ScoreTable = _NOTHING) -> UpperFace:
        """Return a face of original fragments, from contacts with ``u`` inside."""
        fragments = np.stack((rows.u, rows.v), axis=1)
        return cls(positions(ids, rows.u), fragments, rows.numerator, rows.denominator)


@dataclass(frozen=True)
class LowerFace:
    """Fragments that have contacts across a lower face of a superblock.

    Attributes
    ----------
    fragment
        Original fragments inside, uint64, ascending.
    node
        Row of the cluster that each belongs to, int32.
    numerator, denominator
        Best positive score of its contacts across the face, int64; numerator 0: none is positive.
    """

    fragment: NDArray[np.uint64]
    node: NDArray[np.int32]
    numerator: NDArray[np.int64]
    denominator: NDArray[np.int64]

    @classmethod
    def of_fragments(cls, ids: NDArray[np.uint64], rows: ScoreTable = _NOTHING) -> LowerFace:
        """Return a face of original fragments, from contacts with ``v`` inside."""
        fragment, row = np.unique(rows.v, return_inverse=True)
        best = np.zeros(len(fragment), np.int64), np.ones(len(fragment), np.int64)
        raise_reach(*best, row.astype(np.int32), rows.numerator, rows.denominator)
        return cls(fragment, positions(ids, fragment), *best)


Face = TypeVar("Face", UpperFace, LowerFace)
Table = TypeVar("Table", EdgeTable, UpperFace, LowerFace)


@dataclass(frozen=True)
class Graph:
    """Clusters of a superblock, the edges among them, and what lies across its faces.

    Attributes
    ----------
    nodes
        Smallest fragment id of each cluster, uint64, ascending.
    edges
        All edges between these nodes; parallel ones add up.
    upper, lower
        Faces on z, y, x.
    """

    nodes: NDArray[np.uint64]
    edges: EdgeTable
    upper: tuple[UpperFace, UpperFace, UpperFace]
    lower: tuple[LowerFace, LowerFace, LowerFace]

    @classmethod
    def of_fragments(
        cls,
        ids: NDArray[np.uint64],
        contacts: ScoreTable,
        above: Sequence[ScoreTable] = (),
        below: Sequence[ScoreTable] = (),
    ) -> Graph:
        """Return the graph of original fragments.

        Parameters
        ----------
        ids
            All fragments inside, ascending.
        contacts
            Contacts between two of them.
        above, below
            On z, y, x: contacts across the upper faces (``u`` inside) and the lower ones (``v``
            inside). Empty: nothing lies outside.

        Raises
        ------
        InputError
            If a contact names a fragment that `ids` does not hold.
        """
        ends = np.empty((len(contacts), 2), np.int32)
        ends[:, 0], ends[:, 1] = positions(ids, contacts.u), positions(ids, contacts.v)
        keys = np.stack((contacts.u, contacts.v), axis=1)
        edges = EdgeTable(ends, contacts.numerator, contacts.denominator, keys)
        z, y, x = (UpperFace.of_fragments(ids, rows) for rows in above or [_NOTHING] * 3)
        c, b, a = (LowerFace.of_fragments(ids, rows) for rows in below or [_NOTHING] * 3)
        return cls(ids, edges, (z, y, x), (c, b, a))


def positions(ids: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Return where ``values`` lie in the ascending ``ids``, int32.

    Raises
    ------
    InputError
        If `ids` does not hold a value.
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

    The edges of the graph given are used up: their memory may be written to.

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
    reach = np.zeros(len(nodes), np.int64), np.ones(len(nodes), np.int64)
    for face in (*graph.upper, *graph.lower):
        raise_reach(*reach, face.node, face.numerator, face.denominator)

    # Clusters grow along positive edges only, so an edge between two components of the graph of
    # positive edges cannot become positive here; and never, if one of them reaches nothing outside.
    component = connected_components(
        len(nodes), edges.ends[:, 0], edges.ends[:, 1], edges.numerator
    )
    alive = np.zeros(len(nodes), np.bool_)
    alive[component[reach[0] > 0]] = True
    inside, between = split_edges(
        component, alive, (edges.ends, edges.numerator, edges.denominator, edges.keys)
    )
    most = max(len(inside[0]), len(between[0]))
    if most > MAX_EDGES:
        raise InputError(
            f"contact graph: {most} edges are more than one process can hold ({MAX_EDGES}); set a"
            " smaller stitch.superblock"
        )
    done = agglomerate_edges(*inside, *reach)
    merges = MergeTable(
        nodes[done.merge_u], nodes[done.merge_v], done.merge_numerator, done.merge_denominator
    )
    n_between = pooled_edges(*between, done)
    left = EdgeTable(*(column[: done.edges] for column in inside))
    if n_between:
        left = concatenate(EdgeTable, [left, EdgeTable(*(c[:n_between] for c in between))])
    # From here on a cluster is known by its smallest node.
    stays = done.waiting & (done.cluster == np.arange(len(nodes)))
    fresh = np.cumsum(stays, dtype=np.int32) - np.int32(1)
    c, b, a = (_waiting(face, done, fresh) for face in graph.lower)
    z, y, x = (_waiting(face, done, fresh) for face in graph.upper)
    left = replace(left, ends=fresh[left.ends])
    return merges, Graph(nodes[stays], left, (z, y, x), (c, b, a))


def _take(table: Table, rows: Any) -> Table:
    return replace(table, **{f.name: getattr(table, f.name)[rows] for f in fields(table)})


def concatenate(kind: type[Table], tables: Sequence[Table]) -> Table:
    """Return the rows of several tables of one kind, of at least one."""
    if len(tables) == 1:
        return tables[0]
    names = [field.name for field in fields(kind)]
    return kind(*(np.concatenate([getattr(t, name) for t in tables]) for name in names))


def _waiting(face: Face, done: Contraction, fresh: NDArray[np.int32]) -> Face:
    """Return the rows of a face whose clusters wait, with their new rows among the nodes."""
    face = _take(face, done.waiting[face.node])
    return replace(face, node=fresh[done.cluster[face.node]])
