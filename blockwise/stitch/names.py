"""Fragments of another model: one name is one fragment, wherever its voxels lie.

Their import cuts them at the borders of blocks into *pieces* with ids of their own, and keeps the
name that each had. In the agglomeration all pieces of a name are one node (:mod:`merge`). A
superblock that does not hold all of them makes one node of those it has and lets it wait for the
others, so what it must know of a name is how far up the tree these lie: the level of the smallest
superblock that holds all pieces.

No process holds all names. Each leaf lists its own, ascending (:class:`ListNames`); a task for a
range of names reads its share of all lists, and writes, leaf by leaf, the names that several leaves
hold (:class:`FindShared`); a leaf reads its rows of these files (:func:`leaf_names`).

::

    contacts/names/Z-Y-X.npy    names in a leaf and their voxels; removed once the others are made
    contacts/shared/R.npy       rows of names that several leaves hold, by leaf
    classes/shared/R.npy        voxels of each class in these, by leaf; not always
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.stitch.superblocks import StitchFiles, Superblock, SuperblockTask
from agq.blockwise.stitch.workers import Task
from agq.blockwise.storage.arrays import Columns, Ids, Numbers, load_arrays, map_array, save_array

IdRange = tuple[int, int, int]
"""Number of a range of ids, and its first and last id."""

_IN_RANGE = 2**22
"""About as many ids as one task sorts."""

_STRIDE = 2**12
"""Every so many-th id of a leaf helps to choose the ranges."""

_LAST = 2**64 - 1

_SHARED = np.dtype(
    [("leaf", "<i8"), ("name", "<u8"), ("level", "<i8"), ("home", "?"), ("size", "<i8")]
)
_CLASS = np.dtype(
    [("leaf", "<i8"), ("name", "<u8"), ("class", "<u8"), ("voxels", "<i8"), ("size", "<i8")]
)


@dataclass(frozen=True)
class LeafNames(Columns):
    """Names of which several leaves hold pieces, as one of these leaves sees them.

    Attributes
    ----------
    name
        Of the fragment; ascending and distinct.
    levels
        Level of the smallest superblock that holds all pieces of each.
    homes
        1 in the first of the leaves that hold it, 0 in others.
    sizes
        Voxels of all its pieces.
    """

    name: Ids
    levels: Numbers
    homes: Numbers
    sizes: Numbers


def sample(ids: Ids) -> Ids:
    """Return some of ascending ids, from which :func:`ranges_of` chooses."""
    return ids[_STRIDE // 2 :: _STRIDE]


def ranges_of(samples: Sequence[Ids], total: int, most: int = _IN_RANGE) -> list[IdRange]:
    """Cut all ids into ranges that hold about as many of ``total`` ids each, at most ``most``."""
    parts = max(1, -(-total // most))
    every = np.sort(np.concatenate([np.zeros(0, np.uint64), *samples]))
    places = np.arange(1, parts) * len(every) // parts
    begins = [0, *np.unique(every[places[places < len(every)]]).tolist()]
    begins = sorted({int(begin) for begin in begins})
    ends = [*(begin - 1 for begin in begins[1:]), _LAST]
    return [(i, *bounds) for i, bounds in enumerate(zip(begins, ends, strict=True))]


def between(ids: NDArray[np.uint64], bounds: IdRange) -> slice:
    """Return where the ids of a range lie among ascending ones."""
    first = np.searchsorted(ids, np.uint64(bounds[1]))
    return slice(int(first), int(np.searchsorted(ids, np.uint64(bounds[2]), side="right")))


def _code(index: Sequence[int]) -> int:
    """Return a number of a leaf; leaves have them in C order."""
    z, y, x = index
    return z << 42 | y << 21 | x


def _axes(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the places (z, y, x) of leaves, (3, n)."""
    return np.stack((codes >> 42, (codes >> 21) & (2**21 - 1), codes & (2**21 - 1)))


def _leaf_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the files of leaves, in C order of these, with their numbers."""
    coded = ((_code([int(n) for n in path.stem.split("-")]), path) for path in folder.glob("*.npy"))
    yield from sorted(coded)


@dataclass(frozen=True)
class ListNames(SuperblockTask):
    """Write the names in each leaf, and the voxels that each has there."""

    def run(self) -> list[tuple[int, Ids]]:
        """Return, by leaf, how many there are, and some of them."""
        files = StitchFiles(self.run_dir)
        made = []
        for leaf, _ in self.items:
            arrays = load_arrays(files.evidence(leaf), "names", "nodes.sizes")
            names, row = np.unique(arrays["names"], return_inverse=True)
            sizes = np.zeros(len(names), np.uint64)
            np.add.at(sizes, row, arrays["nodes.sizes"].astype(np.uint64))
            save_array(files.names(leaf), np.stack((names, sizes)))
            made.append((len(names), sample(names)))
        return made


@dataclass(frozen=True)
class FindShared(Task):
    """Write which names of some ranges several leaves hold."""

    items: Sequence[IdRange]
    run_dir: Path

    def run(self) -> int:
        """Return how many distinct names there are."""
        return sum(map(self._find, self.items))

    def _find(self, bounds: IdRange) -> int:
        files = StitchFiles(self.run_dir)
        lists, codes = [np.zeros((2, 0), np.uint64)], [np.zeros(0, np.int64)]
        for code, path in _leaf_files(files.name_lists):
            table = map_array(path)
            part = np.array(table[:, between(table[0], bounds)])
            lists.append(part)
            codes.append(np.full(part.shape[1], code, np.int64))
        (names, sizes), leaf = np.concatenate(lists, axis=1), np.concatenate(codes)
        order = np.argsort(names, kind="stable")  # leaves of a name stay in C order
        names, sizes, leaf = names[order], sizes[order], leaf[order]
        first = np.flatnonzero(np.append(True, names[1:] != names[:-1]))[: len(names)]
        counts = np.diff(np.append(first, len(names)))
        rows = np.zeros(len(names), _SHARED)
        if len(names):
            axes = _axes(leaf)
            apart = np.minimum.reduceat(axes, first, axis=1) ^ np.maximum.reduceat(
                axes, first, axis=1
            )
            # Superblocks halve places: they meet where all bits that differ are shifted out.
            levels = np.frexp(apart.max(axis=0).astype(float))[1]
            rows["leaf"], rows["name"] = leaf, names
            rows["level"] = np.repeat(levels, counts)
            rows["home"][first] = True
            total = np.add.reduceat(sizes, first).astype(np.int64)
            rows["size"] = np.repeat(total, counts)
        rows = rows[np.repeat(counts > 1, counts)]
        rows = rows[np.argsort(rows["leaf"], kind="stable")]  # names of a leaf stay ascending
        save_array(files.shared / f"{bounds[0]:06}.npy", rows)
        return len(first)


def _rows_of(folder: Path, leaf: Superblock) -> Iterator[NDArray]:
    """Yield the rows of a leaf in the files of a folder."""
    code = _code(leaf.index)
    for path in sorted(folder.glob("*.npy")):
        table = map_array(path)
        begin = np.searchsorted(table["leaf"], code)
        yield np.array(table[begin : np.searchsorted(table["leaf"], code, side="right")])


def leaf_names(files: StitchFiles, leaf: Superblock) -> LeafNames:
    """Return the names in a leaf of which others hold pieces too."""
    rows = np.concatenate([np.zeros(0, _SHARED), *_rows_of(files.shared, leaf)])
    rows = rows[np.argsort(rows["name"])]
    return LeafNames(
        rows["name"].copy(),
        rows["level"].copy(),
        rows["home"].astype(np.int64),
        rows["size"].copy(),
    )


def share_counts(
    files: StitchFiles, shared: Path, names: Ids, classes: Ids, voxels: Numbers
) -> None:
    """Write the voxels of classes in the names of a file of shared ones, by leaf.

    Parameters
    ----------
    shared
        One of the files of :class:`FindShared`.
    names, classes, voxels
        Rows for names in it, ascending.
    """
    held = map_array(shared)
    first = np.searchsorted(names, held["name"])
    counts = np.searchsorted(names, held["name"], side="right") - first
    row = np.repeat(first, counts) + np.arange(counts.sum())
    row -= np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.zeros(len(row), _CLASS)
    for column in ("leaf", "name", "size"):
        rows[column] = np.repeat(held[column], counts)
    rows["class"], rows["voxels"] = classes[row], voxels[row]
    save_array(files.shared_counts / shared.name, rows)


def leaf_classes(files: StitchFiles, leaf: Superblock) -> tuple[Ids, Ids, Numbers, Numbers]:
    """Return names in a leaf that others hold too, with classes, their voxels, and all voxels."""
    rows = np.concatenate([np.zeros(0, _CLASS), *_rows_of(files.shared_counts, leaf)])
    name, kind, voxels, size = (rows[c].copy() for c in ("name", "class", "voxels", "size"))
    return name, kind, voxels, size
