"""From merges to segment ids, without a global table, and the table of segments.

Going up, each superblock joins what enters it (fragments, or its children's clusters that went up)
by the merges that count at the margin in use, and adds up sizes (:class:`Cut`). Clusters that its
residual graph does not hold are final. Going down, each superblock tells its children what became
of the clusters they handed up, until every fragment of a leaf knows the smallest fragment of its
segment (:class:`Resolve`). Tasks for ranges of ids gather and sort the segments that begin
in leaves (:class:`SortSegments`); then the table of segments is written (:class:`WriteSegments`),
and by each leaf its part of the id map (:class:`Map`).

A larger margin needs merges of higher scores only. Scores along a branch of the dendrogram never
rise, so a cluster that is cut in a superblock takes part in no merge further up that still counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from agq.blockwise.stitch.contacts import NodeTable
from agq.blockwise.stitch.kept_ids import SEVERAL, Before, SegmentsBefore, arrow_table
from agq.blockwise.stitch.merge.agglomeration import MergeTable, positions
from agq.blockwise.stitch.merge.kernel import connected_components
from agq.blockwise.stitch.names import IdRange, between, leaf_names, ranges_of, sample
from agq.blockwise.stitch.output.relabel import BlockLut
from agq.blockwise.stitch.settings import SegmentIds
from agq.blockwise.stitch.superblocks import StitchFiles, Superblock, SuperblockTask
from agq.blockwise.stitch.workers import Task
from agq.blockwise.storage.arrays import (
    Boxes,
    Columns,
    Ids,
    Numbers,
    load_arrays,
    map_array,
    map_arrays,
)
from agq.blockwise.storage.files import atomic_file, require_folder

_LARGEST = 10
_ROWS = 2**16
"""Rows of a row group; fixed, so that the bytes do not depend on the superblocks."""

_SCHEMA = pa.schema(
    [
        ("segment", pa.uint64()),
        ("smallest_fragment", pa.uint64()),
        ("voxels", pa.int64()),
        ("fragments", pa.int64()),
        *((f"{end}_{axis}", pa.int64()) for end in ("begin", "end") for axis in "zyx"),
    ]
)


@dataclass(frozen=True)
class ClusterTable(Columns):
    """Clusters of fragments.

    Attributes
    ----------
    ids
        Smallest fragment of each; of fragments in pieces, smallest piece.
    smallest
        Name of the smallest fragment: the same but for fragments in pieces (:mod:`names`).
    voxels, fragments
        Voxels and fragments of each.
    boxes
        Bounding box in voxels of the volume.
    before
        The id that all fragments had in the last stitch, or `kept_ids.SEVERAL`; 0: none.
    """

    ids: Ids
    smallest: Ids
    voxels: Numbers
    fragments: Numbers
    boxes: Boxes
    before: Ids


def join_clusters(
    entering: ClusterTable, merges: MergeTable
) -> tuple[NDArray[np.int32], ClusterTable]:
    """Merge clusters; return the row of each entering one in the result, and the result."""
    order = np.argsort(entering.ids, kind="stable")
    table = entering.take(order)
    root = connected_components(
        len(table), positions(table.ids, merges.u), positions(table.ids, merges.v)
    )
    is_root = root == np.arange(len(root))
    row = (np.cumsum(is_root) - 1).astype(np.int32)[root]
    joined = table.take(np.flatnonzero(is_root))
    boxes, smallest = joined.boxes.copy(), joined.smallest.copy()
    np.minimum.at(smallest, row, table.smallest)
    voxels, fragments = np.zeros((2, len(joined)), np.int64)
    np.add.at(voxels, row, table.voxels)
    np.add.at(fragments, row, table.fragments)
    np.minimum.at(boxes[:, :3], row, table.boxes[:, :3])
    np.maximum.at(boxes[:, 3:], row, table.boxes[:, 3:])
    low, high = joined.before.copy(), joined.before.copy()
    np.minimum.at(low, row, table.before)
    np.maximum.at(high, row, table.before)
    before = np.where(low == high, low, SEVERAL)
    of = np.empty(len(row), np.int32)
    of[order] = row
    return of, ClusterTable(joined.ids, smallest, voxels, fragments, boxes, before)


@dataclass(frozen=True)
class Cut(SuperblockTask):
    """Write the clusters of superblocks; their children's must exist."""

    margin: Fraction
    """By how much thresholds lie above those of the agglomeration, in the units of its scores."""

    before: Before | None = None
    """The ids of the last stitch."""

    def run(self) -> None:
        """Write ``of``, the cluster of each that entered, the clusters, and which go ``up``."""
        files = StitchFiles(self.run_dir)
        for superblock, children in self.items:
            if files.cut(superblock).exists():
                continue
            if superblock.level == 0:
                entering = _fragments(files, superblock, self.before)
            else:
                entering = ClusterTable.concatenate(
                    [_handed_up(files, child) for child in children]
                )
            arrays = load_arrays(files.merges(superblock))
            merges = MergeTable.of_arrays("merges", arrays).above(self.margin)
            of, clusters = join_clusters(entering, merges)
            up = np.isin(clusters.ids, arrays["up"])
            files.save(files.cut(superblock), {"of": of, "up": up} | clusters.arrays("clusters"))


def _fragments(files: StitchFiles, leaf: Superblock, last: Before | None) -> ClusterTable:
    """Return the fragments of a leaf."""
    path = files.evidence(leaf)
    nodes = NodeTable.load(path, "nodes")
    names = load_arrays(path, "names").get("names")
    ones = np.ones(len(nodes), np.int64)
    before = np.zeros(len(nodes), np.uint64) if last is None else last.ids_of(files, nodes.ids)
    if names is None:
        return ClusterTable(nodes.ids, nodes.ids, nodes.sizes, ones, nodes.boxes, before)
    # A fragment counts once, in the first leaf that holds a piece.
    shared = leaf_names(files, leaf)
    first = np.unique(names, return_index=True)[1]
    ones = np.bincount(first, minlength=len(names))
    ones[np.isin(names, shared.name[shared.homes == 0])] = 0
    return ClusterTable(nodes.ids, names, nodes.sizes, ones, nodes.boxes, before)


def _handed_up(files: StitchFiles, child: Superblock) -> ClusterTable:
    arrays = load_arrays(files.cut(child), "up", "clusters.")
    return ClusterTable.of_arrays("clusters", arrays).take(arrays["up"])


@dataclass(frozen=True)
class LeafSegments:
    """What is known of the segments that begin in a leaf.

    Attributes
    ----------
    leaf
        The leaf.
    count, small, small_voxels
        Segments, those that are too small, and the voxels of these.
    ends
        Its first and last segment, by name; of none, nothing.
    sample
        Some of its segments (:func:`names.sample`).
    """

    leaf: Superblock
    count: int
    small: int
    small_voxels: int
    ends: tuple[int, ...]
    sample: Ids

    @classmethod
    def read(cls, files: StitchFiles, leaf: Superblock) -> LeafSegments:
        """Read the file that :class:`Resolve` wrote."""
        arrays = map_arrays(files.final(leaf), "segments.smallest", "small")
        names, small = arrays["segments.smallest"], arrays["small"].tolist()
        ends = names[[0, -1]].tolist() if len(names) else []
        return cls(leaf, len(names), small[0], small[1], tuple(ends), np.array(sample(names)))


def plan_ranges(leaves: Sequence[LeafSegments]) -> list[tuple[IdRange, list[Superblock]]]:
    """Return ranges of segments for tasks, and the leaves in which some of each begin."""
    ranges = ranges_of([leaf.sample for leaf in leaves], sum(leaf.count for leaf in leaves))
    filled = [leaf for leaf in leaves if leaf.ends]
    # Arrays: there may be a million leaves, and thousands of ranges.
    ends = np.array([leaf.ends for leaf in filled], np.uint64).reshape(-1, 2)
    found = []
    for i, first, last in ranges:
        begin = (ends[:, 0] <= np.uint64(last)) & (ends[:, 1] >= np.uint64(first))
        found.append(((i, first, last), [filled[k].leaf for k in np.flatnonzero(begin)]))
    return found


@dataclass(frozen=True)
class SortSegments(Task):
    """Write the segments of ranges, ascending."""

    items: Sequence[tuple[IdRange, Sequence[Superblock]]]
    run_dir: Path

    def run(self) -> None:
        """Write a file for each range."""
        files = StitchFiles(self.run_dir)
        for bounds, leaves in self.items:
            tables = []
            for leaf in leaves:
                arrays = map_arrays(files.final(leaf), "segments.")
                rows = between(arrays["segments.smallest"], bounds)
                part = {name: np.array(column[rows]) for name, column in arrays.items()}
                tables.append(ClusterTable.of_arrays("segments", part))
            segments = ClusterTable.concatenate(tables)
            segments = segments.take(np.argsort(segments.smallest))
            files.save(files.sorted_segments(bounds[0]), segments.arrays("segments"))


@dataclass(frozen=True)
class Resolve(SuperblockTask):
    """Write which segment all that entered superblocks belongs to; their parents must be done.

    A leaf also writes the segments whose smallest fragment it holds.
    """

    min_size: int
    """Segments of fewer voxels become background."""

    def run(self) -> list[LeafSegments]:
        """Write the segments of each superblock; return what begins in leaves."""
        files = StitchFiles(self.run_dir)
        for superblock, children in self.items:
            if files.final(superblock).exists():
                continue
            arrays = load_arrays(files.cut(superblock))
            clusters = ClusterTable.of_arrays("clusters", arrays)
            final = _final_clusters(files, superblock, clusters, arrays["up"])
            if superblock.level > 0:
                out = _told_children(files, children, final.take(arrays["of"]))
            else:
                out = self._segments(clusters, final, arrays["of"])
            files.save(files.final(superblock), out)
        leaves = [superblock for superblock, _ in self.items if superblock.level == 0]
        return [LeafSegments.read(files, leaf) for leaf in leaves]

    def _segments(
        self, clusters: ClusterTable, final: ClusterTable, of: NDArray[np.int32]
    ) -> dict[str, NDArray]:
        """Return the segment of each fragment of a leaf, and the segments that begin in it."""
        keep = final.voxels >= self.min_size
        begins = final.ids == clusters.ids
        small = begins & ~keep
        out = {"segment": np.where(keep, final.smallest, np.uint64(0))[of]}
        segments = final.take(begins & keep)
        out |= segments.take(np.argsort(segments.smallest, kind="stable")).arrays("segments")
        out["small"] = np.array([small.sum(), final.voxels[small].sum()], np.int64)
        return out


def _final_clusters(
    files: StitchFiles, superblock: Superblock, clusters: ClusterTable, up: NDArray[np.bool_]
) -> ClusterTable:
    """Return what clusters became: the parent knows it of those that went up."""
    if not up.any():
        return clusters
    told = ClusterTable.load(files.final(superblock.parent), superblock.name)
    columns = {name: getattr(clusters, name).copy() for name in clusters.names()}
    for name, column in columns.items():
        column[up] = getattr(told, name)
    return ClusterTable(**columns)


def _told_children(
    files: StitchFiles, children: Sequence[Superblock], entered: ClusterTable
) -> dict[str, NDArray]:
    """Return, by child, what became of the clusters that it handed up."""
    out: dict[str, NDArray] = {}
    at = 0
    for child in children:
        count = int(np.count_nonzero(load_arrays(files.cut(child), "up")["up"]))
        out |= entered.take(slice(at, at + count)).arrays(child.name)
        at += count
    return out


@dataclass(frozen=True)
class WriteSegments(Task):
    """Write the table of segments in ascending order, from sorted ranges.

    The table has the columns ``segment``, ``smallest_fragment``, ``voxels``, ``fragments`` and the
    bounding box in voxels, ``begin_z`` .. ``end_x`` (one past the last voxel).
    """

    items: Sequence[IdRange]
    run_dir: Path
    segment_ids: SegmentIds
    count: int
    """Segments in all ranges."""
    most: int = 0
    """With ids that stay: the largest ever given."""
    comparable: bool = False
    """With ids that stay: whether there are segments of the same blocks to compare with."""

    def run(self) -> dict[str, Any]:
        """Return the largest segments, and with ids that stay, how many did."""
        files = StitchFiles(self.run_dir)
        largest: list[tuple[int, int, int]] = []
        before = SegmentsBefore(files.before / files.segments.name) if self.comparable else None
        most, kept = self.most, 0
        require_folder(self.run_dir)
        with (
            atomic_file(files.smallest) as ids_file,
            atomic_file(files.segments) as table_file,
            atomic_file(files.ids) if self.segment_ids == "keep" else nullcontext() as names,
            pq.ParquetWriter(table_file, _SCHEMA, compression="zstd") as writer,
        ):
            header = {"descr": "<u8", "fortran_order": False, "shape": (self.count,)}
            for file in filter(None, (ids_file, names)):
                np.lib.format.write_array_header_1_0(file, header)
            waiting: list[pa.Table] = []
            done = 0
            for number, _, _ in self.items:
                segments = ClusterTable.load(files.sorted_segments(number), "segments")
                ids_file.write(segments.smallest.tobytes())
                ids = segments.smallest
                if self.segment_ids == "consecutive":
                    ids = np.arange(done + 1, done + len(segments) + 1, dtype=np.uint64)
                if names is not None:
                    ids = np.zeros(len(segments), np.uint64)
                    if before is not None:
                        ids = before.keep(segments.smallest, segments.before, segments.fragments)
                    new = np.flatnonzero(ids == 0)
                    kept += len(ids) - len(new)
                    ids[new] = np.arange(most + 1, most + 1 + len(new), dtype=np.uint64)
                    most += len(new)
                    names.write(ids.tobytes())
                done += len(segments)
                largest = _largest(largest, ids, segments)
                waiting.append(_arrow(ids, segments))
                waiting = _flush(writer, waiting, _ROWS)
            _flush(writer, waiting, 1)
        names_of = {"kept": kept, "new": self.count - kept, "most": most}
        return {
            **({"ids": names_of} if self.segment_ids == "keep" else {}),
            "largest": [
                {"id": segment, "voxels": voxels, "fragments": fragments}
                for voxels, segment, fragments in largest
            ],
        }


def _largest(
    before: list[tuple[int, int, int]], ids: Ids, segments: ClusterTable
) -> list[tuple[int, int, int]]:
    """Return voxels, id and fragments of the largest of some segments and those known before."""
    rows = np.lexsort((ids, -segments.voxels))[:_LARGEST]
    columns = (segments.voxels[rows], ids[rows], segments.fragments[rows])
    entries = before + list(zip(*(column.tolist() for column in columns), strict=True))
    return sorted(entries, key=lambda entry: (-entry[0], entry[1]))[:_LARGEST]


def _arrow(ids: Ids, segments: ClusterTable) -> pa.Table:
    boxes = np.ascontiguousarray(segments.boxes.T)
    columns = [ids, segments.smallest, segments.voxels, segments.fragments, *boxes]
    return arrow_table(columns, _SCHEMA)


def _flush(writer: pq.ParquetWriter, waiting: list[pa.Table], least: int) -> list[pa.Table]:
    """Write full row groups (any rest too, if ``least`` is 1); return what waits for more rows."""
    table = pa.concat_tables(waiting) if waiting else _SCHEMA.empty_table()
    while table.num_rows >= least:
        writer.write_table(table.slice(0, _ROWS).combine_chunks(), row_group_size=_ROWS)
        table = table.slice(_ROWS)
    return [table] if table.num_rows else []


@dataclass(frozen=True)
class Map(SuperblockTask):
    """Write the id map of leaves.

    The table of segments must exist: the place of a segment's smallest fragment in it is its
    consecutive id.
    """

    segment_ids: SegmentIds

    def run(self) -> None:
        """Write the map of each leaf."""
        files = StitchFiles(self.run_dir)
        smallest = map_array(files.smallest)
        for leaf, blocks in self.items:
            if files.map(leaf).exists():
                continue
            nodes = load_arrays(files.evidence(leaf), "nodes.ids", "nodes.sizes")
            segment = load_arrays(files.final(leaf), "segment")["segment"]
            if self.segment_ids != "fragment":
                distinct, back = np.unique(segment, return_inverse=True)
                known = distinct != 0
                named = np.zeros(len(distinct), np.uint64)
                row = np.searchsorted(smallest, distinct[known])
                keep = self.segment_ids == "keep"
                named[known] = map_array(files.ids)[row] if keep else row + 1
                segment = named[back]
            ids, sizes = nodes["nodes.ids"], nodes["nodes.sizes"]
            lut = BlockLut.build(np.asarray(blocks, np.int64), ids, segment, sizes)
            files.save(files.map(leaf), lut.arrays())
