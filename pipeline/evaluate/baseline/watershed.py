"""Watershed fragments of the affinities of a finished run, block by block.

The usual pipeline after a network for affinities (Funke et al., TPAMI 2019; Sheridan et al.,
Nature Methods 2023): in every section, the places where the mean of the two in-plane affinities is
above a threshold; the distance to their border; its maxima as seeds; a watershed. The fragments
are then agglomerated like any others. Blocks, ids, sidecars and journal are those of the run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.writer import BlockWriter
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockRecord, BlockState, this_worker
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.volumes.boxes import unordered
from agq.blockwise.volumes.create import open_array
from agq.errors import InputError
from agq.model.decode.inference import connected_labels
from agq.model.decode.supervoxels import block_fragments
from agq.pipeline.folder import RunFolder


@dataclass(frozen=True)
class WatershedSettings:
    """How fragments are made.

    Attributes
    ----------
    boundary
        Mean in-plane affinity above which a voxel is inside a neurite.
    seed_distance
        Seeds are the maxima of the distance within windows of this many voxels.
    grow
        Whether fragments also grow over the boundary, so that no voxel is left 0; otherwise
        voxels outside are background.
    context
        Voxels in y and x around a block that are looked at.
    """

    boundary: float = 0.5
    seed_distance: int = 10
    grow: bool = False
    context: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.boundary < 1:
            raise InputError(f"boundary {self.boundary}: give an affinity from 0 to below 1")
        if self.seed_distance < 1 or self.context < 0:
            raise InputError("seed distance must be at least 1 voxel, context at least 0")


def fragments_of(
    affinities: npt.NDArray[np.uint8], settings: WatershedSettings
) -> npt.NDArray[np.int64]:
    """Segment every section of (3, z, y, x) uint8 affinities; labels are unique in the volume."""
    return block_fragments(
        affinities,
        boundary=settings.boundary,
        seed_distance=settings.seed_distance,
        grow=settings.grow,
    )


@dataclass(frozen=True)
class WatershedRun:
    """Where fragments come from and go to; picklable, for workers of dask.

    The source is the run's container with the affinities; the folder of the fragments has
    data.zarr, sidecars and journal; the grid is `BlockGrid.to_dict()` of the run.
    """

    source: Path
    folder: Path
    grid: dict[str, Any]
    settings: WatershedSettings


def do_block(job: WatershedRun, number: int) -> BlockRecord:
    """Make and write the fragments and the sidecar of one block; return its journal record."""
    started, begun = time.time(), time.perf_counter()
    grid = BlockGrid.from_dict(job.grid)
    (z0, y0, x0), (z1, y1, x1) = grid.read_box(number)
    pad = job.settings.context
    _, height, width = grid.volume_shape
    top, left = max(0, y0 - pad), max(0, x0 - pad)
    array = open_array(job.source, "affinities", "r")
    window = np.asarray(
        array[:, z0:z1, top : min(height, y1 + pad), left : min(width, x1 + pad)], np.uint8
    )
    read_s = time.perf_counter() - begun
    inner = (slice(None), slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    # Cropping may cut a fragment into pieces, and every fragment of a block is one piece.
    labels, n = connected_labels(fragments_of(window, job.settings)[inner])
    compute_s = time.perf_counter() - begun - read_s
    affinities = np.ascontiguousarray(window[(slice(None), *inner)])
    sums = BlockWriter.open(job.folder, grid).write(number, labels, affinities)
    return BlockRecord(
        block=number,
        state="done",
        started=started,
        finished=time.time(),
        read_s=read_s,
        compute_s=compute_s,
        write_s=time.perf_counter() - begun - read_s - compute_s,
        labels=n,
        sums=sums,
        **grid.place(number),
    )


def make_fragments(
    run: RunFolder,
    settings: WatershedSettings,
    *,
    client: Any = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> WatershedRun:
    """Make watershed fragments of all blocks of a run; those that exist are kept.

    Parameters
    ----------
    run
        A run with finished predictions that kept its affinities.
    settings
        How; other settings go to another folder.
    client
        A `distributed.Client`; None: threads of this process.
    on_progress
        Called with ("watershed", blocks done, blocks in all).

    Raises
    ------
    InputError
        If the run has no affinities or is not finished.
    """
    job = _job(run, settings)
    grid = BlockGrid.from_dict(job.grid)
    ranks = Journal(run.journal("predict")).ranks(np.arange(grid.n_blocks))
    predicted, skipped = ranks == BlockState.DONE, ranks == BlockState.SKIPPED
    if not predicted.any():
        raise InputError(f"{run.path}: no block is done yet; finish `agq predict` first")
    units: Any = open_array(run.container, "fragments", "r").attrs["units"]
    BlockWriter.create(job.folder, grid, str(units[0]))
    folder = job.folder / "journal" / "predict"
    folder.mkdir(parents=True, exist_ok=True)
    finished = Journal(folder).done(grid.n_blocks)
    todo = np.flatnonzero(predicted & ~finished).tolist()
    total = int(predicted.sum())
    with JournalWriter(folder, this_worker("baseline")) as writer:
        now = time.time()
        writer.finish_many(
            BlockRecord(
                block=number,
                state="skipped",
                reason="skipped by predict",
                started=now,
                finished=now,
                **grid.place(number),
            )
            for number in np.flatnonzero(skipped & ~finished).tolist()
        )
        records = unordered(partial(do_block, job), todo, client=client)
        for ended, record in enumerate(records, total - len(todo) + 1):
            writer.finish(record)
            if on_progress is not None:
                on_progress("watershed", ended, total)
    return job


def _job(run: RunFolder, settings: WatershedSettings) -> WatershedRun:
    """Return the folder of a run's fragments by these settings, and what they are made of."""
    record = run.record()
    if (record["config"].get("input") or {}).get("fragments"):
        raise InputError(
            f"{run.path}: a stitch of another model's fragments keeps no affinities for a watershed"
        )
    if not record["identity"].get("affinities"):
        raise InputError(
            f"{run.path}: this run did not keep its affinities; run again, into another run_dir, "
            "with --set output.affinities=true"
        )
    text = json.dumps([asdict(settings), record["identity_hash"]], sort_keys=True)
    name = f"watershed-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    grid = run.grid().to_dict()
    return WatershedRun(run.container, run.path / "baselines" / name, grid, settings)
