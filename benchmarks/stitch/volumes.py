"""Stitch of made-up volumes against a plain copy, and its memory (see tables.py)."""

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client
from memory import peak_mib
from scipy.ndimage import zoom

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.packs import sidecar_path
from agq.blockwise.blocks.sidecar import Sidecar, SidecarFile, build_sidecar
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.run import StitchSpec, run_stitch
from agq.blockwise.stitch.settings import DaskSettings
from agq.blockwise.storage.files import write_atomic
from agq.blockwise.storage.shards import ChunkFiles
from agq.blockwise.volumes.create import create_array, open_array, write_chunk

BLOCK = (16, 256, 256)
PATTERNS = 7
"""Different blocks; a volume repeats them."""

STEPS = ("contacts", "agglomerate", "lut", "relabel")
"""The stitch without its pyramid."""


@cache
def block_arrays(pattern: int) -> tuple[np.ndarray, np.ndarray]:
    """About 90 objects in a read window, affinities high inside them and noisy."""
    rng = np.random.default_rng(pattern)
    shape = tuple(n + 1 for n in BLOCK)
    coarse = rng.integers(0, 100, (3, 8, 8)).astype(np.uint16)
    labels = zoom(coarse, [n / c for n, c in zip(shape, coarse.shape, strict=True)], order=0)
    noise = rng.integers(0, 60, (3, *shape), dtype=np.uint8)
    return labels, np.uint8(255) - noise


def print_sidecar() -> None:
    """Print what the sidecar of a block costs."""
    grid = BlockGrid(BLOCK, (30, 6, 6), BLOCK)
    labels, affinities = block_arrays(0)
    labels, affinities = labels[:16, :256, :256], affinities[:, :16, :256, :256]
    build_sidecar(labels, affinities, grid, 0)
    times, data = [], b""
    for _ in range(5):
        begun = time.perf_counter()
        sidecar = build_sidecar(labels, affinities, grid, 0)
        built = time.perf_counter()
        data = sidecar.to_bytes()
        packed = time.perf_counter()
        file = SidecarFile(data)
        for frame in (
            "tables",
            *(f"{side}_{axis}" for side in ("low", "high") for axis in range(3)),
        ):
            file.frame(frame)
        times.append((built - begun, packed - built, time.perf_counter() - packed))
    build, pack, read = (1000 * min(column) for column in zip(*times, strict=True))
    print(
        f"sidecar of a block: build {build:.1f} ms, pack {pack:.1f} ms, read {read:.1f} ms,"
        f" {len(data) / 1024:.0f} KiB"
    )


def make_array(run_dir: Path, name: str, grid: BlockGrid) -> Any:
    """Create an array of labels in chunks of blocks."""
    return create_array(
        run_dir / "data.zarr",
        name,
        shape=grid.volume_shape,
        chunks=grid.write_shape,
        dtype=np.uint64,
        voxel_size=grid.voxel_size,
    )


def made_grid(blocks: Sequence[int]) -> BlockGrid:
    """Return a grid of so many whole blocks, (z, y, x)."""
    z, y, x = (n * b for n, b in zip(blocks, BLOCK, strict=True))
    return BlockGrid((z, y, x), (30, 6, 6), BLOCK)


def prepare(run_dir: Path, grid: BlockGrid) -> None:
    """Write fragments, sidecars and journal as predict leaves them."""
    array = make_array(run_dir, "fragments", grid)
    known: dict[Any, Sidecar] = {}
    with JournalWriter(run_dir / "journal" / "predict", WorkerInfo("made", "here", 1)) as journal:
        for number in range(grid.n_blocks):
            labels, affinities = block_arrays(number % PATTERNS)
            start, stop = grid.read_box(number)
            inner = grid.write_in_read(number)
            kind = (number % PATTERNS, *inner, *(b - a for a, b in zip(start, stop, strict=True)))
            labels = labels[tuple(slice(0, b - a) for a, b in zip(start, stop, strict=True))]
            key = str(kind)
            if key not in known:
                read = tuple(slice(0, n) for n in labels.shape)
                known[key] = build_sidecar(labels, affinities[(slice(None), *read)], grid, number)
            write_chunk(array, grid.index(number), grid.fragment_ids(number, labels[inner]))
            sidecar = replace(known[key], number=number)
            write_atomic(sidecar_path(run_dir, number), sidecar.to_bytes())
            journal.finish(BlockRecord(number, "done"))


def copy_batch(container: str, grid: dict[str, Any], numbers: Sequence[int]) -> None:
    """Copy blocks as a user of zarr would."""
    blocks = BlockGrid.from_dict(grid)
    source, target = open_array(container, "fragments", "r"), open_array(container, "copy")
    for number in numbers:
        start, stop = blocks.write_box(number)
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        target[box] = source[box]


def plain_copy(client: Client, folder: Path, grid: BlockGrid) -> float:
    """Copy the fragments on all workers; return the seconds."""
    make_array(folder, "copy", grid)
    numbers = np.array_split(np.arange(grid.n_blocks), 4 * len(client.ncores()))
    begun = time.perf_counter()
    container = str(folder / "data.zarr")
    client.gather(
        [client.submit(copy_batch, container, grid.to_dict(), part.tolist()) for part in numbers]
    )
    return time.perf_counter() - begun


def warm_up(client: Client, folder: Path) -> None:
    """Let every worker import and load compiled code; a run of hours does not feel that."""
    small = made_grid((2, 2, 2))
    for i in range(len(client.ncores())):
        run_dir = folder / f"warm{i}"
        prepare(run_dir, small)
        spec = StitchSpec(run_dir=run_dir, grid=small.to_dict(), superblock=(1, 1, 1))
        run_stitch(spec, client)
        plain_copy(client, run_dir, small)


class CpuTime:
    """CPU seconds of workers, scheduler and client by step of a stitch."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.seconds: dict[str, float] = {}
        self._step, self._begun = "", self.now()

    def now(self) -> float:
        """Return the CPU seconds so far."""
        return sum(self._client.run(time.process_time).values()) + time.process_time()

    def __call__(self, step: str, _done: int = 0, _total: int = 0) -> None:
        """Note that a step goes on, the progress callback of a stitch."""
        name = step.split()[0] if step else ""
        if name != self._step:
            now = self.now()
            self.seconds[self._step] = self.seconds.get(self._step, 0.0) + now - self._begun
            self._step, self._begun = name, now


def parts(folder: Path, grid: BlockGrid) -> dict[str, float]:
    """Return the CPU seconds of what cannot be left out, for all blocks, on one core."""
    source = ChunkFiles(open_array(folder / "data.zarr", "fragments", "r"))
    target = ChunkFiles(open_array(folder / "data.zarr", "segmentation/s0"))
    raw, seconds = np.empty(source.chunks, np.uint64), {"read": 0.0, "encode": 0.0, "write": 0.0}
    scratch = folder / "scratch"
    numbers = range(0, grid.n_blocks, max(1, grid.n_blocks // 50))
    for number in numbers:
        marks = [time.process_time()]
        labels = source.read(grid.index(number), raw)
        marks.append(time.process_time())
        data = target.encode(labels)
        marks.append(time.process_time())
        scratch.write_bytes(data)
        marks.append(time.process_time())
        for name, begun, ended in zip(seconds, marks, marks[1:], strict=False):
            seconds[name] += ended - begun
    scratch.unlink()
    return {name: spent * grid.n_blocks / len(numbers) for name, spent in seconds.items()}


def count_files(folder: Path) -> int:
    """Return the files of a run."""
    made = ("data.zarr", "sidecars", "contacts", "agglomeration", "lut", "journal", "stitch")
    return sum(p.is_file() for name in made for p in (folder / name).rglob("*"))


def volume(blocks: Sequence[int], workers: int | None, folder: Path) -> None:
    """Print the time of each step of a stitch, and of plain copies before and after it."""
    grid = made_grid(blocks)
    prepare(folder, grid)
    with dask_client(DaskSettings(workers=workers)) as client:
        warm_up(client, folder)
        cpu = CpuTime(client)
        cpu("copy")
        copied = [plain_copy(client, folder, grid)]
        spec = StitchSpec(run_dir=folder, grid=grid.to_dict(), levels=1)
        report = run_stitch(spec, client, cpu)
        wall, alone = dict(report.seconds), dict(cpu.seconds)
        for gone in ("data.zarr/segmentation", "data.zarr/copy"):
            shutil.rmtree(folder / gone)
        cpu("copy")
        copied.append(plain_copy(client, folder, grid))
        report = run_stitch(spec.model_copy(update={"levels": None}), client, cpu)
        cpu("")
        shutil.rmtree(folder / "data.zarr" / "copy")
        cores, files = len(client.ncores()), count_files(folder)
    voxels = int(np.prod(grid.volume_shape)) / 1e6
    print(
        f"{voxels:.0f} Mvoxel, {grid.n_blocks} blocks, {report.fragments} fragments,"
        f" {report.contacts} contacts, {report.segments} segments, {cores} workers;"
        f" copies took {copied[0]:.2f} and {copied[1]:.2f} s"
    )
    used = {name: alone[name] for name in STEPS}
    used["plain copy"] = cpu.seconds["copy"] / 2
    used["stitch"] = sum(alone[name] for name in STEPS)
    used["relabel+"] = sum(cpu.seconds.get(n, 0.0) for n in ("relabel", "pyramid"))
    used["relabel+"] -= alone["relabel"] + alone.get("pyramid", 0.0)
    used["with pyramid"] = used["stitch"] - used["relabel"] + used["relabel+"]
    wall["relabel+"] = report.seconds["relabel"] + report.seconds["pyramid"]
    wall |= {"plain copy": sum(copied) / 2, "stitch": sum(wall[name] for name in STEPS)}
    wall["with pyramid"] = wall["stitch"] - wall["relabel"] + wall["relabel+"]
    print(f"{'step':>12} {'s':>8} {'Mvoxel/s':>9} {'of copy':>8} {'CPU s':>8} {'of copy':>8}")
    for name, spent in used.items():
        seconds = wall[name]
        print(
            f"{name:>12} {seconds:8.2f} {voxels / seconds:9.1f} {seconds / wall['plain copy']:8.2f}"
            f" {spent:8.2f} {spent / used['plain copy']:8.2f}"
        )
    shares = parts(folder, grid)
    shares["labels, Python"] = used["relabel"] - sum(shares.values())
    told = ", ".join(f"{name} {v / used['relabel']:.0%}" for name, v in shares.items())
    print(f"of relabel: {told}")
    print(f"{files} files, {files / grid.n_blocks:.2f} a block")


SUPERBLOCK = (4, 4, 4)
"""Where memory is measured: the same for all sizes, since a worker holds one superblock."""


def _measure(blocks: Sequence[int], workers: int | None, folder: Path, send: Any) -> None:
    grid = made_grid(blocks)
    with dask_client(DaskSettings(workers=workers)) as client:
        spec = StitchSpec(run_dir=folder, grid=grid.to_dict(), superblock=SUPERBLOCK)
        report = run_stitch(spec, client)
        peaks = client.run(peak_mib)
    send.send((max(peaks.values()), peak_mib(), report.seconds, report.fragments))


def memory(sizes: Sequence[Sequence[int]], workers: int | None, parent: Path | None) -> None:
    """Print the peak memory of workers and client for volumes of several sizes."""
    spawn = multiprocessing.get_context("spawn")
    print(
        f"{'Mvoxel':>8} {'fragments':>10} {'stitch s':>9} {'pyramid s':>10} {'worker MiB':>11}"
        f" {'client MiB':>11}"
    )
    for blocks in sizes:
        with tempfile.TemporaryDirectory(dir=parent) as made:
            folder = Path(made)
            grid = made_grid(blocks)
            prepare(folder, grid)
            receive, send = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_measure, args=(blocks, workers, folder, send))
            process.start()
            send.close()
            worker, client, seconds, fragments = receive.recv()
            process.join()
        voxels = int(np.prod(grid.volume_shape)) / 1e6
        print(
            f"{voxels:8.0f} {fragments:10} {sum(seconds[name] for name in STEPS):9.1f}"
            f" {seconds['pyramid']:10.1f} {worker:11.0f} {client:11.0f}",
            flush=True,
        )
