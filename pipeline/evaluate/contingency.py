"""Contingency tables of two label volumes: counted per block, merged as integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from funlib.geometry import Coordinate
from scipy import ndimage

from agq.blockwise.blocks.label_pairs import PairTable
from agq.blockwise.storage.arrays import Columns, Numbers
from agq.blockwise.storage.arrays import Ids as Labels
from agq.blockwise.volumes.open import Volume
from agq.blockwise.volumes.triples import Box, Triple
from agq.errors import InputError


@dataclass(frozen=True)
class Contingency(Columns):
    """Voxels of each pair of labels, sorted by (truth, segment), each pair once.

    Attributes
    ----------
    count
        Voxels with this pair.
    block
        Number of the block that holds most of them (the lowest of equals).
    most
        Voxels of the pair in that block.
    """

    truth: Labels
    segment: Labels
    count: Numbers
    block: Numbers
    most: Numbers

    @property
    def total(self) -> int:
        """Voxels in all rows."""
        return int(self.count.sum())

    @classmethod
    def of(cls, truth: Labels, segment: Labels, block: int) -> Contingency:
        """Count the pairs of one block; voxels with a 0 in either array are left out."""
        pairs = PairTable(ordered=True)
        pairs.add(truth, segment, np.zeros(truth.shape, np.uint8))
        columns = pairs.columns()
        number = np.full(len(columns.u), block, np.int64)
        return cls(columns.u, columns.v, columns.count, number, columns.count)

    @classmethod
    def merge(cls, tables: Sequence[Contingency]) -> Contingency:
        """Add tables; the result does not depend on their order or grouping."""
        rows = cls.concatenate(tables)
        if len(rows) == 0:
            return rows
        rows = rows.take(np.lexsort((rows.block, -rows.most, rows.segment, rows.truth)))
        new = np.ones(len(rows), bool)
        new[1:] = (rows.truth[1:] != rows.truth[:-1]) | (rows.segment[1:] != rows.segment[:-1])
        first = np.flatnonzero(new)
        return replace(rows.take(first), count=np.add.reduceat(rows.count, first))

    def with_segments(self, ids: Labels, segments: Labels) -> Contingency:
        """Rename segments; rows that become equal are added (see `BlockCounts`)."""
        place = np.searchsorted(ids, self.segment)
        listed = place < len(ids)
        listed[listed] = ids[place[listed]] == self.segment[listed]
        if not bool((listed | (self.segment == 0)).all()):
            raise ValueError("a fragment of the table has no segment")
        renamed = np.zeros_like(self.segment)
        renamed[listed] = segments[place[listed]]
        return Contingency.merge([replace(self, segment=renamed)])


@dataclass(frozen=True)
class BorderRule:
    """Which voxels of the truth are not scored: those near a border, and those of some labels.

    A voxel is left out if a voxel of another truth label (0 included) lies at most `radius` steps
    away on every axis. The end of the volume is no border.

    Attributes
    ----------
    radius
        Voxels; 0 leaves nothing out.
    across_sections
        Whether the distance runs over z too; otherwise within a section.
    labels
        Labels that mean unlabelled, as 0 does; negative ones too.
    """

    radius: int = 0
    across_sections: bool = False
    labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise InputError(f"border radius {self.radius}: give 0 or more voxels")

    @property
    def halo(self) -> Triple:
        """Voxels around a box that decide about the voxels in it."""
        return (self.radius if self.across_sections else 0, self.radius, self.radius)

    def describe(self) -> dict[str, Any]:
        """Return it in JSON types."""
        labels = {"labels": list(self.labels)} if self.labels else {}
        return {"radius": self.radius, "axes": "zyx" if self.across_sections else "yx", **labels}

    def for_type(self, dtype: np.dtype[Any]) -> BorderRule:
        """Return the rule for truth of an integer type, whose -1 may be its highest value."""
        bits = 64 if dtype.kind == "i" else 8 * dtype.itemsize
        return replace(self, labels=tuple(label % 2**bits for label in self.labels))

    def labelled(self, truth: Labels) -> Labels:
        """Return the truth with 0 in place of labels that are not to be scored."""
        if not self.labels:
            return truth
        return np.where(np.isin(truth, np.array(self.labels, np.uint64)), np.uint64(0), truth)

    def clear(self, truth: Labels) -> Labels:
        """Return the truth with 0 where a border is too near."""
        if self.radius == 0:
            return truth
        # Labels are numbered first: the filters compute in doubles.
        small = np.unique(truth, return_inverse=True)[1].reshape(truth.shape).astype(np.int32)
        size = [2 * h + 1 for h in self.halo]
        highest = ndimage.maximum_filter(small, size, mode="nearest")
        lowest = ndimage.minimum_filter(small, size, mode="nearest")
        return np.where(highest == lowest, truth, np.uint64(0))


def reserved_labels(dtype: np.dtype[Any]) -> dict[int, str]:
    """Return the labels that often mean unlabelled, as uint64, and what they are called.

    The highest value of the type is one, which is -1 stored without a sign, and so are its two
    neighbours in 64 bits (Paintera), and 2^32-1.
    """
    if dtype.kind == "i":
        return {2**64 - n: f"-{n}" for n in (1, 2, 3)}
    bits = 8 * dtype.itemsize
    highest = {2**bits - n: f"2^{bits}-{n}" for n in ((1, 2, 3) if bits == 64 else (1,))}
    return highest | ({2**32 - 1: "2^32-1"} if bits > 32 else {})


@dataclass(frozen=True)
class BlockCounts:
    """What a block, or any set of blocks, adds to the scores.

    Attributes
    ----------
    labelled
        Pairs where neither label is 0.
    background
        Pairs (truth, 0) where the prediction is 0.
    filled
        The voxels of `background` with the nearest segment in place of 0, if one is near.
    """

    labelled: Contingency
    background: Contingency
    filled: Contingency

    @property
    def rows(self) -> int:
        """Rows of all tables."""
        return len(self.labelled) + len(self.background) + len(self.filled)

    @property
    def scored(self) -> int:
        """Voxels whose truth is not 0."""
        return self.labelled.total + self.background.total

    def with_segments(self, ids: Labels, segments: Labels) -> BlockCounts:
        """Return the counts after fragments were joined to segments; nothing is counted again.

        `ids` are every fragment id in the tables but 0, sorted, and `segments` in the same order.
        """
        return BlockCounts(
            self.labelled.with_segments(ids, segments),
            self.background,
            self.filled.with_segments(ids, segments),
        )

    @classmethod
    def empty(cls) -> BlockCounts:
        """Return counts of no voxels."""
        return cls(*[Contingency.empty()] * 3)

    @classmethod
    def merge(cls, parts: Sequence[BlockCounts]) -> BlockCounts:
        """Add the counts of several sets of blocks."""
        return cls(
            Contingency.merge([part.labelled for part in parts]),
            Contingency.merge([part.background for part in parts]),
            Contingency.merge([part.filled for part in parts]),
        )


@dataclass(frozen=True)
class Window:
    """The voxels that a segmentation and its truth share.

    Attributes
    ----------
    shape
        Voxels (z, y, x).
    offset, voxel_size
        World units (z, y, x).
    in_segmentation, in_truth
        Voxel (z, y, x) of each volume at which the window starts.
    fill_distance
        World units; how far the nearest segment is looked for.
    ignore
        Which voxels near borders of the truth are not scored.
    """

    shape: Triple
    offset: Coordinate
    voxel_size: Coordinate
    in_segmentation: Triple
    in_truth: Triple
    fill_distance: float
    ignore: BorderRule = BorderRule()

    def read(self, volume: Volume, origin: Sequence[int], box: Box) -> Labels:
        """Read a box of the window from a volume in which the window starts at ``origin``."""
        start, stop = ([o + v for o, v in zip(origin, end, strict=True)] for end in box)
        return volume.read(start, stop).astype(np.uint64, copy=False)

    def scored_truth(self, truth: Volume, box: Box) -> Labels:
        """Read the truth of a box, 0 where it is not to be scored."""
        labels, inner = _read_around(truth, self.in_truth, box, self.ignore.halo)
        return np.ascontiguousarray(self.ignore.clear(self.ignore.labelled(labels))[inner])

    def inside(
        self, segmentation: Volume, truth: Volume, box: Box, segment: Any, label: Any
    ) -> tuple[int, ...]:
        """Return a world position in a box inside the overlap of two labels.

        It is the deepest place of the section in which the overlap is largest.
        """
        both = self.read(segmentation, self.in_segmentation, box) == segment
        both &= self.read(truth, self.in_truth, box) == label
        z = int(np.argmax(both.sum(axis=(1, 2))))
        size = [int(v) for v in self.voxel_size]
        flat = np.pad(both[z], 1)
        depth = ndimage.distance_transform_edt(flat, sampling=size[1:])[1:-1, 1:-1]
        y, x = divmod(int(np.argmax(depth)), depth.shape[1])
        return tuple(
            int(o + (b + v) * s + s // 2)
            for o, b, v, s in zip(self.offset, box[0], (z, y, x), size, strict=True)
        )


def count_block(
    segmentation: Volume, truth: Volume, window: Window, numbered: tuple[int, Box]
) -> BlockCounts:
    """Count the pairs of labels of the voxels of a numbered box whose truth is not 0."""
    number, box = numbered
    real = window.scored_truth(truth, box)
    labels = window.read(segmentation, window.in_segmentation, box)
    labelled = Contingency.of(real, labels, number)
    open_truth = np.where(labels == 0, real, np.uint64(0))
    if not open_truth.any():
        return BlockCounts(labelled, Contingency.empty(), Contingency.empty())
    nearest = _nearest(segmentation, window, box, open_truth != 0)
    still_open = np.where(nearest == 0, open_truth, np.uint64(0))
    near = Contingency.of(open_truth, nearest, number)
    filled = Contingency.merge([near, _unlabelled(still_open, number)])
    return BlockCounts(labelled, _unlabelled(open_truth, number), filled)


def _unlabelled(truth: Labels, number: int) -> Contingency:
    """Pairs (truth, 0) of all voxels whose truth is not 0."""
    table = Contingency.of(truth, np.ones(truth.shape, np.uint64), number)
    return replace(table, segment=np.zeros_like(table.segment))


def _read_around(
    volume: Volume, origin: Sequence[int], box: Box, halo: Sequence[int]
) -> tuple[Labels, tuple[slice, ...]]:
    """Read a box of a window and up to ``halo`` voxels around it; return also where the box is."""
    start, stop = ([o + v for o, v in zip(origin, end, strict=True)] for end in box)
    low = [max(0, s - h) for s, h in zip(start, halo, strict=True)]
    high = [min(n, s + h) for n, s, h in zip(volume.shape, stop, halo, strict=True)]
    inner = tuple(slice(s - a, e - a) for s, e, a in zip(start, stop, low, strict=True))
    return volume.read(low, high).astype(np.uint64, copy=False), inner


def _nearest(
    segmentation: Volume, window: Window, box: Box, wanted: npt.NDArray[np.bool_]
) -> Labels:
    """Nearest segment of the wanted voxels of a box; 0 if none is within the fill distance."""
    size = tuple(int(v) for v in window.voxel_size)
    halo = [int(window.fill_distance // v) for v in size]
    labels, inner = _read_around(segmentation, window.in_segmentation, box, halo)
    nearest = np.zeros(wanted.shape, np.uint64)
    if not labels.any():
        return nearest
    distance = ndimage.distance_transform_edt(labels == 0, sampling=size)
    asked = distance[inner][wanted]
    # Halving from the fill distance, so that few different balls are made and none is needlessly
    # large: a ball of 1000 voxels would not fit in memory.
    radius = window.fill_distance
    while radius / 2 >= asked.max() and radius > max(size):
        radius /= 2
    offsets, lengths = _ball(size, radius)
    # The transform gives the distance but breaks ties by its window; the search starts at the
    # offsets of that distance and takes the first in a fixed order.
    first = np.zeros(wanted.shape, np.int64)
    first[wanted] = np.searchsorted(lengths, asked - 1e-6)
    margin = np.array([axis.start for axis in inner])
    _search(labels, wanted, margin, first, offsets, nearest)
    return nearest


@lru_cache(maxsize=8)
def _ball(
    size: tuple[int, ...], radius: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Voxel offsets (n, 3) within a world distance, nearest first, and their lengths."""
    axes = [np.arange(-int(radius // v), int(radius // v) + 1) for v in size]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).astype(np.int64)
    squared = ((offsets * np.array(size)) ** 2).sum(1)
    inside = np.flatnonzero(squared <= radius * radius)
    order = inside[np.argsort(squared[inside], kind="stable")]
    return offsets[order], np.sqrt(squared[order])


@numba.njit(cache=True, nogil=True)
def _search(labels: Any, wanted: Any, margin: Any, first: Any, offsets: Any, nearest: Any) -> None:
    for z, y, x in np.ndindex(wanted.shape):
        if not wanted[z, y, x]:
            continue
        for k in range(first[z, y, x], len(offsets)):
            i = z + margin[0] + offsets[k, 0]
            j = y + margin[1] + offsets[k, 1]
            h = x + margin[2] + offsets[k, 2]
            if i < 0 or j < 0 or h < 0:
                continue
            if i >= labels.shape[0] or j >= labels.shape[1] or h >= labels.shape[2]:
                continue
            if labels[i, j, h] != 0:
                nearest[z, y, x] = labels[i, j, h]
                break
