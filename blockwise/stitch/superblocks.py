"""Superblocks: boxes of blocks, joined two by two on every axis until one is left.

Level 0 are the leaves; the superblock at ``(z, y, x)`` of level ``k + 1`` has the up to eight
children ``(2 z + {0, 1}, 2 y + {0, 1}, 2 x + {0, 1})`` of level ``k``. Each has files of its own in
the run folder:

::

    contacts/layout.json        blocks of a leaf superblock
    contacts/present.npy        which blocks take part
    contacts/0/Z-Y-X.npz        fragments and contacts of a leaf
    contacts/shared/R.npy       names of fragments that several leaves hold; not always
    classes/0/Z-Y-X.npz         voxels of each class in fragments of a leaf; not always
    agglomeration/L/Z-Y-X.npz   merges of a superblock, and the nodes it hands up
    agglomeration/edits.npz     fragments that edits join or keep apart; not always
    agglomeration/L/Z-Y-X.graph.npz  its residual graph; removed when the root is done
    lut/cut/L/Z-Y-X.npz         clusters of a superblock at the margin in use
    lut/names/L/Z-Y-X.npz       segments that its clusters belong to in the end
    lut/sorted/R.npz            segments of a range of ids
    lut/map/Z-Y-X.npz           segment ids of a leaf, by block
    lut/smallest.npy            smallest fragment of each segment, ascending
    lut/segments.parquet        table of segments
    lut/ids.npy                 their ids, and
    lut/changed_ids.parquet     which ids changed since the last stitch; not always
    lut/changed/Z-Y-X.npz       the same of a leaf
    lut-before/                 id map of the last stitch, whose ids stay; not always
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.stitch.workers import Task
from agq.blockwise.storage.arrays import save_arrays
from agq.blockwise.storage.files import require_folder
from agq.blockwise.volumes.triples import Triple


@dataclass(frozen=True, order=True)
class Superblock:
    """Place of a superblock: level, and index (z, y, x) on that level."""

    level: int
    index: Triple

    @property
    def name(self) -> str:
        """Name of its files."""
        return "{}/{}-{}-{}".format(self.level, *self.index)

    @classmethod
    def of_file(cls, path: Path) -> Superblock:
        """Return the superblock that a file belongs to, by its path."""
        z, y, x = (int(n) for n in path.stem.split("-"))
        return cls(int(path.parent.name), (z, y, x))

    @property
    def parent(self) -> Superblock:
        """The superblock that holds it on the next level."""
        z, y, x = (i // 2 for i in self.index)
        return Superblock(self.level + 1, (z, y, x))

    def neighbor(self, axis: int, step: int) -> Superblock:
        """Return the superblock beside it on an axis; it need not exist."""
        z, y, x = (i + step * (d == axis) for d, i in enumerate(self.index))
        return Superblock(self.level, (z, y, x))


Family = tuple[Superblock, Any]
"""A superblock with a sequence of its children, or a leaf with its block numbers, int64 (n,)."""


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
        levels, below = [], sorted(leaves)
        for _ in range(1, self.depth):
            level: dict[Superblock, list[Superblock]] = {}
            for child in below:
                level.setdefault(child.parent, []).append(child)
            levels.append(level)
            below = sorted(level)
        return levels


def leaf_shape(
    grid_shape: Sequence[int], blocks: int, cores: int, most: int
) -> tuple[int, int, int]:
    """Return a compact box of blocks, small enough to keep all workers busy.

    Parameters
    ----------
    grid_shape
        Blocks of the whole volume, (z, y, x).
    blocks
        Blocks that take part.
    cores
        Threads of all workers.
    most
        Most blocks in a box.
    """
    most = min(most, -(-blocks // (4 * cores)))
    shape = [1, 1, 1]
    while True:
        open_axes = [d for d in range(3) if shape[d] < grid_shape[d]]
        axis = min(open_axes, key=lambda d: shape[d], default=None)
        if axis is None or 2 * shape[0] * shape[1] * shape[2] > most:
            return shape[0], shape[1], shape[2]
        shape[axis] *= 2


class StitchFiles:
    """Paths of a run's stitch, as listed above."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self.contacts = self.run_dir / "contacts"
        self.present = self.contacts / "present.npy"
        self.name_lists = self.contacts / "names"
        self.shared = self.contacts / "shared"
        self.counts = self.run_dir / "classes"
        self.shared_counts = self.counts / "shared"
        self.agglomeration = self.run_dir / "agglomeration"
        self.edits = self.agglomeration / "edits.npz"
        self.lut = self.run_dir / "lut"
        self.smallest = self.lut / "smallest.npy"
        self.segments = self.lut / "segments.parquet"
        self.ids = self.lut / "ids.npy"
        self.before = self.run_dir / "lut-before"

    def save(self, path: Path, arrays: Mapping[str, NDArray]) -> None:
        """Write a table; a run folder that is not there is not made.

        Raises
        ------
        RunGoneError
            If the run folder has been moved away.
        """
        require_folder(self.run_dir)
        save_arrays(path, arrays)

    def evidence(self, leaf: Superblock) -> Path:
        """Fragments and contacts of a leaf."""
        return self.contacts / f"{leaf.name}.npz"

    def names(self, leaf: Superblock) -> Path:
        """Names of the fragments of a leaf, where they have some (:mod:`names`)."""
        return self.name_lists / f"{leaf.name[2:]}.npy"

    def classes(self, leaf: Superblock) -> Path:
        """Return the path of the voxels of each class in the fragments of a leaf."""
        return self.counts / f"{leaf.name}.npz"

    def merges(self, superblock: Superblock) -> Path:
        """Path of the merges of a superblock and the nodes it hands up."""
        return self.agglomeration / f"{superblock.name}.npz"

    def graph(self, superblock: Superblock) -> Path:
        """Residual graph of a superblock."""
        return self.agglomeration / f"{superblock.name}.graph.npz"

    def cut(self, superblock: Superblock) -> Path:
        """Clusters of a superblock."""
        return self.lut / "cut" / f"{superblock.name}.npz"

    def final(self, superblock: Superblock) -> Path:
        """Segments that the clusters of a superblock belong to."""
        return self.lut / "names" / f"{superblock.name}.npz"

    def sorted_segments(self, number: int) -> Path:
        """Segments of a range of ids."""
        return self.lut / "sorted" / f"{number:06}.npz"

    def map(self, leaf: Superblock) -> Path:
        """Segment ids of a leaf."""
        return self.lut / "map" / f"{leaf.name[2:]}.npz"

    def changed(self, leaf: Superblock) -> Path:
        """Ids that changed in a leaf."""
        return self.lut / "changed" / f"{leaf.name[2:]}.npz"


@dataclass(frozen=True)
class SuperblockTask(Task):
    """Work on some superblocks of one level, given with their children; files that exist stay."""

    items: Sequence[Family]
    run_dir: Path

    @property
    def size(self) -> int:
        """Children of the superblocks, or blocks of the leaves."""
        return sum(len(members) for _, members in self.items)

    def split(self, tasks: int) -> list[Self]:
        """Cut the work into about so many tasks of similar size."""
        weights = np.array([len(members) for _, members in self.items], np.int64)
        return [replace(self, items=self.items[run]) for run in groups(weights, tasks)]


def groups(weights: NDArray[np.int64], tasks: int) -> list[slice]:
    """Cut items into at most about ``tasks`` runs of similar weight."""
    if not len(weights):
        return []
    ends = np.cumsum(weights)
    share = max(1, int(ends[-1]) // max(1, tasks))
    cuts = np.flatnonzero(np.diff((ends - 1) // share)) + 1
    edges = [0, *cuts.tolist(), len(weights)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
