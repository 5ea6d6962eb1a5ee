"""Classes of tissue (nucleus, vessel, glia, ...): which fragments may never be one segment.

A volume of classes gives every voxel a class (:mod:`blocks.overlay`); 0 says nothing. A fragment
has the class that most of its voxels with one have; of equals, the smallest. Fragments of different
classes never merge, directly or through others, unless the table of pairs says that they may.

Of a fragment in pieces (:mod:`names`) the voxels of all count, and its name stands for it.

The voxels of each class in each fragment are counted once and stored by leaf (:class:`Count`), so a
changed table or share reads no volume. In the agglomeration a cluster has a *kind*: the classes of
all its fragments. Two clusters may merge if every class of one may merge with every other class of
the other one. So a score between clusters depends on their fragments alone, and a merge only takes
pairs away: what :mod:`merge.agglomeration` says of parts and order holds as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.label_pairs import PairTable
from agq.blockwise.blocks.overlay import read_overlay
from agq.blockwise.stitch.contacts import NodeTable
from agq.blockwise.stitch.merge.kernel import TABLED, may_join_each
from agq.blockwise.stitch.names import LeafNames, leaf_classes, leaf_names, share_counts
from agq.blockwise.stitch.settings import MergeSettings, exact
from agq.blockwise.stitch.superblocks import StitchFiles, Superblock, SuperblockTask
from agq.blockwise.stitch.workers import Task
from agq.blockwise.storage.arrays import Columns, Ids, Numbers, load_arrays, map_array
from agq.blockwise.volumes.create import open_array, read_chunk
from agq.blockwise.volumes.open import Volume
from agq.errors import DamagedError, InputError


@dataclass(frozen=True)
class ClassCounts(Columns):
    """How many voxels of a class fragments have; sorted by fragment and class.

    Attributes
    ----------
    fragments, classes
        Fragment id, and class other than 0.
    voxels, sizes
        Voxels of that class, and of the fragment.
    """

    fragments: Ids
    classes: Ids
    voxels: Numbers
    sizes: Numbers


@dataclass(frozen=True)
class Kinds:
    """Kinds of fragments, and which of them may merge (:func:`merge.kernel.may_join`).

    Attributes
    ----------
    ids, values
        Fragments with a class, ascending, and the kind of each, uint64; others have kind 0.
    bars
        For each class of the table a bit, and the bits that it keeps out, uint64.
    """

    ids: NDArray[np.uint64]
    values: NDArray[np.uint64]
    bars: NDArray[np.uint64]

    def of(self, fragments: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the kinds of fragments, 0 for those without a class."""
        kinds = np.zeros(len(fragments), np.uint64)
        if len(self.ids):
            place = np.minimum(np.searchsorted(self.ids, fragments), len(self.ids) - 1)
            known = self.ids[place] == fragments
            kinds[known] = self.values[place[known]]
        return kinds

    def allow(self, u: NDArray[np.uint64], v: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return whether the fragments of each pair may merge."""
        allowed: NDArray[np.bool_] = may_join_each(self.of(u), self.of(v), self.bars)
        return allowed

    def join(self, one: int, other: int) -> bool:
        """Return whether clusters of two kinds may merge."""
        a, b = (np.array([kind], np.uint64) for kind in (one, other))
        return bool(may_join_each(a, b, self.bars)[0])


@dataclass(frozen=True)
class ClassRule:
    """What makes a class of a fragment, and which classes may merge.

    Attributes
    ----------
    share
        A fragment has a class if more than this share of its voxels has it.
    may_merge
        Pairs of classes, 1 to 2^63 - 1, that may merge; at most 63 classes in all.
    """

    share: float
    may_merge: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, settings: MergeSettings) -> ClassRule:
        """Return the rule that settings say."""
        return cls(settings.class_share, settings.classes_may_merge)

    @property
    def bars(self) -> NDArray[np.uint64]:
        """Bits of the classes that each class of the table keeps out."""
        bits = self._bits()
        bars = {value: sum(bits.values()) - bit for value, bit in bits.items()}
        for one, other in self.may_merge:
            bars[one] &= ~bits[other]
            bars[other] &= ~bits[one]
        return np.array(list(bars.values()), np.uint64)

    def _bits(self) -> dict[int, int]:
        tabled = sorted({value for pair in self.may_merge for value in pair})
        return {value: 1 << i for i, value in enumerate(tabled)}

    def encode(self, classes: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the kinds of fragments of some classes."""
        kinds = classes.copy()
        for value, bit in self._bits().items():
            kinds[classes == value] = TABLED | np.uint64(bit)
        return kinds

    def kinds(self, counts: ClassCounts) -> Kinds:
        """Return the kinds of fragments."""
        rows = counts.take(np.lexsort((counts.classes, -counts.voxels, counts.fragments)))
        rows = self._enough(rows.take(np.unique(rows.fragments, return_index=True)[1]))
        return Kinds(rows.fragments, self.encode(rows.classes), self.bars)

    def read(self, files: StitchFiles, leaves: Iterable[Superblock]) -> Kinds:
        """Return the kinds of fragments of some leaves; of a leaf without a file, none."""
        return self.kinds(read_counts(files, leaves))

    def around(self, files: StitchFiles, leaf: Superblock) -> Kinds:
        """Return the kinds of fragments of a leaf and of those that it touches."""
        beside = [leaf.neighbor(axis, step) for axis in range(3) for step in (-1, 1)]
        return self.read(files, [leaf, *beside])

    def count(
        self, files: StitchFiles, leaf: Superblock, names: Ids, shared: LeafNames
    ) -> tuple[int, int]:
        """Return how many fragments of a leaf have a class, and how many hold several.

        Parameters
        ----------
        names, shared
            Names of all its fragments, and those that others hold too; the first of them counts
            these.
        """
        counts = read_counts(files, [leaf])
        own = np.setdiff1d(names, shared.name[shared.homes == 0])
        counts = counts.take(np.isin(counts.fragments, own))
        return int(np.count_nonzero(self.kinds(counts).of(own))), self.several(counts)

    def several(self, counts: ClassCounts) -> int:
        """Return how many fragments hold enough of two classes that may not merge."""
        rows = self._enough(counts)
        own = self.kinds(counts).of(rows.fragments)
        allowed = may_join_each(own, self.encode(rows.classes), self.bars)
        return len(np.unique(rows.fragments[~allowed]))

    def _enough(self, counts: ClassCounts) -> ClassCounts:
        share = exact(self.share)
        return counts.take(counts.voxels * share.denominator > counts.sizes * share.numerator)


def read_counts(files: StitchFiles, leaves: Iterable[Superblock]) -> ClassCounts:
    """Return the voxels of each class in whole fragments of some leaves."""
    tables = []
    for leaf in leaves:
        if files.classes(leaf).exists():
            own = ClassCounts.load(files.classes(leaf), "classes")
            tables.append(own.take(~np.isin(own.fragments, leaf_names(files, leaf).name)))
            tables.append(ClassCounts(*leaf_classes(files, leaf)))
    counts = ClassCounts.concatenate(tables)
    # Several of these leaves may hold a fragment.
    counts = counts.take(np.lexsort((counts.classes, counts.fragments)))
    pairs = np.stack((counts.fragments, counts.classes))
    return counts.take(np.append(True, (pairs[:, 1:] != pairs[:, :-1]).any(axis=0))[: len(counts)])


def read_kinds(run_dir: Path, settings: MergeSettings) -> Kinds:
    """Return the kinds of all fragments of a stitch with classes, for volumes small enough."""
    files = StitchFiles(run_dir)
    leaves = [Superblock.of_file(path) for path in sorted(files.counts.glob("0/*.npz"))]
    return ClassRule.of(settings).read(files, leaves)


@dataclass(frozen=True)
class Count(SuperblockTask):
    """Count the voxels of each class in the fragments of leaves."""

    container: Path
    grid: BlockGrid
    classes: Volume

    def run(self) -> int:
        """Write the counts of each leaf.

        Returns
        -------
        int
            Sum of the checksums of blocks: the same for the same counts in any leaves.
        """
        files = StitchFiles(self.run_dir)
        fragments = open_array(self.container, "fragments", "r")
        total = 0
        for leaf, numbers in self.items:
            path = files.classes(leaf)
            if not path.exists():
                self._count(leaf, numbers, fragments)
            total += int.from_bytes(load_arrays(path, "checksum")["checksum"].tobytes(), "little")
        return total

    def _count(self, leaf: Superblock, numbers: Sequence[int], fragments: zarr.Array[Any]) -> None:
        files, total = StitchFiles(self.run_dir), 0
        nodes = NodeTable.load(files.evidence(leaf), "nodes")
        order = np.argsort(nodes.ids)
        tables = []
        for number in map(int, numbers):
            start, stop = self.grid.write_box(number)
            classes = read_classes(self.classes, self.grid, start, stop)
            if not classes.any():
                continue
            labels = read_chunk(fragments, self.grid.index(number))
            pairs = PairTable(ordered=True)
            pairs.add(labels, classes, np.zeros(labels.shape, np.uint8))
            found = pairs.columns()
            place = np.searchsorted(nodes.ids, found.u, sorter=order)
            rows = order[np.minimum(place, len(order) - 1)]
            if not np.array_equal(nodes.ids[rows], found.u):
                raise DamagedError(
                    f"block {number}: the fragments are not those of {files.evidence(leaf)}"
                )
            sizes = nodes.sizes[rows]
            tables.append(ClassCounts(found.u, found.v, found.count, sizes))
            content = b"".join(column.tobytes() for column in (found.u, found.v, found.count))
            total += int.from_bytes(hashlib.sha256(content).digest()[:16], "little")
        checksum = np.frombuffer(total.to_bytes(24, "little"), np.uint8)
        counts = ClassCounts.concatenate(tables)
        names = load_arrays(files.evidence(leaf), "names").get("names")
        if names is not None:
            counts = _by_name(counts, nodes, names)
        files.save(files.classes(leaf), counts.arrays("classes") | {"checksum": checksum})


def _by_name(counts: ClassCounts, nodes: NodeTable, names: Ids) -> ClassCounts:
    """Add up the pieces of each name in a leaf."""
    order = np.argsort(nodes.ids)
    name = names[order[np.searchsorted(nodes.ids, counts.fragments, sorter=order)]]
    distinct, row = np.unique(names, return_inverse=True)
    sizes = np.zeros(len(distinct), np.int64)
    np.add.at(sizes, row, nodes.sizes)
    fragments, classes, voxels = _summed([replace(counts, fragments=name)])
    return ClassCounts(fragments, classes, voxels, sizes[np.searchsorted(distinct, fragments)])


@dataclass(frozen=True)
class ShareCounts(Task):
    """Write the voxels of each class in fragments that several leaves hold, by file of these."""

    items: Sequence[Path]
    run_dir: Path

    def run(self) -> None:
        """Write a file for each."""
        files = StitchFiles(self.run_dir)
        paths = sorted(files.counts.glob("0/*.npz"))
        for item in self.items:
            shared = np.unique(map_array(item)["name"])
            tables = (ClassCounts.load(path, "classes") for path in paths)
            share_counts(
                files, item, *_summed([t.take(np.isin(t.fragments, shared)) for t in tables])
            )


def _summed(tables: Sequence[ClassCounts]) -> tuple[Ids, Ids, Numbers]:
    """Return fragments and classes of tables, ascending and distinct, and their voxels."""
    rows = ClassCounts.concatenate(tables)
    pairs, row = np.unique(np.stack((rows.fragments, rows.classes)), axis=1, return_inverse=True)
    voxels = np.zeros(pairs.shape[1], np.int64)
    np.add.at(voxels, row.reshape(-1), rows.voxels)
    return pairs[0], pairs[1], voxels


def read_classes(
    classes: Volume, grid: BlockGrid, start: Sequence[int], stop: Sequence[int]
) -> NDArray[np.uint64]:
    """Return the class of each voxel of a box.

    Raises
    ------
    InputError
        If a class is negative or does not fit in 63 bits.
    """
    values = read_overlay(classes, grid, start, stop)
    if values.dtype.kind == "i" and values.min() < 0:
        raise InputError(f"{classes.name}: class {values.min()} is below 0; 0 is no class")
    found = values.astype(np.uint64)
    if found.max() >= TABLED:
        raise InputError(f"{classes.name}: class {found.max()} is not below 2^63; renumber classes")
    return found
