"""Exact greedy agglomeration of a contact graph.

Every contact contributes its affinity minus the threshold of its class; an edge's score is the sum
of contributions over the number of contacts. The best edge merges while its score is positive;
parallel edges add up. (Mean-affinity hierarchical agglomeration: Funke et al., TPAMI 2019; with
per-class thresholds it is the stitching rule published with AGQ. Background is not a node.)

The result is a function of the contacts alone:

- Scores are ratios of integers and are compared exactly, never as rounded floats.
- Equal scores are ordered by the smallest original edge ``(u0, v0)`` among the contacts pooled in
  an edge. It is inherited as a minimum, so no two live edges are equal: a strict total order.
- A pooled score is a mediant, never above the larger of its parents, so merges come in
  non-increasing order, and any order of reciprocal-best merges gives the same result
  (reducibility: Bruynooghe 1977, Murtagh 1983). The hierarchy in :mod:`merge.graph` rests on
  this; :class:`Merge` is its step from one level of superblocks to the next, and
  :func:`agglomerate` its case of one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.stitch.contacts import (
    ContactTable,
    load_contacts,
    merge_contacts,
)
from agq.blockwise.stitch.merge.graph import (
    EdgeTable,
    Graph,
    LowerFace,
    MergeTable,
    ScoreTable,
    UpperFace,
    contract,
    join,
    positions,
)
from agq.blockwise.stitch.merge.kernel import connected_components
from agq.blockwise.stitch.settings import HALF_UNITS, Thresholds
from agq.blockwise.stitch.superblocks import StitchFiles, Superblock, SuperblockTask
from agq.blockwise.storage.arrays import load_arrays, save_arrays
from agq.errors import InputError


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


def scores(
    contacts: ContactTable, thresholds: Thresholds
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the score of every contact row as numerator (half units) and denominator.

    Rows with denominator 0 are left out of the graph: they hold no evidence of the chosen kind. For
    the evidence ``both``, the margin raises the thresholds of affinities, not that of overlaps. A
    contact is complete in one face, so ``min_contact`` is exact; on pooled edges it would not be.
    """
    across, within, overlap = thresholds.half_units
    margin, rows = thresholds.margin_half_units, contacts
    weight = rows.across_count
    value = rows.across_sum - across * weight
    if thresholds.evidence != "affinity":
        union = rows.size_u + rows.size_v - rows.overlap
        agreement = HALF_UNITS * rows.overlap - overlap * union
        if thresholds.evidence == "both":
            value = np.where(agreement < 0, rows.across_sum - within * weight, value)
        else:
            value, weight = agreement, union
    if thresholds.min_contact > 0:
        enough = rows.across_count >= thresholds.min_contact
        value, weight = value * enough, weight * enough
    # Pieces of one fragment belong together, even against the evidence.
    same = rows.across_sum > HALF_UNITS * rows.across_count
    if bool(same.any()):
        value = np.where(same, rows.across_sum, value)
        weight = np.where(same, rows.across_count, weight)
    numerator = value + rows.within_sum - within * rows.within_count
    denominator = weight + rows.within_count
    return numerator - margin * denominator, denominator


def score_contacts(contacts: ContactTable, thresholds: Thresholds) -> ScoreTable:
    """Return the contacts that count, with their scores."""
    table = ScoreTable(contacts.u, contacts.v, *scores(contacts, thresholds))
    keep = table.denominator > 0
    return table if bool(keep.all()) else table.take(keep)


def agglomerate(
    ids: NDArray[np.uint64], contacts: ContactTable, thresholds: Thresholds
) -> Agglomeration:
    """Merge fragments best first while the score is positive.

    Parameters
    ----------
    ids
        All fragment ids, uint64, any order, distinct, without 0 (background is not a node).
    contacts
        Contacts between them; repeated rows add up.

    Raises
    ------
    InputError
        If a contact names an unknown fragment, an id is 0 or repeated, or there are more edges
        than one process can hold.
    """
    ids = np.sort(np.asarray(ids, np.uint64))
    if len(ids) and (ids[0] == 0 or bool(np.any(ids[1:] == ids[:-1]))):
        raise InputError("fragment ids: they must be distinct and not 0 (background)")
    contacts = merge_contacts([contacts])
    merges, _ = contract(Graph.of_fragments(ids, score_contacts(contacts, thresholds)))
    roots = connected_components(len(ids), positions(ids, merges.u), positions(ids, merges.v))
    return Agglomeration(ids, ids[roots], merges)


@dataclass(frozen=True)
class Merge(SuperblockTask):
    """Merge what is certain in superblocks of one level."""

    thresholds: Thresholds

    def run(self) -> None:
        """Write the merges and the residual graph of each superblock."""
        files = StitchFiles(self.run_dir)
        for superblock, children in self.items:
            if files.merges(superblock).exists():
                continue
            if superblock.level == 0:
                graph = _leaf_graph(files, superblock, self.thresholds)
            else:
                graph = _join_children(files, children)
            merges, residual = contract(graph)
            arrays = residual.edges.arrays("edges") | {"nodes": residual.nodes}
            for axis in range(3):
                arrays |= residual.upper[axis].arrays(f"upper{axis}")
                arrays |= residual.lower[axis].arrays(f"lower{axis}")
            save_arrays(files.graph(superblock), arrays)
            # Written last: once it exists, so does the graph.
            save_arrays(files.merges(superblock), merges.arrays("merges") | {"up": residual.nodes})


def _leaf_graph(files: StitchFiles, leaf: Superblock, thresholds: Thresholds) -> Graph:
    """Return the graph of a leaf; contacts across its lower faces are in its neighbours' files."""
    path = files.evidence(leaf)
    ids = load_arrays(path, "nodes.ids")["nodes.ids"]

    def scored(file: Path, part: str) -> ScoreTable:
        contacts = load_contacts(file, part) if file.exists() else ContactTable.empty()
        return score_contacts(contacts, thresholds)

    above = [scored(path, f"face{axis}") for axis in range(3)]
    below = [scored(files.evidence(leaf.neighbor(axis, -1)), f"face{axis}") for axis in range(3)]
    return Graph.of_fragments(ids, scored(path, "contacts"), above, below)


def _join_children(files: StitchFiles, children: Sequence[Superblock]) -> Graph:
    """Return the graph of a parent; edges are read column by column, so that memory holds one."""

    def column(child: Superblock, name: str) -> NDArray:
        return load_arrays(files.graph(child), f"edges.{name}")[f"edges.{name}"]

    graphs = []
    for child in children:
        arrays = load_arrays(files.graph(child), "nodes", "upper", "lower")
        z, y, x = (UpperFace.of_arrays(f"upper{axis}", arrays) for axis in range(3))
        c, b, a = (LowerFace.of_arrays(f"lower{axis}", arrays) for axis in range(3))
        graphs.append((child, Graph(arrays["nodes"], EdgeTable.empty(), (z, y, x), (c, b, a))))
    return join(graphs, column)
