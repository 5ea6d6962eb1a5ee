"""Superblocks: boxes of blocks, joined two by two on every axis until one is left.

Level 0 are the leaves; the superblock at ``(z, y, x)`` of level ``k + 1`` has the up to eight
children ``(2 z + {0, 1}, 2 y + {0, 1}, 2 x + {0, 1})`` of level ``k``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.stitch.merge.graph import EdgeTable, Graph, LowerFace, UpperFace, concatenate
from agq.blockwise.volumes.triples import Triple

_NO_IDS = np.zeros(0, np.uint64)


@dataclass(frozen=True, order=True)
class Superblock:
    """Place of a superblock: level, and index (z, y, x) on that level."""

    level: int
    index: Triple

    @property
    def name(self) -> str:
        """Name of its files."""
        return "{}/{}-{}-{}".format(self.level, *self.index)

    @property
    def parent(self) -> Superblock:
        """The superblock that holds it on the next level."""
        z, y, x = (i // 2 for i in self.index)
        return Superblock(self.level + 1, (z, y, x))

    def neighbor(self, axis: int, step: int) -> Superblock:
        """Return the superblock beside it on an axis; it need not exist."""
        z, y, x = (i + step * (d == axis) for d, i in enumerate(self.index))
        return Superblock(self.level, (z, y, x))


@dataclass(frozen=True)
class SuperblockTree:
    """The superblocks that hold the blocks of a run.

    Parameters
    ----------
    grid_shape
        Blocks of the whole volume, (z, y, x).
    leaf_shape
        Blocks of a leaf, (z, y, x).
    """

    grid_shape: Triple
    leaf_shape: Triple

    @property
    def depth(self) -> int:
        """Number of levels."""
        longest = max(
            -(-n // size) for n, size in zip(self.grid_shape, self.leaf_shape, strict=True)
        )
        return (longest - 1).bit_length() + 1

    def leaves(self, numbers: NDArray[np.int64]) -> list[tuple[Superblock, NDArray[np.int64]]]:
        """Cut blocks into leaves, in C order of the leaves; blocks ascending."""
        if not len(numbers):
            return []
        numbers = np.sort(numbers)
        place = np.stack(np.unravel_index(numbers, self.grid_shape), axis=1)
        index = place // np.array(self.leaf_shape)
        order = np.lexsort((*index.T[::-1],))
        index, numbers = index[order], numbers[order]
        new = np.flatnonzero((index[1:] != index[:-1]).any(axis=1)) + 1
        corners = index[np.concatenate(([0], new))].tolist()
        return [
            (Superblock(0, (z, y, x)), part)
            for (z, y, x), part in zip(corners, np.split(numbers, new), strict=True)
        ]

    def levels(self, leaves: Sequence[Superblock]) -> list[dict[Superblock, list[Superblock]]]:
        """Return, for levels 1, 2, ... up to the root, each superblock and its children."""
        found, below = [], sorted(leaves)
        for _ in range(1, self.depth):
            level: dict[Superblock, list[Superblock]] = {}
            for child in below:
                level.setdefault(child.parent, []).append(child)
            found.append(level)
            below = sorted(level)
        return found


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
    # Nothing at first: a parent at the end of the grid has children on one side only.
    upper = [[UpperFace.of_fragments(_NO_IDS)] for _ in range(3)]
    lower = [[LowerFace.of_fragments(_NO_IDS)] for _ in range(3)]
    for child, graph in children:
        for axis in range(3):
            above, below = graph.upper[axis], graph.lower[axis]
            if child.index[axis] % 2:
                upper[axis].append(replace(above, node=rows[child][above.node]))
                continue
            lower[axis].append(replace(below, node=rows[child][below.node]))
            other = child.neighbor(axis, 1)
            if other in graphs:
                there = graphs[other].lower[axis]
                there = replace(there, node=rows[other][there.node])
                across.append(_across(replace(above, node=rows[child][above.node]), there))
    own = column or (lambda child, name: getattr(graphs[child].edges, name))
    edges = _edges(rows, own, across)
    z, y, x = (concatenate(UpperFace, faces) for faces in upper)
    c, b, a = (_ascending(concatenate(LowerFace, faces)) for faces in lower)
    return Graph(every[order], edges, (z, y, x), (c, b, a))


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
    for field in fields(EdgeTable):
        if field.name == "ends":
            continue
        at = 0
        for part in itertools.chain(
            (column(child, field.name) for child in rows),
            (getattr(table, field.name) for table in across),
        ):
            if field.name not in columns:
                shape = (len(columns["ends"]), *part.shape[1:])
                columns[field.name] = np.empty(shape, part.dtype)
            columns[field.name][at : at + len(part)] = part
            at += len(part)
    return EdgeTable(**columns)


def _across(above: UpperFace, below: LowerFace) -> EdgeTable:
    """Return the edges between two superblocks whose clusters still wait on both sides."""
    outside = above.fragments[:, 1]
    place = np.minimum(np.searchsorted(below.fragment, outside), max(len(below.fragment) - 1, 0))
    known = (
        np.flatnonzero(below.fragment[place] == outside)
        if len(below.fragment)
        else np.zeros(0, np.int64)
    )
    ends = np.stack((above.node[known], below.node[place[known]]), axis=1)
    return EdgeTable(ends, above.numerator[known], above.denominator[known], above.fragments[known])


def _ascending(face: LowerFace) -> LowerFace:
    order = np.argsort(face.fragment, kind="stable")
    return LowerFace(*(getattr(face, field.name)[order] for field in fields(face)))
