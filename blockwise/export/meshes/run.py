"""Meshes of all segments of an export, on dask.

1. **surfaces.** A task reads blocks and writes the triangles of each into one file in the export's
   working folder.
2. **mesh index.** A task says of many blocks which segments they hold, by shard.
3. **meshes.** A task owns shards. For each of their segments it reads the fragments, merges and
   simplifies them, one segment at a time.

Surfaces and meshes are journalled, by block and by shard. Memory is bounded by the block, and by
the largest segment or `surface.MOST_FACES`, whichever is smaller, not by the volume.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agq.blockwise.export.meshes import surface
from agq.blockwise.export.meshes.cells import triangles
from agq.blockwise.export.meshes.encode import (
    encode,
    info,
    pack_shard,
    shard_name,
)
from agq.blockwise.export.meshes.fragments import BlockFragments, Fragment, write_fragments
from agq.blockwise.export.meshes.index import (
    GROUP,
    Entries,
    read_index,
    segments_of,
    write_index,
)
from agq.blockwise.export.target import MARK, Target, first_line
from agq.blockwise.export.volume import ExportError, Scale
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.writer import run_journalled
from agq.blockwise.stitch.steps import digest
from agq.blockwise.stitch.workers import AnyClient, Progress, Task, Workers, workers_of
from agq.blockwise.storage.files import Unsynced, make_folder, write_atomic
from agq.blockwise.volumes.open import Volume
from agq.blockwise.volumes.triples import Triple, triple
from agq.reading import parse_json, read_file

FOLDER = "mesh"
"""In the export; its ``info`` names it."""

FINE_NM = 16.0
"""Meshes are made of the finest level whose voxels are at least so large along each axis."""

KEEP = 0.1
"""Share of the faces that simplification keeps, where bounds allow it."""

_BLOCK = (128, 128, 128)
_SHARD_VOXELS = 2**24
_SMALL_VOXELS = 2**18
_FEW_BITS = 3
_BATCH = 16
_VERSION = 3


def mesh_level(scales: Sequence[Scale]) -> int:
    """Return the level to make meshes of; the finest if none is coarse enough."""
    coarse = [i for i, scale in enumerate(scales) if min(scale.resolution) >= FINE_NM]
    return coarse[0] if coarse else 0


@dataclass(frozen=True)
class Plan:
    """How the meshes of an export are made.

    Attributes
    ----------
    volume, scale
        The level that they are made of.
    out
        The export.
    block
        Triple of what a task item of the first step reads, (z, y, x).
    keep
        Share of the faces to keep.
    """

    volume: Volume
    scale: Scale
    out: Target
    block: Triple = _BLOCK
    keep: float = KEEP

    @property
    def grid(self) -> Triple:
        """Blocks along each axis."""
        return triple(-(-n // b) for n, b in zip(self.volume.shape, self.block, strict=True))

    @property
    def shard_bits(self) -> int:
        """Bits of the number of a shard."""
        bits = math.log2(math.prod(self.volume.shape))
        # Shards are made side by side: a small volume has some, too.
        few = min(_FEW_BITS, bits - math.log2(_SMALL_VOXELS))
        return max(0, math.ceil(max(few, bits - math.log2(_SHARD_VOXELS))))

    @property
    def surfaces(self) -> Path:
        """Folder of the fragments."""
        return self.out.work / "surfaces"

    def index(self, group: int) -> Path:
        """Return the table of `GROUP` blocks."""
        return self.surfaces / "index" / f"{group}.npy"

    @property
    def groups(self) -> int:
        """Tables in all."""
        return -(-math.prod(self.grid) // GROUP)

    def journal(self, step: str) -> Path:
        """Return the folder of a step's journal."""
        return self.out.work / "journal" / step

    def file(self, block: int) -> Path:
        """Return the file of a block's fragments."""
        return self.surfaces / f"{block}.npy"


def export_meshes(plan: Plan, client: AnyClient, *, on_progress: Progress | None = None) -> int:
    """Write the meshes of an export, or those that are missing.

    Parameters
    ----------
    plan
        What to make. The export of the volume is there.
    client
        Dask client whose workers see volumes and folders under the same paths. None: this process.
    on_progress
        Called with the name of the step, items done and items in all.

    Returns
    -------
    int
        Shards written now; 0 if all meshes were there.

    Raises
    ------
    ExportError
        If blocks or shards failed.
    InputError
        If the export cannot be written to.
    """
    plan = replace(plan, out=plan.out.opened())
    with closing(workers_of(client, plan.out.place, on_progress)) as workers:
        _begin(plan)
        shards = 2**plan.shard_bits
        todo = np.flatnonzero(~Journal(plan.journal("meshes")).done(shards)).tolist()
        if todo:
            blocks = math.prod(plan.grid)
            missing = np.flatnonzero(~Journal(plan.journal("surfaces")).done(blocks)).tolist()
            _run(workers, "surfaces", plan, [Surfaces(b, plan) for b in _batches(workers, missing)])
            groups = [n for n in range(plan.groups) if not plan.index(n).exists()]
            workers.run("mesh index", [Index([n], plan) for n in groups], plan.groups - len(groups))
            _run(workers, "meshes", plan, [Meshes(b, plan) for b in _batches(workers, todo)])
            plan.out.write(f"{FOLDER}/info", info(plan.shard_bits))
        plan.out.refer("mesh", FOLDER)
        shutil.rmtree(plan.surfaces, ignore_errors=True)
        return len(todo)


def _batches(workers: Workers, items: list[int]) -> list[Sequence[int]]:
    return workers.batches(items, _BATCH, share=8)


def _run(workers: Workers, step: str, plan: Plan, tasks: Sequence[Task]) -> None:
    failed = sum(workers.run(step, tasks))
    if failed:
        record = Journal(plan.journal(step)).failed()[0]
        raise ExportError(
            f"{step}: {failed} failed, first: {first_line(record.reason)} (tracebacks in"
            f" {plan.journal(step)})"
        )
    workers.end_journal(plan.journal(step))


def _begin(plan: Plan) -> None:
    """Drop meshes that were made in another way."""
    mark = parse_json(plan.out.read(MARK) or b"{}")
    key = digest([mark.get("key"), plan.scale.key, plan.keep, list(plan.block), _VERSION])
    record = plan.out.work / "meshes.json"
    if record.is_file() and read_file(record) == key.encode():
        return
    record.unlink(missing_ok=True)
    for step in ("meshes", "surfaces"):
        shutil.rmtree(plan.journal(step), ignore_errors=True)
    shutil.rmtree(plan.surfaces, ignore_errors=True)
    plan.out.remove(FOLDER)
    make_folder(plan.out.work)
    write_atomic(record, key.encode())


@dataclass(frozen=True)
class Surfaces(Task):
    """Write the fragments of some blocks, given by their places in the grid, in C order."""

    items: Sequence[int]
    plan: Plan

    def run(self) -> int:
        """Return how many blocks failed."""
        plan = self.plan

        def work(number: int, _unsynced: Unsynced) -> tuple[int, dict[str, str]]:
            index = np.unravel_index(number, plan.grid)
            start = [int(i) * b for i, b in zip(index, plan.block, strict=True)]
            shape = plan.volume.shape
            stop = [min(a + b, n) for a, b, n in zip(start, plan.block, shape, strict=True)]
            # The cells between this block and the next are this one's, and those at the border of
            # the volume, beyond which nothing lies.
            end = [min(b + 1, n) for b, n in zip(stop, shape, strict=True)]
            labels = plan.volume.read(start, end).astype(np.uint64, copy=False)
            mine = labels[tuple(slice(0, b - a) for a, b in zip(start, stop, strict=True))]
            pad = [(int(a == 0), int(b == n)) for a, b, n in zip(start, stop, shape, strict=True)]
            first = [a - before for a, (before, _) in zip(start, pad, strict=True)]
            owners, found = triangles(np.pad(labels, pad), first, shape)
            write_fragments(plan.file(number), owners, found, _voxels(mine))
            return mine.size, {}

        return run_journalled(plan.journal("surfaces"), self.items, work)


@dataclass(frozen=True)
class Index(Task):
    """Write some tables of the index."""

    items: Sequence[int]
    plan: Plan

    def run(self) -> None:
        """Write them; a table that exists is whole."""
        plan = self.plan
        for group in self.items:
            end = min((group + 1) * GROUP, math.prod(plan.grid))
            blocks = [(n, plan.file(n)) for n in range(group * GROUP, end)]
            write_index(plan.index(group), blocks, plan.shard_bits)


@dataclass(frozen=True)
class Meshes(Task):
    """Write some shards of meshes."""

    items: Sequence[int]
    plan: Plan

    def run(self) -> int:
        """Return how many shards failed."""
        plan = self.plan
        places = read_index(map(plan.index, range(plan.groups)), self.items)

        def work(shard: int, _unsynced: Unsynced) -> tuple[int, dict[str, str]]:
            done = {segment: _mesh(plan, rows) for segment, rows in segments_of(places[shard])}
            if done:
                name = f"{FOLDER}/{shard_name(shard, plan.shard_bits)}"
                plan.out.write(name, pack_shard(done))
            return len(done), {}

        return run_journalled(plan.journal("meshes"), self.items, work)


def _mesh(plan: Plan, entries: Entries) -> tuple[bytes, bytes]:
    """Return the encoded mesh of a segment, given by where its fragments are."""
    voxels, faces = int(entries["voxels"].sum()), int(entries["faces"].sum())

    def fragments() -> Iterator[Fragment]:
        for block, row in zip(entries["block"].tolist(), entries["row"].tolist(), strict=True):
            yield BlockFragments(plan.file(block)).read(row)

    scale = plan.scale
    if faces <= surface.MOST_FACES:
        mesh, keep = surface.merge(fragments(), plan.volume.shape), plan.keep
    else:
        part = surface.PART_KEEP
        mesh = surface.merge_large(fragments(), plan.volume.shape, part)
        keep = plan.keep / part
    resolution = scale.resolution[::-1]
    levels = surface.simplify(mesh, voxels, resolution, keep)
    place = [
        o * r + s for o, r, s in zip(scale.voxel_offset, scale.resolution, scale.shift, strict=True)
    ]
    return encode(levels, resolution, place[::-1])


def _voxels(labels: npt.NDArray[Any]) -> dict[int, int]:
    """Return the voxels of each label: by runs, of which there are far fewer."""
    flat = labels.ravel()
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
    lengths = np.diff(np.append(starts, flat.size))
    known, places = np.unique(flat[starts], return_inverse=True)
    counts = np.bincount(places, lengths).astype(int)
    return dict(zip(known.tolist(), counts.tolist(), strict=True))
