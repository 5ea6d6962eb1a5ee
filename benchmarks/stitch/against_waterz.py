"""The stitch against waterz.agglomerate over the whole of a volume (see tables.py)."""

import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from memory import peak_mib
from volumes import STEPS, CpuTime, make_array, warm_up

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.packs import sidecar_path
from agq.blockwise.blocks.sidecar import build_sidecar
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.run import StitchSpec, run_stitch
from agq.blockwise.stitch.settings import DaskSettings
from agq.blockwise.storage.files import write_atomic
from agq.blockwise.volumes.create import open_array, write_chunk

SHAPE = (100, 1024, 1024)
SCORING = "OneMinus<MeanAffinity<RegionGraphType, ScoreValue>>"
CELLS = ((24, 28, 28), (10, 10, 10))
"""Mean size of an object's cells: those of a network's objects, and those of a watershed."""


def made_volume(size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Objects of brick-shaped cells with walls at odd places, and affinities to match.

    Rows of bricks are shifted against each other, so that a cell touches about as many others as a
    fragment of a watershed does. Cells of one object follow each other on one axis. Affinities are
    0.75 to 1 inside an object and spread over everything between two: contacts of all scores occur.
    """
    rng = np.random.default_rng(0)
    walls, counts = [], []
    for n, cell in zip(SHAPE, size, strict=True):
        walls.append(np.sort(rng.choice(np.arange(4, n + cell), (n + cell) // cell, replace=False)))
        counts.append(len(walls[-1]) + 1)
    cells = np.arange(1, int(np.prod(counts)) + 1, dtype=np.uint32).reshape(counts)
    # Half of the cells belong to the object of the cell before, on an axis of their own choice.
    axis = rng.integers(0, 6, counts)
    for place in np.argwhere(axis < 3):
        before = place.copy()
        before[axis[tuple(place)]] -= 1
        if before.min() >= 0:
            cells[tuple(place)] = cells[tuple(before)]
    labels = np.empty(SHAPE, np.uint32)
    shift_y = rng.integers(0, size[1], counts[0])
    shift_x = rng.integers(0, size[2], counts[:2])
    for z, i in enumerate(np.searchsorted(walls[0], np.arange(SHAPE[0]), side="right")):
        row = np.searchsorted(walls[1], np.arange(SHAPE[1]) + shift_y[i], side="right")
        places = np.arange(SHAPE[2]) + shift_x[i, row][:, None]
        labels[z] = cells[i, row[:, None], np.searchsorted(walls[2], places, side="right")]
    affinities = np.empty((3, *SHAPE), np.uint8)
    mean = rng.integers(20, 255, 2**16, dtype=np.uint8)
    for d in range(3):
        noise = rng.integers(0, 64, SHAPE, dtype=np.uint8)
        before = np.roll(labels, 1, axis=d)
        between = mean[(labels * np.uint32(40503) ^ before * np.uint32(30011)) & np.uint32(65535)]
        between = np.maximum(between, noise) - noise
        affinities[d] = np.where(labels == before, np.uint8(255) - noise, between)
    return labels, affinities


def write_blocks(run_dir: Path, grid: BlockGrid, labels: np.ndarray, affinities: np.ndarray) -> Any:
    """Write fragments and sidecars as predict does; return seconds spent on sidecars."""
    array, seconds = make_array(run_dir, "fragments", grid), 0.0
    for timed in (False, True):
        with JournalWriter(
            run_dir / "journal" / "predict", WorkerInfo("made", "here", 1)
        ) as journal:
            for number in range(grid.n_blocks if timed else 1):
                read = tuple(slice(a, b) for a, b in zip(*grid.read_box(number), strict=True))
                _, own = np.unique(labels[read], return_inverse=True)
                own = (own.reshape(labels[read].shape) + 1).astype(np.uint16)
                block = np.ascontiguousarray(affinities[(slice(None), *read)])
                begun = time.perf_counter()
                data = build_sidecar(own, block, grid, number).to_bytes()
                write_atomic(sidecar_path(run_dir, number), data)
                seconds += (time.perf_counter() - begun) * timed
                ids = grid.fragment_ids(number, own[grid.write_in_read(number)])
                write_chunk(array, grid.index(number), ids)
                journal.finish(BlockRecord(number, "done"))
    return seconds


def by_waterz(folder: Path, send: Any) -> None:
    """Apply the published rule to the whole volume: thresholds by a shift of the affinities."""
    import waterz

    grid = BlockGrid(SHAPE, (30, 6, 6))
    small = np.ones((3, 4, 4, 4), np.float32)
    ids = np.arange(1, 65, dtype=np.uint64).reshape(4, 4, 4)
    options = {"scoring_function": SCORING, "discretize_queue": 0}
    list(waterz.agglomerate(small, [0.5], fragments=ids, **options))  # compiles

    affinities = np.load(folder / "affinities.npy", mmap_mode="r")
    shifted = np.empty(affinities.shape, np.float32)
    for d in range(3):
        np.multiply(affinities[d], np.float32(1 / 510), out=shifted[d])
        step = grid.write_shape[d]
        shifted[d][(slice(None),) * d + (slice(step, None, step),)] += np.float32(0.15)
    fragments = np.load(folder / "dense.npy")
    begun, used = time.perf_counter(), time.process_time()
    segments = next(waterz.agglomerate(shifted, [0.5], fragments=fragments, **options))
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    peak = peak_mib()
    np.save(folder / "waterz.npy", segments)
    send.send((seconds, used, peak))


def by_us(folder: Path, workers: int | None, send: Any) -> None:
    """Stitch; send the report, CPU seconds by step, and peaks of workers and client."""
    grid = BlockGrid(SHAPE, (30, 6, 6))
    with dask_client(DaskSettings(workers=workers)) as client:
        warm_up(client, folder)
        cpu = CpuTime(client)
        report = run_stitch(StitchSpec(run_dir=folder, grid=grid.to_dict()), client, cpu)
        peaks = list(client.run(peak_mib).values())
    send.send((report, cpu.seconds, peaks, peak_mib()))


def _in_process(function: Any, *arguments: Any) -> Any:
    spawn = multiprocessing.get_context("spawn")
    receive, send = spawn.Pipe(duplex=False)
    process = spawn.Process(target=function, args=(*arguments, send))
    process.start()
    send.close()
    found = receive.recv()
    process.join()
    return found


def against_waterz(size: Sequence[int], workers: int | None, folder: Path) -> None:
    """Print time and memory of both, and whether they agree."""
    grid = BlockGrid(SHAPE, (30, 6, 6))
    labels, affinities = made_volume(size)
    sidecars = write_blocks(folder, grid, labels, affinities)
    np.save(folder / "affinities.npy", affinities)
    fragments = np.asarray(open_array(folder / "data.zarr", "fragments", "r")[:])
    ids, dense = np.unique(fragments, return_inverse=True)
    np.save(folder / "dense.npy", dense.reshape(SHAPE).astype(np.uint64) + np.uint64(ids[0] > 0))
    del labels, affinities, fragments, dense
    seconds, waterz_cpu, peak = _in_process(by_waterz, folder)
    report, cpu, peaks, client = _in_process(by_us, folder, workers)
    merging, steps = STEPS[:-1], STEPS

    ours = np.asarray(open_array(folder / "data.zarr", "segmentation/s0", "r")[:])
    theirs = np.load(folder / "waterz.npy")
    # Neither has ids of more than 32 bits.
    pairs = np.unique((ours << np.uint64(32)) | theirs)
    counts = [
        len(np.unique(side)) for side in (pairs >> np.uint64(32), pairs & np.uint64(2**32 - 1))
    ]
    same = counts == [len(pairs)] * 2
    print(f"{'x'.join(map(str, SHAPE))}: {report.fragments} fragments, {report.contacts} contacts")
    print(
        f"segments: {report.segments} ours, {counts[1]} waterz;"
        f" same partition: {'yes' if same else 'NO'}"
    )
    rows = {"waterz.agglomerate (arrays in memory)": (seconds, waterz_cpu, peak)}
    for name, parts, extra in (
        (f"ours: contacts to id map, {len(peaks)} workers", merging, 0.0),
        ("ours: and relabelling on disk", steps, 0.0),
        ("ours: and sidecars built (one core)", steps, sidecars),
    ):
        own = sum(report.seconds[part] for part in parts) + extra
        rows[name] = own, sum(cpu[part] for part in parts) + extra, max(peaks)
    print(f"{'':>40} {'s':>7} {'faster':>7} {'CPU s':>7} {'less':>6} {'MiB':>7} {'less':>6}")
    for name, (own, used, mib) in rows.items():
        print(
            f"{name:>40} {own:7.2f} {seconds / own:7.1f} {used:7.2f} {waterz_cpu / used:6.1f}"
            f" {mib:7.0f} {peak / mib:6.1f}"
        )
    print(f"all our workers together {sum(peaks):.0f} MiB, client {client:.0f} MiB")
