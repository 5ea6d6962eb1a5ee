"""Exact agglomeration: from contacts to merges.

**The rule.** Every contact contributes its affinity minus the threshold of its class; an edge's
score is the sum of contributions over the number of contacts. The best edge merges while its score
is positive; parallel edges add up. (Mean-affinity hierarchical agglomeration: Funke et al., TPAMI
2019; with per-class thresholds it is the stitching rule published with AGQ. Background is not a
node.) The result is a function of the contacts alone:

- Scores are ratios of integers and are compared exactly, never as rounded floats.
- Equal scores are ordered by the smallest original edge ``(u0, v0)`` among the contacts pooled in
  an edge. It is inherited as a minimum, so no two live edges are equal: a strict total order.
- A pooled score is a mediant, never above the larger of its parents, so merges come in
  non-increasing order, and any order of reciprocal-best merges gives the same result
  (reducibility: Bruynooghe 1977, Murtagh 1983).

**By parts.** A *superblock* holds a box of blocks. Its nodes are clusters, named by their smallest
fragment id. All contacts of its fragments are known, those with fragments outside too; merges
outside are not. But pooled edges never beat the better of their parents, so after any merges
outside, no edge of a node to the outside will beat the best one among its contacts: its *reach*.
Two nodes that are each other's best neighbour, better than the reach of both, would merge in the
global run too (reducibility), so they merge now. A node whose reach is as good as its best edge
inside has to wait, and so has a node whose best neighbour waits.

Nodes that neither wait nor have a positive edge to the outside have none inside either; they can
never merge again and leave with their edges. (No other edge can leave: between two nodes that may
still merge, even one whose own score stays negative is a veto, pooled with edges that are positive
outside.) What remains, the *residual* graph, goes up to the parent superblock, where it is joined
with its siblings' and with the contacts between them. For that, each contact across a face keeps
the original fragment outside, and the superblock there keeps which of its clusters holds that
fragment. At the root nothing lies outside.

**Classes** that may not merge (:mod:`classes`) change none of this. Whether two clusters may merge
is a property of their fragments, and merges only take pairs away. So a pair that may not merge has
no score, and pooling still never gives a better one; merges outside leave a node fewer edges, and
its reach a bound.

**Edits** (:mod:`edits`) do not either. Fragments that must be together are one node from the
outset, whose edges are pooled: a mediant again. A superblock that does not hold all of them cannot
pool, so each of them waits there, and with it whatever likes it best; the first superblock that
holds all makes them one. Parts that must stay apart have marks. A mark lies in one cluster, and a
cluster has the marks of all its fragments, so wherever two clusters meet it is known whether they
may merge: a property of their fragments again.

**Pieces.** A fragment of another model is cut into pieces (:mod:`names`) that are one node wherever
it is merged with others. A superblock makes one node of the pieces that it holds, and lets it wait
for those outside: as if its reach were above every score. Pooled edges are mediants here too. The
names of pieces order equal scores, so nothing depends on where fragments were cut.

:class:`Merge` is the step from one level of superblocks to the next, and :func:`agglomerate` the
case of one part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.stitch.classes import ClassRule, Kinds
from agq.blockwise.stitch.contacts import (
    PARTS,
    ContactTable,
    load_named_contacts,
    merge_contacts,
)
from agq.blockwise.stitch.edits import Constraints
from agq.blockwise.stitch.merge.kernel import (
    LARGEST_SUM,
    NO_PAIRS,
    NO_ROWS,
    TOO_LARGE,
    Contraction,
    agglomerate_edges,
    connected_components,
    exceed,
    pooled_edges,
    raise_reach,
    split_edges,
)
from agq.blockwise.stitch.names import LeafNames, leaf_names
from agq.blockwise.stitch.settings import HALF_UNITS, Thresholds
from agq.blockwise.stitch.superblocks import StitchFiles, Superblock, SuperblockTask
from agq.blockwise.storage.arrays import (
    Columns,
    Ids,
    Numbers,
    Pairs,
    Rows,
    load_arrays,
)
from agq.errors import InputError

_NONE = np.zeros(0, np.uint64)

MAX_EDGES = 2**30
"""Edges that one process can agglomerate (half-edges are numbered in 32 bits)."""

ROOTS = 64
"""Weight of a contact of one voxel pair, where weights are square roots."""

SAME = 2**20
"""Score, in half units, of a merge of two pieces of one fragment: above any affinity."""

_WAITS = 2**62
"""Reach of a node that has to wait for pieces outside."""


@dataclass(frozen=True)
class ScoreTable(Columns):
    """Scored contacts between fragments.

    Attributes
    ----------
    u, v
        Fragment ids, ``u < v``.
    numerator, denominator
        Score as an exact fraction in `Thresholds.units`, denominator positive: affinity above
        threshold is ``numerator / denominator / units``.
    """

    u: Ids
    v: Ids
    numerator: Numbers
    denominator: Numbers


def scores(
    contacts: ContactTable, thresholds: Thresholds
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the score of every contact row as numerator (`Thresholds.units`) and denominator.

    The denominator is what the contact counts where contacts are pooled: its touching voxel pairs,
    or for the weight ``sqrt`` the square root of their number, in 1/64 and rounded down. The
    numerator is then rounded up, which leaves every contact on its side of any threshold.

    Rows with denominator 0 are left out of the graph: they hold no evidence of the chosen kind. For
    the evidence ``both``, the margin raises the thresholds of affinities, not that of overlaps. A
    contact is complete in one face, so ``min_contact`` and ``sqrt`` are exact; on pooled edges they
    would not be.

    No product overflows: with ``S`` the largest sum of affinities and ``C`` the largest count, a
    union is at most ``2 C``, a denominator ``3 C``, and every threshold and the margin ``units``.
    So no numerator, nor a term of it, exceeds ``2 S units / 510 + 6 C units``, which is checked. A
    weight ``sqrt`` is at most 64 times the count.

    Raises
    ------
    InputError
        If scores could overflow int64.
    """
    across, within, overlap, margin = thresholds.in_units
    units, rows = thresholds.units, contacts
    scale = units // HALF_UNITS
    sums = largest(rows.across_sum, rows.within_sum)
    counts = largest(rows.across_count, rows.within_count, rows.overlap, rows.size_u, rows.size_v)
    most = ROOTS if thresholds.contact_weight == "sqrt" else 1
    if (2 * sums * scale + 6 * counts * units) * most >= LARGEST_SUM:
        raise InputError(TOO_LARGE)
    weight = rows.across_count
    value = scale * rows.across_sum - across * weight
    if thresholds.evidence != "affinity":
        union = rows.size_u + rows.size_v - rows.overlap
        agreement = units * rows.overlap - overlap * union
        if thresholds.evidence == "both":
            value = np.where(agreement < 0, scale * rows.across_sum - within * weight, value)
        else:
            value, weight = agreement, union
    if thresholds.min_contact > 0:
        enough = rows.across_count >= thresholds.min_contact
        value, weight = value * enough, weight * enough
    numerator = value + scale * rows.within_sum - within * rows.within_count
    denominator = weight + rows.within_count
    if thresholds.contact_weight == "sqrt":
        roots = np.sqrt((ROOTS**2 * denominator).astype(np.float64)).astype(np.int64)
        # In two parts, of which neither overflows: a contact has fewer than 2**36 pairs.
        whole, rest = np.divmod(numerator, np.maximum(denominator, 1))
        numerator = whole * roots - (-rest * roots // np.maximum(denominator, 1))
        denominator = roots
    return numerator - margin * denominator, denominator


def forced_score(thresholds: Thresholds) -> int:
    """Return the numerator, over 1, of the scores of merges that edits ask for.

    It is that of two pieces of one fragment, above any affinity and any margin.
    """
    return SAME * (thresholds.units // HALF_UNITS)


def largest(*columns: NDArray[np.int64]) -> int:
    """Return the largest magnitude in some columns, as a number that does not overflow."""
    return max(abs(int(end)) for c in columns for end in (c.min(initial=0), c.max(initial=0)))


def score_contacts(contacts: ContactTable, thresholds: Thresholds) -> ScoreTable:
    """Return the contacts that count, with their scores."""
    table = ScoreTable(contacts.u, contacts.v, *scores(contacts, thresholds))
    keep = table.denominator > 0
    return table if bool(keep.all()) else table.take(keep)


@dataclass(frozen=True)
class MergeTable(ScoreTable):
    """Merges in the order made (the dendrogram), and the score of each.

    Ids are the smallest fragment ids of the two clusters; ``u`` is that of the merged one.
    """

    def above(self, margin: Fraction) -> MergeTable:
        """Return the merges that remain if every threshold rises by ``margin``, not negative.

        The margin is in the units of the scores, and need not be whole.

        Raising all thresholds alike lowers every score by the same amount, so the order stays and
        the dendrogram is cut higher.
        """
        exact = margin.numerator, margin.denominator
        return self.take(exceed(self.numerator, self.denominator, *exact))


@dataclass(frozen=True)
class EdgeTable(Columns):
    """Scored edges between clusters.

    Attributes
    ----------
    ends
        Rows of both ends in the list of nodes.
    numerator, denominator
        Score as an exact fraction in `Thresholds.units`, denominator positive.
    keys
        Smallest original edge pooled in this one: what orders equal scores.
    """

    ends: Annotated[NDArray[np.int32], 2]
    numerator: Numbers
    denominator: Numbers
    keys: Pairs


@dataclass(frozen=True)
class UpperFace(Columns):
    """Contacts across an upper face of a superblock.

    Attributes
    ----------
    node
        Row of the cluster inside.
    outside
        The original fragment outside.
    keys
        The original contact, as in `EdgeTable`.
    numerator, denominator
        Its score.
    """

    node: Rows
    outside: Ids
    keys: Pairs
    numerator: Numbers
    denominator: Numbers

    @classmethod
    def of_fragments(cls, ids: Ids, scores: ScoreTable, keys: NDArray[np.uint64]) -> UpperFace:
        """Return a face of original fragments, from contacts with ``u`` inside."""
        node = positions(ids, scores.u)
        return cls(node, scores.v, keys, scores.numerator, scores.denominator)


@dataclass(frozen=True)
class LowerFace(Columns):
    """Fragments that have contacts across a lower face of a superblock.

    Attributes
    ----------
    fragment
        Original fragments inside, ascending.
    node
        Row of the cluster that each belongs to.
    numerator, denominator
        Best positive score of its contacts across the face; numerator 0: none is positive.
    """

    fragment: Ids
    node: Rows
    numerator: Numbers
    denominator: Numbers

    @classmethod
    def of_fragments(cls, ids: Ids, scores: ScoreTable) -> LowerFace:
        """Return a face of original fragments, from contacts with ``v`` inside."""
        fragment, row = np.unique(scores.v, return_inverse=True)
        best = np.zeros(len(fragment), np.int64), np.ones(len(fragment), np.int64)
        raise_reach(*best, row.astype(np.int32), scores.numerator, scores.denominator)
        return cls(fragment, positions(ids, fragment), *best)


@dataclass(frozen=True)
class Tags(Columns):
    """What edits say of nodes.

    Attributes
    ----------
    node
        Row of the node.
    tag
        What it has: a group of fragments, named by its smallest one.
    """

    node: Rows
    tag: Ids

    def on(self, row: NDArray[np.int32]) -> Tags:
        """Return the same, with nodes in other rows."""
        return replace(self, node=row[self.node])


@dataclass(frozen=True)
class Pieces(Columns):
    """Nodes that hold pieces of a fragment which others hold too.

    Attributes
    ----------
    node
        Row of the node.
    name
        Name of the fragment.
    level
        Level of the smallest superblock that holds all its pieces.
    """

    node: Rows
    name: Ids
    level: Numbers

    def on(self, row: NDArray[np.int32]) -> Pieces:
        """Return the same, with nodes in other rows."""
        return replace(self, node=row[self.node])


Face = TypeVar("Face", UpperFace, LowerFace, Tags, Pieces)


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
    kinds
        Kind of each node (:mod:`classes`), uint64; of no nodes where there are no classes.
    waiting
        Nodes that wait for other members of their group.
    marks
        Marks of nodes.
    pieces
        Nodes that are not, or not yet, whole fragments.
    """

    nodes: NDArray[np.uint64]
    edges: EdgeTable
    upper: tuple[UpperFace, UpperFace, UpperFace]
    lower: tuple[LowerFace, LowerFace, LowerFace]
    kinds: NDArray[np.uint64] = field(default_factory=lambda: _NONE)
    waiting: Tags = field(default_factory=Tags.empty)
    marks: Tags = field(default_factory=Tags.empty)
    pieces: Pieces = field(default_factory=Pieces.empty)

    @classmethod
    def of_fragments(
        cls,
        ids: NDArray[np.uint64],
        contacts: ScoreTable,
        above: Sequence[ScoreTable] = (),
        below: Sequence[ScoreTable] = (),
        kinds: NDArray[np.uint64] = _NONE,
        edits: Constraints | None = None,
        keys: Sequence[NDArray[np.uint64]] = (),
        pieces: Pieces | None = None,
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
        kinds
            Kind of each fragment; of none where there are no classes.
        edits
            What must be together, and what apart.
        keys
            Of `EdgeTable`, for the contacts and those above on z, y, x; empty: their fragments.
        pieces
            Fragments that are not whole; None: all are.

        Raises
        ------
        InputError
            If a contact names a fragment that is not among them.
        """
        ends = np.empty((len(contacts), 2), np.int32)
        ends[:, 0], ends[:, 1] = positions(ids, contacts.u), positions(ids, contacts.v)
        nothing = [ScoreTable.empty()] * 3
        above = above or nothing
        first, *keys = keys or [np.stack((t.u, t.v), axis=1) for t in (contacts, *above)]
        edges = EdgeTable(ends, contacts.numerator, contacts.denominator, first)
        z, y, x = itertools.starmap(
            partial(UpperFace.of_fragments, ids), zip(above, keys, strict=True)
        )
        c, b, a = (LowerFace.of_fragments(ids, scores) for scores in below or nothing)
        tags = () if edits is None else (_tags(ids, *edits.groups), _tags(ids, *edits.marks))
        made = cls(ids, edges, (z, y, x), (c, b, a), kinds, *tags)
        return made if pieces is None else replace(made, pieces=pieces)


def _tags(ids: Ids, fragments: Ids, tags: Ids) -> Tags:
    """Return the tags of those fragments that are among the ascending ids."""
    here = np.isin(fragments, ids)
    return Tags(positions(ids, fragments[here]), tags[here])


def positions(ids: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Return where ``values`` lie in the ascending ``ids``, int32.

    Raises
    ------
    InputError
        If a value is not among them.
    """
    position = np.searchsorted(ids, values)
    listed = position < len(ids)
    listed[listed] = ids[position[listed]] == values[listed]
    if not bool(listed.all()):
        raise InputError(
            f"contact table: fragment {values[~listed][0]} is not among the {len(ids)} fragments"
        )
    return position.astype(np.int32)


def contract(
    graph: Graph,
    bars: NDArray[np.uint64] = _NONE,
    edits: Constraints | None = None,
    forced: int = SAME,
    level: int = 0,
) -> tuple[MergeTable, Graph]:
    """Merge all that is certain in a part of the graph.

    The edges of the graph given are used up: their memory may be written to.

    Parameters
    ----------
    graph
        The part.
    bars
        Of `classes.Kinds`.
    edits
        What must be together, and what apart.
    forced
        Numerator of the scores of merges that edits ask for, and of those of pieces.
    level
        Of the superblock that is this part.

    Returns
    -------
    MergeTable
        Merges made: those that edits ask for, then best first.
    Graph
        The residual: nodes that may merge with more knowledge, and the edges among them.

    Raises
    ------
    InputError
        If there are more than :data:`MAX_EDGES` edges, or sums do not fit in 64 bits.
    """
    joined, graph = _join_pieces(graph, forced)
    asked, graph = _contract_groups(graph, edits, forced)
    nodes, edges = graph.nodes, graph.edges
    reach = np.zeros(len(nodes), np.int64), np.ones(len(nodes), np.int64)
    for face in (*graph.upper, *graph.lower):
        raise_reach(*reach, face.node, face.numerator, face.denominator)
    pieces = graph.pieces.take(graph.pieces.level > level)
    reach[0][pieces.node], reach[1][pieces.node] = _WAITS, 1

    # Clusters grow along positive edges only, so an edge between two components of the graph of
    # positive edges cannot become positive here; and never, if one of them reaches nothing outside.
    component = connected_components(
        len(nodes), edges.ends[:, 0], edges.ends[:, 1], edges.numerator
    )
    alive = np.zeros(len(nodes), np.bool_)
    alive[component[reach[0] > 0]] = True
    alive[component[graph.waiting.node]] = True
    inside, between = split_edges(
        component, alive, (edges.ends, edges.numerator, edges.denominator, edges.keys)
    )
    most = max(len(inside[0]), len(between[0]))
    if most > MAX_EDGES:
        raise InputError(
            f"contact graph: clusters that may still merge have {most:,} edges, and one process"
            f" takes {MAX_EDGES:,}; higher stitch.across and stitch.within (or"
            " stitch.margin_floor), or stitch.min_contact, leave fewer"
        )
    marked = (NO_ROWS, NO_PAIRS) if edits is None else _rivals(graph.marks, edits)
    done = agglomerate_edges(*inside, *reach, graph.kinds, bars, graph.waiting.node, *marked)
    merges = MergeTable(
        nodes[done.merge_u], nodes[done.merge_v], done.merge_numerator, done.merge_denominator
    )
    n_between = pooled_edges(*between, done)
    left = EdgeTable(*(column[: done.edges] for column in inside))
    if n_between:
        left = EdgeTable.concatenate([left, EdgeTable(*(c[:n_between] for c in between))])
    # From here on a cluster is known by its smallest node.
    stays = done.waiting & (done.cluster == np.arange(len(nodes)))
    fresh = np.cumsum(stays, dtype=np.int32) - np.int32(1)
    c, b, a = (_waiting(face, done, fresh) for face in graph.lower)
    z, y, x = (_waiting(face, done, fresh) for face in graph.upper)
    left = replace(left, ends=fresh[left.ends])
    kinds = done.kinds[stays[: len(done.kinds)]]
    groups, marks = (_waiting(tags, done, fresh) for tags in (graph.waiting, graph.marks))
    pieces = _waiting(pieces, done, fresh)
    merges = MergeTable.concatenate([table for table in (joined, asked, merges) if len(table)])
    return merges, Graph(nodes[stays], left, (z, y, x), (c, b, a), kinds, groups, marks, pieces)


def _contract_groups(
    graph: Graph, edits: Constraints | None, forced: int
) -> tuple[MergeTable, Graph]:
    """Make one node of each group of which all members are here."""
    waiting = graph.waiting
    if edits is None or not len(waiting):
        return MergeTable.empty(), graph
    whole = edits.whole(waiting.tag)
    ready = waiting.take(np.flatnonzero(whole))
    ready = ready.take(np.lexsort((ready.node, ready.tag)))
    first = np.unique(ready.tag, return_index=True)[1]
    # Nodes are in the order of fragments: the first is the smallest.
    into = np.repeat(ready.node[first], np.diff(np.append(first, len(ready))))
    row = np.arange(len(graph.nodes), dtype=np.int32)
    row[ready.node] = into
    joins = ready.node != into
    into, joined = into[joins], ready.node[joins]
    ones = np.ones(len(joined), np.int64)
    asked = MergeTable(graph.nodes[into], graph.nodes[joined], forced * ones, ones)
    ends = row[graph.edges.ends]
    edges = replace(graph.edges, ends=ends).take(ends[:, 0] != ends[:, 1])
    kinds = graph.kinds.copy()
    if len(kinds):
        np.bitwise_or.at(kinds, into, kinds[joined])
    z, y, x = (replace(face, node=row[face.node]) for face in graph.upper)
    c, b, a = (replace(face, node=row[face.node]) for face in graph.lower)
    rest = waiting.take(np.flatnonzero(~whole)).on(row)
    marks, pieces = graph.marks.on(row), graph.pieces.on(row)
    return asked, Graph(graph.nodes, edges, (z, y, x), (c, b, a), kinds, rest, marks, pieces)


def _rivals(marks: Tags, edits: Constraints) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the node of each mark that is here, and the pairs of marks that keep apart."""
    marks = marks.take(np.argsort(marks.tag, kind="stable"))
    pairs = edits.rivals
    pairs = pairs[np.isin(pairs, marks.tag).all(axis=1)]
    return marks.node, np.searchsorted(marks.tag, pairs).astype(np.int32)


def _join_pieces(graph: Graph, forced: int) -> tuple[MergeTable, Graph]:
    """Make one node of all pieces of a name; the nodes given up stay, without edges."""
    pieces = graph.pieces
    if not len(pieces):
        return MergeTable.empty(), graph
    pieces = pieces.take(np.lexsort((pieces.node, pieces.name)))
    new = np.append(True, pieces.name[1:] != pieces.name[:-1])
    first = pieces.node[np.flatnonzero(new)[np.cumsum(new) - 1]]
    # A node may hold pieces of several names that edits join.
    row = connected_components(len(graph.nodes), first, pieces.node)
    gone = np.flatnonzero(row != np.arange(len(row)))
    ones = np.ones(len(gone), np.int64)
    merges = MergeTable(graph.nodes[row[gone]], graph.nodes[gone], forced * ones, ones)
    edges = replace(graph.edges, ends=row[graph.edges.ends])
    loops = edges.ends[:, 0] == edges.ends[:, 1]
    if bool(loops.any()):
        edges = edges.take(~loops)
    kinds = graph.kinds.copy()
    if len(kinds):
        np.bitwise_or.at(kinds, row[gone], kinds[gone])
    z, y, x = (replace(face, node=row[face.node]) for face in graph.upper)
    c, b, a = (replace(face, node=row[face.node]) for face in graph.lower)
    waiting, marks = graph.waiting.on(row), graph.marks.on(row)
    pieces = pieces.take(new).on(row)
    return merges, Graph(graph.nodes, edges, (z, y, x), (c, b, a), kinds, waiting, marks, pieces)


def _waiting(face: Face, done: Contraction, fresh: NDArray[np.int32]) -> Face:
    """Return the rows whose clusters wait, with their new rows among the nodes."""
    face = face.take(done.waiting[face.node])
    return replace(face, node=fresh[done.cluster[face.node]])


def join(
    children: Sequence[tuple[Superblock, Graph]],
    column: Callable[[Superblock, str], NDArray] | None = None,
) -> Graph:
    """Return the graph of a parent: its children's, and the edges between them.

    Parameters
    ----------
    children
        Of one parent: place and residual graph.
    column
        Returns a column of a child's edges; they are then not taken from its graph, so that
        memory holds those of all children once.
    """
    every = np.concatenate([graph.nodes for _, graph in children])
    order = np.argsort(every, kind="stable")
    row = np.empty(len(every), np.int32)
    row[order] = np.arange(len(every), dtype=np.int32)
    starts = np.cumsum([0, *(len(graph.nodes) for _, graph in children)])
    rows = {
        child: row[start : start + len(graph.nodes)]
        for (child, graph), start in zip(children, starts, strict=False)
    }
    graphs = dict(children)
    across: list[EdgeTable] = []
    # A parent at the end of the grid has children on one side only.
    upper: list[list[UpperFace]] = [[], [], []]
    lower: list[list[LowerFace]] = [[], [], []]
    for child, graph in children:
        for axis in range(3):
            above, below = graph.upper[axis], graph.lower[axis]
            if child.index[axis] % 2:
                upper[axis].append(replace(above, node=rows[child][above.node]))
                continue
            lower[axis].append(replace(below, node=rows[child][below.node]))
            other = child.neighbor(axis, 1)
            if other in graphs:
                beyond = graphs[other].lower[axis]
                beyond = replace(beyond, node=rows[other][beyond.node])
                across.append(_across(replace(above, node=rows[child][above.node]), beyond))
    edges = _edges(rows, column or (lambda child, name: getattr(graphs[child].edges, name)), across)
    z, y, x = (UpperFace.concatenate(faces) for faces in upper)
    c, b, a = (_ascending(LowerFace.concatenate(faces)) for faces in lower)
    kinds = np.concatenate([graph.kinds for _, graph in children])
    waiting = Tags.concatenate([graph.waiting.on(rows[child]) for child, graph in children])
    marks = Tags.concatenate([graph.marks.on(rows[child]) for child, graph in children])
    pieces = Pieces.concatenate([graph.pieces.on(rows[child]) for child, graph in children])
    kinds = kinds[order[: len(kinds)]]
    return Graph(every[order], edges, (z, y, x), (c, b, a), kinds, waiting, marks, pieces)


def _edges(
    rows: Mapping[Superblock, NDArray[np.int32]],
    column: Callable[[Superblock, str], NDArray],
    across: Sequence[EdgeTable],
) -> EdgeTable:
    """Return the edges of children, given with the new rows of their nodes, and those between."""
    columns: dict[str, NDArray] = {}
    parts = [new[column(child, "ends")] for child, new in rows.items()]
    columns["ends"] = np.concatenate([*parts, *(table.ends for table in across)])
    del parts
    # Column by column and part by part: memory holds the edges once.
    for name in EdgeTable.names()[1:]:
        at = 0
        for part in itertools.chain(
            (column(child, name) for child in rows), (getattr(table, name) for table in across)
        ):
            if name not in columns:
                columns[name] = np.empty((len(columns["ends"]), *part.shape[1:]), part.dtype)
            columns[name][at : at + len(part)] = part
            at += len(part)
    return EdgeTable(**columns)


def _across(above: UpperFace, below: LowerFace) -> EdgeTable:
    """Return the edges between two superblocks whose clusters still wait on both sides."""
    if not len(below):
        return EdgeTable.empty()
    place = np.minimum(np.searchsorted(below.fragment, above.outside), len(below) - 1)
    waits = np.flatnonzero(below.fragment[place] == above.outside)
    contacts = above.take(waits)
    ends = np.stack((contacts.node, below.node[place[waits]]), axis=1)
    return EdgeTable(ends, contacts.numerator, contacts.denominator, contacts.keys)


def _ascending(face: LowerFace) -> LowerFace:
    return face.take(np.argsort(face.fragment, kind="stable"))


@dataclass(frozen=True)
class Agglomeration:
    """Segments of all fragments.

    Attributes
    ----------
    ids
        Fragment ids, uint64, sorted.
    representatives
        Smallest fragment id of each fragment's segment, uint64, in the order of ``ids``.
    merges
        The merges that made them.
    """

    ids: NDArray[np.uint64]
    representatives: NDArray[np.uint64]
    merges: MergeTable


def agglomerate(
    ids: NDArray[np.uint64],
    contacts: ContactTable,
    thresholds: Thresholds,
    kinds: Kinds | None = None,
    edits: Constraints | None = None,
    names: NDArray[np.uint64] | None = None,
) -> Agglomeration:
    """Merge fragments best first while the score is positive.

    Parameters
    ----------
    ids
        All fragment ids, uint64, any order, distinct, without 0 (background is not a node).
    contacts
        Contacts between them; repeated rows add up.
    thresholds
        What they must show.
    kinds
        Which of them may not merge; None: all may.
    edits
        What must be together, and what apart.
    names
        Of pieces of fragments, the name of each id (:mod:`names`); None: ids are whole fragments.

    Raises
    ------
    InputError
        If a contact names an unknown fragment, an id is 0 or repeated, or there are more edges
        than one process can hold.
    """
    ids = np.asarray(ids, np.uint64)
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    names = ids if names is None else names[order]
    if len(ids) and (ids[0] == 0 or bool(np.any(ids[1:] == ids[:-1]))):
        raise InputError("fragment ids: they must be distinct and not 0 (background)")
    contacts = merge_contacts([contacts])
    table = score_contacts(contacts, thresholds)
    ends = np.stack([names[positions(ids, end)] for end in (table.u, table.v)], axis=1)
    ends.sort(axis=1)
    own, bars = (_NONE, _NONE) if kinds is None else (kinds.of(names), kinds.bars)
    keys, pieces = [ends, *[ends[:0]] * 3], _pieces(names, LeafNames.empty())
    graph = Graph.of_fragments(ids, table, (), (), own, edits, keys, pieces)
    merges, _ = contract(graph, bars, edits, forced_score(thresholds))
    roots = connected_components(len(ids), positions(ids, merges.u), positions(ids, merges.v))
    return Agglomeration(ids, ids[roots], merges)


def _pieces(names: Ids, shared: LeafNames) -> Pieces:
    """Return the nodes that are not whole fragments, of the names of all nodes of a leaf."""
    distinct, row, counts = np.unique(names, return_inverse=True, return_counts=True)
    level = np.full(len(distinct), -1, np.int64)
    level[counts > 1] = 0
    level[np.searchsorted(distinct, shared.name)] = shared.levels
    node = np.flatnonzero(level[row] >= 0).astype(np.int32)
    return Pieces(node, names[node], level[row[node]])


@dataclass(frozen=True)
class Merge(SuperblockTask):
    """Merge what is certain in superblocks of one level.

    Attributes
    ----------
    classes
        Which fragments may not merge; None: all may.
    edits
        Whether there are edits, in the file of `StitchFiles`.
    """

    thresholds: Thresholds
    classes: ClassRule | None = None
    edits: bool = False

    def run(self) -> NDArray[np.int64]:
        """Write the merges and the residual graph of each superblock.

        Returns
        -------
        ndarray
            Of leaves: fragments with a class, fragments with several that may not merge, and
            contacts between fragments that may not merge; else zeros.
        """
        files = StitchFiles(self.run_dir)
        counts = np.zeros(3, np.int64)
        edits = Constraints.load(files.edits, "edits") if self.edits else None
        for superblock, children in self.items:
            if not files.merges(superblock).exists():
                self._merge(files, superblock, children, edits)
            if self.classes is not None and superblock.level == 0:
                counts += load_arrays(files.merges(superblock), "classes")["classes"]
        return counts

    def _merge(
        self,
        files: StitchFiles,
        superblock: Superblock,
        children: Sequence[Superblock],
        edits: Constraints | None,
    ) -> None:
        counted: dict[str, NDArray] = {}
        if superblock.level == 0:
            graph, counts = _leaf_graph(files, superblock, self.thresholds, self.classes, edits)
            if self.classes is not None:
                counted = {"classes": counts}
        else:
            graph = _join_children(files, children, edits=self.edits)
        bars = _NONE if self.classes is None else self.classes.bars
        merges, residual = contract(
            graph, bars, edits, forced_score(self.thresholds), superblock.level
        )
        arrays = residual.edges.arrays("edges") | {"nodes": residual.nodes}
        if self.classes is not None:
            arrays["kinds"] = residual.kinds
        arrays |= residual.pieces.arrays("pieces")
        if edits is not None:
            arrays |= residual.waiting.arrays("waiting") | residual.marks.arrays("marks")
        for axis in range(3):
            arrays |= residual.upper[axis].arrays(f"upper{axis}")
            arrays |= residual.lower[axis].arrays(f"lower{axis}")
        files.save(files.graph(superblock), arrays)
        # Written last: once it exists, so does the graph.
        columns = merges.arrays("merges") | {"up": residual.nodes} | counted
        files.save(files.merges(superblock), columns)


def _leaf_graph(
    files: StitchFiles,
    leaf: Superblock,
    thresholds: Thresholds,
    classes: ClassRule | None,
    edits: Constraints | None,
) -> tuple[Graph, NDArray[np.int64]]:
    """Return the graph of a leaf and the counts of `Merge.run`.

    Contacts across its lower faces are in its neighbours' files.
    """
    path = files.evidence(leaf)
    arrays = load_arrays(path, "nodes.ids", "names")
    ids = arrays["nodes.ids"]
    names = arrays.get("names")
    shared = LeafNames.empty() if names is None else leaf_names(files, leaf)
    around = None if classes is None else classes.around(files, leaf)
    counts = np.zeros(3, np.int64)

    def scored(file: Path, part: str) -> tuple[ScoreTable, NDArray[np.uint64]]:
        if not file.exists():
            return ScoreTable.empty(), np.zeros((0, 2), np.uint64)
        contacts, keys = load_named_contacts(file, part)
        table = ScoreTable(contacts.u, contacts.v, *scores(contacts, thresholds))
        keep = table.denominator > 0
        if around is not None:
            allowed = around.allow(keys[:, 0], keys[:, 1])
            if file == path:
                counts[2] += int((keep & ~allowed).sum())
            keep &= allowed
        return (table, keys) if bool(keep.all()) else (table.take(keep), keys[keep])

    (inside, own), *above = (scored(path, part) for part in PARTS)
    below = [scored(files.evidence(leaf.neighbor(axis, -1)), f"face{axis}")[0] for axis in range(3)]
    names = ids if names is None else names
    kinds = _NONE if around is None else around.of(names)
    if classes is not None:
        counts[:2] = classes.count(files, leaf, names, shared)
    faces = [table for table, _ in above]
    keys = [own, *(keys for _, keys in above)]
    pieces = _pieces(names, shared)
    return Graph.of_fragments(ids, inside, faces, below, kinds, edits, keys, pieces), counts


def _join_children(files: StitchFiles, children: Sequence[Superblock], *, edits: bool) -> Graph:
    """Return the graph of a parent; edges are read column by column, so that memory holds one."""

    def column(child: Superblock, name: str) -> NDArray:
        return load_arrays(files.graph(child), f"edges.{name}")[f"edges.{name}"]

    graphs = []
    for child in children:
        parts = ("nodes", "kinds", "pieces", "upper", "lower", "waiting", "marks")
        arrays = load_arrays(files.graph(child), *parts)
        z, y, x = (UpperFace.of_arrays(f"upper{axis}", arrays) for axis in range(3))
        c, b, a = (LowerFace.of_arrays(f"lower{axis}", arrays) for axis in range(3))
        kinds = arrays.get("kinds", _NONE)
        graph = Graph(arrays["nodes"], EdgeTable.empty(), (z, y, x), (c, b, a), kinds)
        graph = replace(graph, pieces=Pieces.of_arrays("pieces", arrays))
        if edits:
            waiting, marks = (Tags.of_arrays(name, arrays) for name in ("waiting", "marks"))
            graph = replace(graph, waiting=waiting, marks=marks)
        graphs.append((child, graph))
    return join(graphs, column)
