"""Superblocks: boxes of blocks, joined two by two on every axis until one is left.

Level 0 are the leaves; the superblock at ``(z, y, x)`` of level ``k + 1`` has the up to eight
children ``(2 z + {0, 1}, 2 y + {0, 1}, 2 x + {0, 1})`` of level ``k``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockwise.agglomerate_graph import EdgeTable, Graph
from blockwise.grid import Voxels

Faces = tuple[EdgeTable, EdgeTable, EdgeTable]
"""Edges across the upper faces of a superblock on z, y, x: ``u`` inside, ``v`` outside."""

_OUTER = np.uint8(0b111111)


@dataclass(frozen=True, order=True)
class Superblock:
    """Place of a superblock: level, and index (z, y, x) on that level."""

    level: int
    index: Voxels

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

    grid_shape: Voxels
    leaf_shape: Voxels

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
    children: Sequence[tuple[Superblock, Graph, Faces]],
) -> tuple[Graph, Faces]:
    """Return the graph of a parent: its children's, and the edges between them.

    Parameters
    ----------
    children
        Of one parent: place, residual graph, and edges across the upper faces.

    Returns
    -------
    Graph
        Its nodes are open towards faces of the parent only.
    Faces
        Edges across the upper faces of the parent.
    """
    inner: list[EdgeTable] = []
    outer: tuple[list[EdgeTable], ...] = ([], [], [])
    nodes, outside = [], []
    for child, graph, faces in children:
        mask = 0
        inner.append(graph.edges)
        for axis in range(3):
            upper = child.index[axis] % 2
            # A lower child's upper face lies inside the parent, an upper child's lower one.
            mask |= 1 << (axis if upper else 3 + axis)
            (outer[axis] if upper else inner).append(faces[axis])
        nodes.append(graph.nodes)
        outside.append(graph.outside & np.uint8(_OUTER & ~np.uint8(mask)))
    every = np.concatenate(nodes)
    order = np.argsort(every, kind="stable")
    graph = Graph(every[order], np.concatenate(outside)[order], EdgeTable.concatenate(inner))
    z, y, x = (EdgeTable.concatenate(face) for face in outer)
    return graph, (z, y, x)
