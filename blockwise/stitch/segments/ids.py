"""Tasks of the stitch that turn merges into segment ids, without a global table.

Going up, each superblock joins what enters it (fragments, or its children's clusters that went up)
by the merges that count at the margin in use, and adds up sizes. Clusters that its residual graph
does not hold are final. Going down, each superblock tells its children what became of the clusters
they handed up, until every fragment of a leaf knows the smallest fragment of its segment.

A larger margin needs merges of higher scores only. Scores along a branch of the dendrogram never
rise, so a cluster that is cut in a superblock takes part in no merge further up that still counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.stitch.files import StitchFiles
from agq.blockwise.stitch.merge.components import connected_components
from agq.blockwise.stitch.merge.graph import MergeTable, positions
from agq.blockwise.stitch.output.relabel import BlockLut
from agq.blockwise.stitch.settings import SegmentIds
from agq.blockwise.stitch.superblocks import Superblock
from agq.blockwise.stitch.tasks import load_nodes
from agq.blockwise.storage.npz import array_table, load_arrays, map_array, save_arrays, table_arrays


@dataclass(frozen=True)
class ClusterTable:
    """Clusters of fragments.

    Attributes
    ----------
    ids
        Smallest fragment of each, uint64.
    voxels, fragments
        Voxels and fragments of each, int64.
    boxes
        Bounding box in voxels of the volume, int64 (n, 6): first voxel and one past the last.
    """

    ids: NDArray[np.uint64]
    voxels: NDArray[np.int64]
    fragments: NDArray[np.int64]
    boxes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray) -> ClusterTable:
        """Return some rows."""
        return ClusterTable(*(getattr(self, field.name)[rows] for field in fields(self)))


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
    boxes = joined.boxes.copy()
    voxels, fragments = np.zeros((2, len(joined)), np.int64)
    np.add.at(voxels, row, table.voxels)
    np.add.at(fragments, row, table.fragments)
    np.minimum.at(boxes[:, :3], row, table.boxes[:, :3])
    np.maximum.at(boxes[:, 3:], row, table.boxes[:, 3:])
    of = np.empty(len(row), np.int32)
    of[order] = row
    return of, ClusterTable(joined.ids, voxels, fragments, boxes)


def cut_superblocks(
    run_dir: str, margin: int, superblocks: Sequence[tuple[Superblock, Sequence[Superblock]]]
) -> int:
    """Write the clusters of some superblocks, given with their children; return how many.

    Parameters
    ----------
    margin
        Half units by which thresholds lie above those of the agglomeration.
    """
    files = StitchFiles(Path(run_dir))
    for superblock, children in superblocks:
        if files.cut(superblock).exists():
            continue
        if superblock.level == 0:
            nodes = load_nodes(files.evidence(superblock))
            ones = np.ones(len(nodes), np.int64)
            entering = ClusterTable(nodes.ids, nodes.sizes, ones, nodes.boxes)
        else:
            parts = [_handed_up(files, child) for child in children]
            columns = ([getattr(p, f.name) for p in parts] for f in fields(ClusterTable))
            entering = ClusterTable(*(np.concatenate(column) for column in columns))
        arrays = load_arrays(files.merges(superblock))
        merges = array_table(MergeTable, "merges", arrays).above(margin)
        of, clusters = join_clusters(entering, merges)
        up = _is_in(arrays["up"], clusters.ids)
        save_arrays(
            files.cut(superblock), {"of": of, "up": up} | table_arrays("clusters", clusters)
        )
    return len(superblocks)


def _handed_up(files: StitchFiles, child: Superblock) -> ClusterTable:
    arrays = load_arrays(files.cut(child), "up", "clusters.")
    return array_table(ClusterTable, "clusters", arrays).take(np.flatnonzero(arrays["up"]))


def _is_in(ascending: NDArray[np.uint64], ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(ids), bool)
    place = np.minimum(np.searchsorted(ascending, ids), len(ascending) - 1)
    return np.asarray(ascending[place] == ids)


def name_superblocks(
    run_dir: str,
    min_size: int,
    superblocks: Sequence[tuple[Superblock, Sequence[Superblock]]],
) -> int:
    """Write what became of all that entered some superblocks; their parents must be done.

    A leaf also writes the segments whose smallest fragment it holds.

    Parameters
    ----------
    min_size
        Segments of fewer voxels become background.
    """
    files = StitchFiles(Path(run_dir))
    for superblock, children in superblocks:
        if files.names(superblock).exists():
            continue
        arrays = load_arrays(files.cut(superblock))
        own, up = array_table(ClusterTable, "clusters", arrays), np.flatnonzero(arrays["up"])
        final = ClusterTable(*(getattr(own, field.name).copy() for field in fields(own)))
        parent = files.names(superblock.parent)
        if len(up):
            told = array_table(
                ClusterTable, superblock.name, load_arrays(parent, f"{superblock.name}.")
            )
            for field in fields(ClusterTable):
                getattr(final, field.name)[up] = getattr(told, field.name)
        of = arrays["of"]
        if superblock.level > 0:
            out: dict[str, NDArray] = {}
            at = 0
            for child in children:
                count = int(np.count_nonzero(load_arrays(files.cut(child), "up")["up"]))
                out |= table_arrays(child.name, final.take(of[at : at + count]))
                at += count
        else:
            keep = final.voxels >= min_size
            here = final.ids == own.ids
            small = here & ~keep
            names = np.where(keep, final.ids, np.uint64(0))
            out = {"segment": names[of]} | table_arrays(
                "segments", final.take(np.flatnonzero(here & keep))
            )
            out["small"] = np.array([small.sum(), final.voxels[small].sum()], np.int64)
        save_arrays(files.names(superblock), out)
    return len(superblocks)


def map_leaves(
    run_dir: str,
    segment_ids: SegmentIds,
    leaves: Sequence[tuple[Superblock, Sequence[int]]],
) -> int:
    """Write the id map of some leaves, given with their blocks; return how many.

    The table of segments must be there: the place of a segment's smallest fragment in it is its
    consecutive id.
    """
    files = StitchFiles(Path(run_dir))
    smallest = map_array(files.smallest)
    for leaf, blocks in leaves:
        if files.map(leaf).exists():
            continue
        ids = load_arrays(files.evidence(leaf), "nodes.ids")["nodes.ids"]
        segment = load_arrays(files.names(leaf), "segment")["segment"]
        if segment_ids == "consecutive":
            distinct, back = np.unique(segment, return_inverse=True)
            numbers = (np.searchsorted(smallest, distinct) + 1).astype(np.uint64)
            numbers[distinct == 0] = 0
            segment = numbers[back]
        BlockLut.build(np.asarray(blocks, np.int64), ids, segment).save(files.map(leaf))
    return len(leaves)
