"""Export of fragments, contacts and merges of a stitched run, on dask, by superblock.

A fragment lies in one block, and a contact in one block or across one face of two, so points and
positions are found block by block. They do not depend on superblocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import LOCAL_BITS, BlockGrid
from agq.blockwise.export.graph.tables import RECORD, SCHEMAS, VERSION, Table
from agq.blockwise.stitch.contacts import PARTS, ContactTable, NodeTable, load_contacts
from agq.blockwise.stitch.merge.agglomeration import MergeTable, ScoreTable, scores
from agq.blockwise.stitch.output.relabel import BlockLut
from agq.blockwise.stitch.settings import HALF_UNITS, Thresholds, exact
from agq.blockwise.stitch.steps import Step, digest
from agq.blockwise.stitch.superblocks import (
    Families,
    StitchFiles,
    Superblock,
    SuperblockTree,
)
from agq.blockwise.stitch.workers import AnyClient, Progress, Task, workers_of
from agq.blockwise.storage.arrays import Numbers, load_arrays, map_array
from agq.blockwise.storage.files import atomic_file, make_folder, write_atomic
from agq.blockwise.volumes.create import open_array
from agq.blockwise.volumes.triples import Triple, checked_triple, triple
from agq.errors import DamagedError, InputError, repairable
from agq.reading import read_record

Box = tuple[Triple, Triple]

_BATCH = 64
"""Most superblocks of a task."""


@dataclass(frozen=True)
class GraphReport:
    """Rows of each table."""

    fragments: int
    edges: int
    merges: int


def export_graph(
    run_dir: Path,
    out: Path,
    grid: BlockGrid,
    thresholds: Thresholds,
    client: AnyClient,
    *,
    unit: str = "nm",
    roi: Box | None = None,
    on_progress: Progress | None = None,
) -> GraphReport:
    """Write the graph of a stitched run; stopped anywhere, it goes on there.

    Parameters
    ----------
    run_dir
        Folder of the run, stitched to the end.
    out
        Folder to write.
    grid
        Blocks of the run.
    thresholds
        Those of its stitch.
    client
        Dask client whose workers see both folders under the same paths. None: this process.
    unit
        World unit of the grid, for the record.
    roi
        First voxel and one past the last, (z, y, x): fragments of the blocks in it, and the edges
        between them. Merges are always those of the whole run.
    on_progress
        Called with the name of the step, items done and items in all.

    Raises
    ------
    InputError
        If the folder holds another export, the ROI no block, or the run is not stitched, or is
        stitched anew meanwhile.
    """
    files = StitchFiles(run_dir)
    step = Step.read(run_dir, "lut")
    if not step.get("done"):
        raise InputError(f"{run_dir}: not stitched to the end; run `agq stitch {run_dir}` first")
    floor = Fraction(Step.read(run_dir, "agglomerate")["result"]["floor"])
    stored = thresholds.model_copy(update={"margin": float(floor)}).units
    shape = checked_triple("shape", read_record(files.contacts / "layout.json")["shape"], 1)
    present = np.flatnonzero(map_array(files.present)).astype(np.int64)
    chosen = present
    if roi:
        chosen = grid.select(*roi)
    if roi and not len(chosen):
        raise InputError("graph: the ROI holds no block of the volume")
    units = math.lcm(stored, thresholds.units)
    record: dict[str, Any] = {
        "version": VERSION,
        "grid": grid.to_dict(),
        "unit": unit,
        "roi": roi,
        "units": units,
    }
    record["key"] = digest(step["key"], shape)
    _require_same(out, record)
    tree = SuperblockTree(grid.shape, shape)
    leaves = tree.leaves(present)
    raised = exact(thresholds.margin) - floor
    work = _Work(run_dir, out, grid, thresholds, units, units // stored, int(raised * units))
    workers = workers_of(client, out, on_progress)
    held = tree.leaves(np.intersect1d(chosen, present)) if roi else leaves
    tasks: list[Task] = [
        WriteLeaf(batch, work, roi) for batch in workers.batches(held, _BATCH, share=8)
    ]
    for level in (leaves, *tree.levels(leaves)):
        tasks += [WriteMerges(batch, work) for batch in workers.batches(level, _BATCH, share=8)]
    try:
        counts = workers.run("graph", tasks)
    finally:
        # Whatever is missing in the tables of a stitch that has gone is not damaged.
        if Step.read(run_dir, "lut") != step:
            raise InputError(
                f"{run_dir} was stitched anew during the export; remove {out} and export again"
            )
    write_atomic(out / RECORD, json.dumps({**record, "done": True}, indent=1).encode())
    return GraphReport(*(sum(column) for column in zip((0, 0, 0), *counts, strict=True)))


def _require_same(out: Path, record: dict[str, Any]) -> None:
    """Begin an export, or go on with the same one."""
    try:
        before = read_record(out / RECORD)
    except FileNotFoundError:
        if out.exists() and any(out.iterdir()):
            raise InputError(f"{out}: holds other files; name another folder") from None
        make_folder(out)
        write_atomic(out / RECORD, json.dumps(record | {"done": False}, indent=1).encode())
        return
    if {k: v for k, v in before.items() if k != "done"} != json.loads(json.dumps(record)):
        raise InputError(f"{out}: holds the graph of another stitch or ROI; name another folder")


@dataclass(frozen=True)
class _Work:
    """What all tasks are given.

    Scores are written in `units`, those of the stored merges multiplied by `scale`; `margin` is
    that of the stitch above them, in `units`.
    """

    run_dir: Path
    out: Path
    grid: BlockGrid
    thresholds: Thresholds
    units: int
    scale: int
    margin: int

    def path(self, table: Table, superblock: Superblock) -> Path:
        return self.out / table / f"{superblock.name.replace('/', '-')}.parquet"

    def rows(self, table: Table, superblock: Superblock) -> int:
        """Return how many rows were written before; -1: none yet."""
        path = self.path(table, superblock)
        return int(pq.read_metadata(path).num_rows) if path.exists() else -1

    def write(self, table: Table, superblock: Superblock, columns: Sequence[Any]) -> int:
        schema = SCHEMAS[table]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
        rows = pa.Table.from_arrays(arrays, schema=schema)
        with atomic_file(self.path(table, superblock)) as file:
            pq.write_table(rows, file)
        return int(rows.num_rows)


@dataclass(frozen=True)
class WriteMerges(Task):
    """Write the merges of superblocks that count at the margin in use."""

    items: Families
    work: _Work

    def run(self) -> tuple[int, int, int]:
        """Return how many."""
        total = 0
        for place in self.items.places():
            rows = self.work.rows("merges", place)
            if rows < 0:
                arrays = load_arrays(StitchFiles(self.work.run_dir).merges(place), "merges.")
                work, stored = self.work, MergeTable.of_arrays("merges", arrays)
                merges = stored.above(Fraction(work.margin, work.scale))
                over = merges.numerator * work.scale - work.margin * merges.denominator
                rows = work.write("merges", place, _scored(merges, over, work.units))
            total += rows
        return 0, 0, total


def _scored(table: ScoreTable, numerator: Numbers, units: int) -> list[NDArray]:
    score = numerator / table.denominator / units
    return [table.u, table.v, numerator, table.denominator, score]


@dataclass(frozen=True)
class WriteLeaf(Task):
    """Write the fragments of some blocks of leaves, and the edges that begin in them."""

    items: Families
    """Leaves with blocks of the ROI."""

    work: _Work
    roi: Box | None

    def run(self) -> tuple[int, int, int]:
        """Return how many fragments and edges there are."""
        totals = [0, 0]
        chosen = self.work.grid.select(*self.roi) if self.roi else None
        for leaf, blocks in self.items:
            counts = [self.work.rows(table, leaf) for table in ("fragments", "edges")]
            if min(counts) < 0:
                counts = self._write(leaf, blocks, chosen)
            totals = [a + b for a, b in zip(totals, counts, strict=True)]
        return totals[0], totals[1], 0

    def _write(
        self, leaf: Superblock, blocks: NDArray[np.int64], chosen: NDArray[np.int64] | None
    ) -> list[int]:
        work, files = self.work, StitchFiles(self.work.run_dir)
        nodes = NodeTable.load(files.evidence(leaf), "nodes")
        contacts = ContactTable.concatenate([load_contacts(files.evidence(leaf), p) for p in PARTS])
        contacts = contacts.take(np.lexsort((contacts.v, contacts.u)))
        lut = BlockLut.open(files.map(leaf))
        if chosen is not None:
            nodes = nodes.take(np.isin(BlockGrid.split_ids(nodes.ids)[0], chosen))
            ends = [BlockGrid.split_ids(end)[0] for end in (contacts.u, contacts.v)]
            contacts = contacts.take(np.isin(ends, chosen).all(axis=0))
        fragments: Any = open_array(work.run_dir / "data.zarr", "fragments", "r")
        points = np.zeros((len(nodes), 3), np.int64)
        found, rows_of = np.zeros((len(contacts), 5), np.int64), _PairRows(contacts.u, contacts.v)
        for number in blocks.tolist():
            start, stop = work.grid.write_box(number)
            end = np.minimum(np.array(stop) + 1, work.grid.volume_shape)
            box = tuple(slice(a, int(b)) for a, b in zip(start, end, strict=True))
            window = np.asarray(fragments[box], np.uint64)
            core = triple(b - a for a, b in zip(start, stop, strict=True))
            labels = window[: core[0], : core[1], : core[2]]
            bounds = work.grid.fragment_ids(number, [1, 2**LOCAL_BITS - 1])
            begin = int(np.searchsorted(nodes.ids, bounds[0]))
            last = int(np.searchsorted(nodes.ids, bounds[1], side="right"))
            ids, found_points = central_voxels(labels)
            if not np.array_equal(ids, nodes.ids[begin:last]):
                damaged = DamagedError(f"block {number}: fragments are not those of the stitch")
                raise repairable(damaged, work.run_dir)
            points[begin:last] = found_points + start
            u, v, counts, voxels = touching(window, core)
            row, known = rows_of.of(u, v)
            sides = np.prod(work.grid.voxel_size) // np.array(work.grid.voxel_size)
            columns = (counts.sum(axis=1)[:, None], (counts @ sides)[:, None], voxels + start)
            found[row] = np.concatenate(columns, axis=1)[known]
        numerator, denominator = scores(contacts, work.thresholds)
        numerator *= work.units // work.thresholds.units
        keep = denominator > 0
        contacts, found = contacts.take(keep), found[keep]
        scored = ScoreTable(contacts.u, contacts.v, numerator[keep], denominator[keep])
        size, offset = (np.array(v, np.int64) for v in (work.grid.voxel_size, work.grid.offset))
        none = found[:, 0] == 0
        places = np.concatenate((found[:, 2:], found[:, 2:] * size + offset), axis=1)
        masked = [pa.array(column, mask=none) for column in places.T]
        rows = [nodes.ids, lut.segments_of(nodes.ids), nodes.sizes, *nodes.boxes.T, *points.T]
        score = _scored(scored, numerator[keep], work.units)
        edges = [*score, *_evidence(contacts), found[:, 0], found[:, 1], *masked]
        return [work.write("fragments", leaf, rows), work.write("edges", leaf, edges)]


class _PairRows:
    """Where pairs of fragments lie in a table that is sorted by them."""

    def __init__(self, u: NDArray[np.uint64], v: NDArray[np.uint64]) -> None:
        self._ids = np.unique(np.concatenate((u, v)))
        self._keys = self._key(u, v)

    def _key(self, u: NDArray[np.uint64], v: NDArray[np.uint64]) -> NDArray[np.int64]:
        # Places of ids instead of ids: two of them fit in 64 bits, in the same order.
        first, second = (np.searchsorted(self._ids, end) for end in (u, v))
        return first * len(self._ids) + second

    def of(
        self, u: NDArray[np.uint64], v: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows of those pairs that the table has, and which these are."""
        known = np.flatnonzero(np.isin(u, self._ids) & np.isin(v, self._ids))
        keys = self._key(u[known], v[known])
        rows = np.searchsorted(self._keys, keys)
        same = rows < len(self._keys)
        same[same] = self._keys[rows[same]] == keys[same]
        return rows[same], known[same]


def _evidence(contacts: ContactTable) -> list[Any]:
    """Return class and mean affinity of contacts."""
    count = contacts.across_count + contacts.within_count
    kind = np.select([contacts.across_count > 0, count > 0], ["across", "within"], "overlap")
    affinity = (contacts.across_sum + contacts.within_sum) / np.maximum(count, 1) / HALF_UNITS
    return [pa.array(kind.astype(object), pa.string()), pa.array(affinity, mask=count == 0)]


def central_voxels(labels: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the labels but 0, ascending, and of each the voxel nearest to its centroid, (n, 3).

    Of voxels as near, the first in C order.
    """
    voxels = np.argwhere(labels)
    ids, group = np.unique(labels[labels > 0], return_inverse=True)
    return ids, voxels[_central(voxels, group, len(ids))]


def touching(
    window: NDArray[np.uint64], core: Triple
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the pairs of labels that touch in a block, and where.

    Parameters
    ----------
    window
        Labels of the block, and of a plane more on each axis where there is one.
    core
        Shape of the block.

    Returns
    -------
    u, v
        Labels, ``u < v``; sorted and distinct.
    counts
        Touching pairs of voxels on z, y, x; (n, 3).
    voxels
        Of the lower voxels of these pairs, the one nearest to their centroid, (n, 3); of several,
        the first in C order.
    """
    pairs, voxels, axes = [], [], []
    for axis in range(3):
        low = [slice(0, n) for n in core]
        low[axis] = slice(0, min(core[axis], window.shape[axis] - 1))
        high = list(low)
        high[axis] = slice(1, low[axis].stop + 1)
        a, b = window[tuple(low)], window[tuple(high)]
        touch = (a != b) & (a > 0) & (b > 0)
        pairs.append(np.stack((np.minimum(a[touch], b[touch]), np.maximum(a[touch], b[touch]))))
        voxels.append(np.argwhere(touch))
        axes.append(np.full(len(voxels[-1]), axis))
    every, where, along = np.concatenate(pairs, 1), np.concatenate(voxels), np.concatenate(axes)
    order = np.lexsort((*where.T[::-1], every[1], every[0]))
    every, where, along = every[:, order], where[order], along[order]
    new = np.ones(len(where), bool)
    new[1:] = (every[:, 1:] != every[:, :-1]).any(axis=0)
    group, (u, v) = np.cumsum(new) - 1, every[:, new]
    counts = np.stack([np.bincount(group[along == d], minlength=len(u)) for d in range(3)], axis=1)
    return u, v, counts, where[_central(where, group, len(u))]


def _central(voxels: NDArray[np.int64], group: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return, for each group, the row nearest to its centroid; of several the first."""
    size = np.bincount(group, minlength=count)
    apart = np.zeros(len(voxels))
    for column in voxels.T:
        # Sums of integers, so exact: the order of voxels does not matter.
        apart += (column - (np.bincount(group, column, count) / size)[group]) ** 2
    best = np.full(count, np.inf)
    np.minimum.at(best, group, apart)
    rows = np.flatnonzero(apart == best[group])
    return rows[np.unique(group[rows], return_index=True)[1]]
