"""Agglomeration of made-up contact graphs, without voxels (see tables.py)."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from memory import peak_mib

from agq.blockwise.blocks.grid import LOCAL_BITS, BlockGrid
from agq.blockwise.stitch.contacts import (
    PARTS,
    ContactTable,
    Evidence,
    NodeTable,
    load_contacts,
)
from agq.blockwise.stitch.merge.agglomeration import Merge, scores
from agq.blockwise.stitch.merge.kernel import connected_components
from agq.blockwise.stitch.settings import Thresholds
from agq.blockwise.stitch.superblocks import Families, StitchFiles, SuperblockTree
from agq.blockwise.storage.arrays import load_arrays

FRAGMENTS = 100
"""In a block."""

BLOCK = (16, 256, 256)


def block_contacts(
    number: int, grid: BlockGrid, weak: int
) -> tuple[np.ndarray, list[ContactTable]]:
    """Fragments of a made-up block, contacts inside it, and those across its three upper faces.

    Each fragment is a piece of a neurite along one axis (half of them z) that goes on into the next
    block with probability 0.9; one in 50 goes on along all axes. Fragments touch others there and
    in their own block, as neighbours that should stay apart: about 6 edges a fragment. The mean
    affinity of those is up to ``weak`` (1/510; a contact speaks for a merge above 357).
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
        rest = table(ContactTable.across, base + own, there + other, 0, weak)
        fresh = ~np.isin(rest.v - np.uint64(there), on) | (
            rest.u + np.uint64(there - base) != rest.v
        )
        tables.append(ContactTable.concatenate([same, rest.take(fresh)]))
    return (base + own).astype(np.uint64), tables


def generate(run_dir: Path, grid: BlockGrid, weak: int, leaves: Families) -> int:
    """Write the evidence of made-up leaves; return the number of edges."""
    run_dir.mkdir(parents=True, exist_ok=True)
    files, edges = StitchFiles(run_dir), 0
    for leaf, numbers in leaves:
        ids, inner = [], []
        faces: list[list[ContactTable]] = [[], [], []]
        members = set(numbers.tolist())
        for number in sorted(members):
            own, tables = block_contacts(number, grid, weak)
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
        files.save(files.evidence(leaf), evidence.arrays(overlap=False))
    return edges


def describe(run_dir: Path, grid: BlockGrid, leaves: Families) -> None:
    """Print how the positive edges hang together: what a union of all of them would merge."""
    files, ends, edges = StitchFiles(run_dir), [], 0
    for leaf in leaves.places():
        for part in PARTS:
            contacts = load_contacts(files.evidence(leaf), part)
            numerator, _ = scores(contacts, Thresholds())
            edges += len(contacts)
            pairs = np.stack((contacts.u, contacts.v), axis=1)[numerator > 0]
            local = pairs & np.uint64(2**LOCAL_BITS - 1)
            dense = (pairs >> np.uint64(LOCAL_BITS)) * np.uint64(FRAGMENTS) + local - np.uint64(1)
            ends.append(dense.astype(np.int32))
    every = np.concatenate(ends)
    n = grid.n_blocks * FRAGMENTS
    sizes = np.bincount(connected_components(n, every[:, 0], every[:, 1]), minlength=n)
    sizes = np.sort(sizes[sizes > 0])[::-1]
    print(
        f"{edges} edges, {n} fragments, {len(every) / edges:.0%} of edges positive; positive edges"
        f" alone: {len(sizes)} components, the largest holds {sizes[0] / n:.0%} of the fragments,"
        f" the next {sizes[1] if len(sizes) > 1 else 0} fragments"
    )


def graph(folder: Path, grid: BlockGrid, levels: Sequence[Families]) -> None:
    """Agglomerate a made-up graph in this process; print one row a level."""
    thresholds, files = Thresholds(), StitchFiles(folder)
    print(
        f"{'level':>6} {'superblocks':>12} {'s':>8} {'CPU s':>8} {'edges up':>11} {'nodes up':>11}"
    )
    wall, cpu = time.perf_counter(), time.process_time()
    merges = 0
    for i, level in enumerate(levels):
        begun, used = time.perf_counter(), time.process_time()
        Merge(level, folder, thresholds).run()
        begun, used = time.perf_counter() - begun, time.process_time() - used
        up = nodes = 0
        for superblock in level.places():
            up += len(load_arrays(files.graph(superblock), "edges.ends")["edges.ends"])
            found = load_arrays(files.merges(superblock), "up", "merges.u")
            nodes, merges = nodes + len(found["up"]), merges + len(found["merges.u"])
        print(f"{i:>6} {len(level):>12} {begun:8.1f} {used:8.1f} {up:>11} {nodes:>11}", flush=True)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(
        f"{'all':>6} {'':>12} {wall:8.1f} {cpu:8.1f}  {merges} merges,"
        f" peak RSS {peak_mib() / 1024:.2f} GiB",
        flush=True,
    )


def graphs(sizes: Sequence[int], weak: int, folder: Path | None, leaf_shape: Sequence[int]) -> None:
    """Each size in a process of its own, so that the peaks are theirs."""
    spawn = multiprocessing.get_context("spawn")
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            here = Path(made)
            side = max(2, round((size / 6 / FRAGMENTS) ** (1 / 3)))
            grid = BlockGrid((side * 16, side * 256, side * 256), (30, 6, 6), BLOCK)
            z, y, x = leaf_shape
            tree = SuperblockTree(grid.shape, (z, y, x))
            leaves = tree.leaves(np.arange(grid.n_blocks))
            with spawn.Pool(len(os.sched_getaffinity(0))) as pool:
                parts = [(here, grid, weak, leaves[i : i + 1]) for i in range(len(leaves))]
                pool.starmap(generate, parts, chunksize=1)
            for function, arguments in (
                (describe, leaves),
                (graph, [leaves, *tree.levels(leaves)]),
            ):
                process = spawn.Process(target=function, args=(here, grid, arguments))
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(process.exitcode)
