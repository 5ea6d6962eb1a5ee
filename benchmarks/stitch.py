"""Print how long the stitch takes, as tables: generated graphs, sidecars, and a small volume.

``python -m benchmarks.stitch`` or ``python benchmarks/stitch.py [--edges 1e6] [--blocks 4 4 4]``.
Graphs are made without voxels and agglomerated on one core, superblock by superblock, files
included. The volume is made of uint64 fragments in blocks of 16 x 256 x 256; the yardstick is a
plain zarr copy of the same fragments with the same codec and workers (no sync, no journal).
"""

import argparse
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import zoom

from blockwise.agglomerate import Thresholds
from blockwise.agglomerate_tree import SuperblockTree
from blockwise.array_files import load_arrays
from blockwise.arrays import create_array, open_array, write_chunk
from blockwise.contacts import ContactTable, Evidence, NodeTable
from blockwise.files import write_atomic
from blockwise.grid import LOCAL_BITS, BlockGrid
from blockwise.journal import BlockRecord, JournalWriter, WorkerInfo
from blockwise.sidecar import SidecarFile, build_sidecar, sidecar_path
from blockwise.stitch import StitchSpec, local_client, run_stitch
from blockwise.stitch_files import StitchFiles
from blockwise.stitch_tasks import contract_superblocks, save_evidence

FRAGMENTS = 100
"""In a block of a made-up graph."""

BLOCK = (16, 256, 256)


def block_contacts(number: int, grid: BlockGrid) -> tuple[np.ndarray, list[ContactTable]]:
    """Fragments of a made-up block, contacts inside it, and those across its three upper faces.

    Each fragment is a piece of a neurite along one axis (half of them z) that goes on into the next
    block with probability 0.9; one in 50 goes on along all axes. Fragments touch others there and
    in their own block, as neighbours that should stay apart: about 6 edges a fragment.
    """
    rng = np.random.default_rng(number)
    base = number << LOCAL_BITS
    own = np.arange(1, FRAGMENTS + 1)

    def table(kind: Any, u: np.ndarray, v: np.ndarray, low: int, high: int) -> ContactTable:
        pairs = np.unique(np.stack((u, v)), axis=1)
        count = rng.integers(1, 200, pairs.shape[1])
        total = rng.integers(low, high, len(count)) * count
        return kind(pairs[0].astype(np.uint64), pairs[1].astype(np.uint64), total, count)

    along = rng.choice(3, FRAGMENTS, p=[0.5, 0.25, 0.25])
    large = rng.random(FRAGMENTS) < 0.02
    step = rng.integers(1, 12, (3, FRAGMENTS))
    u, v = np.tile(own, 3), (own + step).ravel()
    tables = [
        table(ContactTable.within, base + u[v <= FRAGMENTS], base + v[v <= FRAGMENTS], 0, 400)
    ]
    for axis in range(3):
        above = grid.neighbor(number, axis)
        if above is None:
            tables.append(ContactTable.empty())
            continue
        there = above << LOCAL_BITS
        on = own[((along == axis) | large) & (rng.random(FRAGMENTS) < 0.9)]
        other = np.clip(own + rng.integers(-5, 6, FRAGMENTS), 1, FRAGMENTS)
        same = table(ContactTable.across, base + on, there + on, 360, 511)
        rest = table(ContactTable.across, base + own, there + other, 0, 370)
        fresh = ~np.isin(rest.v - np.uint64(there), on) | (
            rest.u + np.uint64(there - base) != rest.v
        )
        rows = [getattr(rest, field.name)[fresh] for field in fields(ContactTable)]
        tables.append(ContactTable.concatenate([same, ContactTable(*rows)]))
    return (base + own).astype(np.uint64), tables


def generate(run_dir: Path, grid: BlockGrid, leaves: Sequence[Any], tree: SuperblockTree) -> int:
    """Write the evidence of made-up leaves; return the number of edges."""
    files, edges = StitchFiles(run_dir), 0
    for leaf, numbers in leaves:
        ids, inner = [], []
        faces: list[list[ContactTable]] = [[], [], []]
        members = set(numbers)
        for number in numbers:
            own, tables = block_contacts(number, grid)
            ids.append(own)
            inner.append(tables[0])
            for axis in range(3):
                inside = grid.neighbor(number, axis) in members
                (inner if inside else faces[axis]).append(tables[1 + axis])
        nodes = np.concatenate(ids)
        table = NodeTable(nodes, np.ones(len(nodes), np.int64), np.zeros((len(nodes), 6), np.int64))
        z, y, x = (ContactTable.concatenate(face) for face in faces)
        evidence = Evidence(table, ContactTable.concatenate(inner), (z, y, x))
        edges += len(evidence.contacts) + len(z) + len(y) + len(x)
        save_evidence(files.evidence(leaf), evidence, False)
    return edges


def graph(target: int, folder: Path, leaf_shape: Sequence[int]) -> None:
    """Agglomerate a made-up graph of about this many edges; print one row a level."""
    side = max(2, round((target / 6 / FRAGMENTS) ** (1 / 3)))
    grid = BlockGrid((side * 16, side * 256, side * 256), (30, 6, 6), BLOCK)
    tree = SuperblockTree(grid.shape, tuple(leaf_shape))
    leaves = [(leaf, n.tolist()) for leaf, n in tree.leaves(np.arange(grid.n_blocks))]
    edges = generate(folder, grid, leaves, tree)
    levels = [leaves, *(list(lv.items()) for lv in tree.levels([leaf for leaf, _ in leaves]))]
    thresholds, files = Thresholds(), StitchFiles(folder)
    print(f"{edges} edges, {grid.n_blocks * FRAGMENTS} fragments, leaves of {leaf_shape} blocks")
    print(f"{'level':>12} {'superblocks':>12} {'s':>8} {'CPU s':>8} {'handed up':>12}")
    wall, cpu = time.perf_counter(), time.process_time()
    for i, level in enumerate(levels):
        begun, used = time.perf_counter(), time.process_time()
        contract_superblocks(str(folder), thresholds, level)
        begun, used = time.perf_counter() - begun, time.process_time() - used
        up = sum(len(load_arrays(files.graph(s), "edges.u")["edges.u"]) for s, _ in level)
        print(f"{i:>12} {len(level):>12} {begun:8.1f} {used:8.1f} {up:>12}")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{'all':>12} {'':>12} {wall:8.1f} {cpu:8.1f}   peak RSS {peak:.2f} GiB", flush=True)


def graphs(sizes: Sequence[int], folder: Path, leaf_shape: Sequence[int]) -> None:
    """Each size in a process of its own, so that the peaks are theirs."""
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            here = Path(made)
            graph(1, here / "warm", (2, 2, 2))
            process = multiprocessing.get_context("spawn").Process(
                target=graph, args=(size, here / "graph", leaf_shape)
            )
            process.start()
            process.join()


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
        file = SidecarFile(data)
        for frame in (
            "tables",
            *(f"{side}_{axis}" for side in ("low", "high") for axis in range(3)),
        ):
            file.frame(frame)
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
    parser.add_argument("--edges", type=float, nargs="*", default=[1e6])
    parser.add_argument("--leaf", type=int, nargs=3, default=[8, 8, 8], help="blocks of a leaf")
    parser.add_argument("--blocks", type=int, nargs=3, default=[4, 4, 4])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--folder", type=Path, help="where the volume goes (default: temporary)")
    arguments = parser.parse_args()
    graphs([int(n) for n in arguments.edges], arguments.folder, arguments.leaf)
    sidecars()
    if not all(arguments.blocks):
        return
    folder = Path(tempfile.mkdtemp(prefix="stitch-bench-", dir=arguments.folder))
    try:
        volume(arguments.blocks, arguments.workers, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
