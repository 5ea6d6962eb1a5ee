"""Print how long the stitch takes, as tables: generated graphs, sidecars, and a small volume.

``python -m benchmarks.stitch`` or ``python benchmarks/stitch.py [--edges 1e6] [--blocks 4 4 4]``.
The volume is made of uint64 fragments in blocks of 16 x 256 x 256; the yardstick is a plain zarr
copy of the same fragments with the same codec and workers (no sync, no journal).
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import zoom

from blockwise.agglomerate import Thresholds, agglomerate
from blockwise.arrays import create_array, open_array, write_chunk
from blockwise.contacts import ContactTable, merge_contacts
from blockwise.files import write_atomic
from blockwise.grid import BlockGrid
from blockwise.journal import BlockRecord, JournalWriter, WorkerInfo
from blockwise.sidecar import Sidecar, build_sidecar, sidecar_path
from blockwise.stitch import StitchSpec, local_client, run_stitch

BLOCK = (16, 256, 256)


def graph(edges: int, seed: int = 0) -> tuple[np.ndarray, ContactTable]:
    """Six edges per node, most between near ids; four in ten across a border."""
    rng = np.random.default_rng(seed)
    nodes = max(edges // 6, 100)
    u = rng.integers(0, nodes, edges)
    near, far = rng.integers(1, 30, edges), rng.integers(1, nodes // 3, edges)
    v = u + np.where(rng.random(edges) < 0.9, near, far)
    inside = v < nodes
    u, v = u[inside] + 1, v[inside] + 1
    count = rng.integers(1, 200, len(u))
    across = rng.random(len(u)) < 0.4
    total = rng.integers(250, 511, len(u)) * count
    table = ContactTable(
        u.astype(np.uint64),
        v.astype(np.uint64),
        total * across,
        count * across,
        total * ~across,
        count * ~across,
    )
    return np.arange(1, nodes + 1, dtype=np.uint64), merge_contacts([table])


def graphs(sizes: Sequence[int]) -> None:
    agglomerate(*graph(1000), Thresholds())
    print(f"{'edges':>12} {'merges':>10} {'segments':>10} {'s':>8} {'Medges/s':>9}")
    for size in sizes:
        ids, table = graph(size)
        begun = time.perf_counter()
        result = agglomerate(ids, table, Thresholds())
        seconds = time.perf_counter() - begun
        segments = len(ids) - len(result.merges)
        print(
            f"{len(table):12d} {len(result.merges):10d} {segments:10d} {seconds:8.2f}"
            f" {len(table) / seconds / 1e6:9.2f}"
        )


def block_arrays(number: int) -> tuple[np.ndarray, np.ndarray]:
    """About 90 objects in a read window, affinities high inside them and noisy."""
    rng = np.random.default_rng(number)
    shape = tuple(n + 1 for n in BLOCK)
    coarse = rng.integers(0, 100, (3, 8, 8)).astype(np.uint16)
    labels = zoom(coarse, [n / c for n, c in zip(shape, coarse.shape, strict=True)], order=0)
    noise = rng.integers(0, 60, (3, *shape), dtype=np.uint8)
    return labels, np.uint8(255) - noise


def sidecars() -> None:
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
        Sidecar.from_bytes(data)
        times.append((built - begun, packed - built, time.perf_counter() - packed))
    build, pack, read = (1000 * min(column) for column in zip(*times, strict=True))
    print(
        f"sidecar of a block: build {build:.1f} ms, pack {pack:.1f} ms, read {read:.1f} ms,", end=""
    )
    print(f" {len(data) / 1024:.0f} KiB")


def prepare(run_dir: Path, grid: BlockGrid) -> None:
    array = create_array(
        run_dir / "data.zarr",
        "fragments",
        shape=grid.volume_shape,
        chunks=grid.write_shape,
        dtype=np.uint64,
        voxel_size=grid.voxel_size,
    )
    with JournalWriter(run_dir / "journal" / "predict", WorkerInfo("made", "here", 1)) as journal:
        for number in range(grid.n_blocks):
            labels, affinities = block_arrays(number % 7)
            start, stop = grid.read_box(number)
            read = tuple(slice(0, b - a) for a, b in zip(start, stop, strict=True))
            labels, affinities = labels[read], affinities[(slice(None), *read)]
            sidecar = build_sidecar(labels, affinities, grid, number)
            ids = grid.fragment_ids(number, labels[grid.write_in_read(number)])
            write_chunk(array, grid.index(number), ids)
            write_atomic(sidecar_path(run_dir, number), sidecar.to_bytes())
            journal.finish(BlockRecord(number, "done"))


def copy_batch(container: str, grid: dict[str, Any], numbers: Sequence[int]) -> None:
    blocks = BlockGrid.from_dict(grid)
    source, target = open_array(container, "fragments", "r"), open_array(container, "copy")
    for number in numbers:
        start, stop = blocks.write_box(number)
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        target[box] = source[box]


def volume(blocks: Sequence[int], workers: int | None, folder: Path) -> None:
    z, y, x = (n * b for n, b in zip(blocks, BLOCK, strict=True))
    grid = BlockGrid((z, y, x), (30, 6, 6), BLOCK)
    prepare(folder, grid)
    create_array(
        folder / "data.zarr",
        "copy",
        shape=grid.volume_shape,
        chunks=grid.write_shape,
        dtype=np.uint64,
        voxel_size=grid.voxel_size,
    )
    with local_client(workers=workers) as client:
        cores = len(client.ncores())
        # Workers import and load compiled code once; a run of hours does not feel that.
        warm = folder / "warm"
        small = BlockGrid(BLOCK, (30, 6, 6), BLOCK)
        prepare(warm, small)
        run_stitch(StitchSpec(run_dir=warm, grid=small.to_dict()), client)
        batches = np.array_split(np.arange(grid.n_blocks), 4 * cores)
        begun = time.perf_counter()
        client.gather(
            [
                client.submit(copy_batch, str(folder / "data.zarr"), grid.to_dict(), b.tolist())
                for b in batches
            ]
        )
        copied = time.perf_counter() - begun
        report = run_stitch(StitchSpec(run_dir=folder, grid=grid.to_dict()), client)
    voxels = z * y * x / 1e6
    print(
        f"{voxels:.0f} Mvoxel, {grid.n_blocks} blocks, {report.fragments} fragments,"
        f" {report.contacts} contacts, {report.segments} segments, {cores} workers"
    )
    print(f"{'step':>12} {'s':>8} {'Mvoxel/s':>9} {'of copy':>8}")
    stitch = sum(report.seconds[name] for name in ("contacts", "agglomerate", "lut", "relabel"))
    for name, seconds in {"plain copy": copied, **report.seconds, "stitch": stitch}.items():
        print(f"{name:>12} {seconds:8.2f} {voxels / seconds:9.1f} {seconds / copied:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edges", type=float, nargs="*", default=[1e5, 1e6])
    parser.add_argument("--blocks", type=int, nargs=3, default=[4, 4, 4])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--folder", type=Path, help="where the volume goes (default: temporary)")
    arguments = parser.parse_args()
    graphs([int(n) for n in arguments.edges])
    sidecars()
    folder = Path(tempfile.mkdtemp(prefix="stitch-bench-", dir=arguments.folder))
    try:
        volume(arguments.blocks, arguments.workers, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
