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
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.stitch.workers import Task
from agq.blockwise.storage.arrays import save_arrays
from agq.blockwise.storage.files import require_folder
from agq.blockwise.volumes.triples import Triple, triple


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


MOST_LEAVES = 2**20
"""More are not made: leaves have more blocks instead. A folder has as many files."""

Family = tuple[Superblock, Any]
"""A superblock with a list of its children, or a leaf with its block numbers, int64 (n,)."""


@dataclass(frozen=True, eq=False)
class Families(Sequence[Family]):
    """Superblocks of a level in C order, each with its children, or a leaf with its blocks.

    Tens of bytes each, as arrays: a volume may have millions. The objects are made when asked for.

    Parameters
    ----------
    level
        Level of the superblocks.
    indices
        Their places (z, y, x), int32 (n, 3).
    bits
        Which members of each there are: of the box of places that could be, in C order, a bit each
        as of `np.packbits`; uint8 (n, bytes).
    box
        Members on each axis.
    grid_shape
        Blocks of the whole volume.
    """

    level: int
    indices: NDArray[np.int32]
    bits: NDArray[np.uint8]
    box: Triple
    grid_shape: Triple

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Members of each superblock."""
        return np.bitwise_count(self.bits).sum(axis=1, dtype=np.int64)

    def places(self) -> Iterator[Superblock]:
        """Yield the superblocks alone."""
        return (Superblock(self.level, triple(index)) for index in self.indices)

    def holding(self, others: Families) -> Families:
        """Return those that are also among others of the same level."""
        both = np.concatenate((self.indices, others.indices))
        codes = _codes(both, both.max(axis=0, initial=0) + 1)
        return self.take(np.isin(codes[: len(self)], codes[len(self) :]))

    def take(self, rows: slice | NDArray[Any]) -> Families:
        """Return some of them."""
        return replace(self, indices=self.indices[rows], bits=self.bits[rows])

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, row: int) -> Family: ...

    @overload
    def __getitem__(self, row: slice) -> Families: ...

    def __getitem__(self, row: int | slice) -> Family | Families:
        if isinstance(row, slice):
            return self.take(row)
        member = np.flatnonzero(np.unpackbits(self.bits[row]))
        corner = self.indices[row].astype(np.int64) * self.box
        members = np.stack(np.unravel_index(member, self.box), axis=1) + corner
        superblock = Superblock(self.level, triple(self.indices[row]))
        if self.level == 0:
            return superblock, np.ravel_multi_index(tuple(members.T), self.grid_shape)
        children = [Superblock(self.level - 1, triple(place)) for place in members.tolist()]
        return superblock, children


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

    def leaves(self, numbers: NDArray[np.int64]) -> Families:
        """Cut blocks into leaves; memory holds little more than a layer of blocks besides them.

        Parameters
        ----------
        numbers
            Block numbers, ascending and distinct.
        """
        # A leaf that is larger than the volume has the same place as one that just holds it.
        sides = zip(self.leaf_shape, self.grid_shape, strict=True)
        z, y, x = box = triple(min(leaf, n) for leaf, n in sides)
        depth, height, width = self.grid_shape
        rows, columns, layer = -(-height // y), -(-width // x), height * width
        index, bits = [np.zeros((0, 3), np.int32)], [np.zeros((0, -(-z * y * x // 8)), np.uint8)]
        # Of a slab of leaves, as many layers of blocks: whether each block is there, leaf by leaf.
        cuts = np.searchsorted(numbers, np.arange(depth + 1) * layer).tolist()
        for slab in range(-(-depth // z)):
            layers = range(slab * z, min((slab + 1) * z, depth))
            if cuts[layers[0]] == cuts[layers[-1] + 1]:
                continue
            present = np.zeros((rows * columns, z * y * x), bool)
            for i, plane in enumerate(layers):
                own = numbers[cuts[plane] : cuts[plane + 1]] - plane * layer
                j, k = np.divmod(own, width)
                present[j // y * columns + k // x, (i * y + j % y) * x + k % x] = True
            some = np.flatnonzero(present.any(axis=1))
            index.append(np.stack((np.full(len(some), slab), *np.divmod(some, columns)), axis=1))
            bits.append(np.packbits(present[some], axis=1))
        places = np.concatenate(index).astype(np.int32)
        return Families(0, places, np.concatenate(bits), box, self.grid_shape)

    def levels(self, leaves: Families) -> list[Families]:
        """Return the superblocks of levels 1, 2, ... up to the root."""
        levels, below = [], leaves
        for level in range(1, self.depth):
            above, octant = below.indices >> 1, (below.indices & 1) @ (4, 2, 1)
            grid = above.max(axis=0, initial=0) + 1
            parents, of = np.unique(_codes(above, grid), return_inverse=True)
            bits = np.zeros(len(parents), np.uint8)
            np.bitwise_or.at(bits, of, np.array(128 >> octant, np.uint8))
            index = np.stack(np.unravel_index(parents, grid), axis=1).astype(np.int32)
            below = Families(level, index, bits[:, None], (2, 2, 2), self.grid_shape)
            levels.append(below)
        return levels


def _codes(places: NDArray[np.int32], grid: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return numbers of places of a grid, in C order."""
    return np.ravel_multi_index(tuple(places.T), tuple(grid.tolist()))


def doubled(shape: Triple, grid_shape: Triple) -> Triple:
    """Return a box of twice as many blocks: longer on its shortest axis that can grow."""
    open_axes = [d for d in range(3) if shape[d] < grid_shape[d]]
    axis = min(open_axes, key=shape.__getitem__)
    return triple(n << (d == axis) for d, n in enumerate(shape))


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
        Most blocks in a box, unless there were more than :data:`MOST_LEAVES` boxes.
    """
    most = min(most, -(-blocks // (4 * cores)))
    grid, shape = triple(grid_shape), (1, 1, 1)
    while any(n < m for n, m in zip(shape, grid, strict=True)):
        size = math.prod(shape)
        if 2 * size > most and size * MOST_LEAVES >= blocks:
            break
        shape = doubled(shape, grid)
    return shape


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

    items: Families
    run_dir: Path

    @property
    def size(self) -> int:
        """Children of the superblocks, or blocks of the leaves."""
        return int(self.items.sizes.sum())

    def split(self, tasks: int) -> list[Self]:
        """Cut the work into about so many tasks of similar size."""
        return [replace(self, items=self.items[run]) for run in groups(self.items.sizes, tasks)]


def groups(weights: NDArray[np.int64], tasks: int) -> list[slice]:
    """Cut items into at most about ``tasks`` runs of similar weight."""
    if not len(weights):
        return []
    ends = np.cumsum(weights)
    share = max(1, int(ends[-1]) // max(1, tasks))
    cuts = np.flatnonzero(np.diff((ends - 1) // share)) + 1
    edges = [0, *cuts.tolist(), len(weights)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
