"""A small run as predict leaves it: fragments, sidecars, journal; and the same as whole arrays."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import cc3d
import numpy as np
from scipy.ndimage import zoom

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.packs import sidecar_path
from agq.blockwise.blocks.sidecar import Sidecar, build_sidecar
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.stitch.run import StitchSpec
from agq.blockwise.storage.files import checksum, write_atomic
from agq.blockwise.volumes.create import create_array, write_chunk

GRID = BlockGrid(
    volume_shape=(11, 33, 26),
    voxel_size=(30, 6, 6),
    write_shape=(4, 12, 10),
    after=(1, 1, 1),
    offset=(60, 12, 18),
)
"""3 x 3 x 3 blocks, none of the axes a multiple of the block."""


@dataclass
class Run:
    """Blocks of a made-up run and what they come to as whole arrays.

    ``half_units`` and ``border`` follow the module text of `evidence.contacts`, written down here
    once more, voxel by voxel of the whole volume.
    """

    grid: BlockGrid
    sidecars: dict[int, Sidecar]
    fragments: np.ndarray
    half_units: np.ndarray
    border: np.ndarray
    truth: np.ndarray

    def spec(self, run_dir: Path, **options) -> StitchSpec:
        return StitchSpec(run_dir=run_dir, grid=self.grid.to_dict(), **options)


def make_truth(shape, seed: int, cell: int = 5) -> np.ndarray:
    """Smooth objects of a few voxels, with some background."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 40, [max(2, -(-n // cell) + 1) for n in shape])
    factors = [n / c for n, c in zip(shape, coarse.shape, strict=True)]
    return zoom(coarse, factors, order=0).astype(np.uint32)


def make_run(
    grid: BlockGrid,
    seed: int = 0,
    *,
    absent: Collection[int] = (),
    truth: np.ndarray | None = None,
    noise: float = 0.15,
    scrambled: int = 0,
) -> Run:
    """Segment each block on its own: pieces of the truth, noisy affinities of its own.

    With `scrambled` labels, voxels of a block have one of so many by chance instead, so that blocks
    do not agree where both predicted.
    """
    if truth is None:
        truth = make_truth(grid.volume_shape, seed)
    shape = grid.volume_shape
    fragments = np.zeros(shape, np.uint64)
    sums = np.zeros((3, *shape), np.uint16)
    border = np.zeros((3, *shape), bool)
    same = np.stack([np.diff(truth.astype(int), axis=d, prepend=-1) == 0 for d in range(3)])
    sidecars, affinities = {}, {}
    for number in range(grid.n_blocks):
        if number in absent:
            continue
        read = box(*grid.read_box(number))
        inside = grid.write_in_read(number)
        rng = np.random.default_rng([seed, number])
        labels = cc3d.connected_components(truth[read], connectivity=6)
        labels = labels.astype(np.uint16 if labels.max() < 2**16 else np.uint32)
        if scrambled:
            labels = np.random.default_rng(number).integers(0, scrambled, labels.shape, np.uint16)
        own = np.where(same[(slice(None), *read)], 1.0, 0.3)
        own -= noise * rng.random(own.shape)
        affinities[number] = np.round(255 * own).astype(np.uint8)
        sidecars[number] = build_sidecar(labels, affinities[number], grid, number)
        write = box(*grid.write_box(number))
        fragments[write] = grid.fragment_ids(number, labels[inside])
        sums[(slice(None), *write)] = 2 * affinities[number][(slice(None), *inside)].astype(int)
    for number in sidecars:
        for axis in range(3):
            upper = grid.neighbor(number, axis)
            if upper is None or upper not in sidecars:
                continue
            start, stop = (list(corner) for corner in grid.write_box(upper))
            stop[axis] = start[axis] + 1
            plane = box(start, stop)
            border[axis][plane] = True
            low, high = grid.read_box(number)
            if high[axis] > start[axis]:
                here = tuple(slice(a - z, b - z) for a, b, z in zip(start, stop, low, strict=True))
                there = affinities[number][axis][here].astype(np.uint16)
                sums[axis][plane] = sums[axis][plane] // 2 + there
    return Run(grid, sidecars, fragments, sums, border, truth)


def box(start, stop) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(start, stop, strict=True))


def write_run(run: Run, run_dir: Path, *, states: dict[int, str | None] | None = None) -> None:
    """Write the run as predict does; `states` overrides a block's journal line (None: no line).

    Blocks without a sidecar are skipped ones.
    """
    grid = run.grid
    array = create_array(
        run_dir / "data.zarr",
        "fragments",
        shape=grid.volume_shape,
        chunks=grid.write_shape,
        dtype=np.uint64,
        voxel_size=grid.voxel_size,
        offset=grid.offset,
    )
    worker = WorkerInfo(name="predict-0", host="localhost", pid=1)
    with JournalWriter(run_dir / "journal" / "predict", worker) as journal:
        for number in range(grid.n_blocks):
            sums = {}
            if number in run.sidecars:
                ids = run.fragments[box(*grid.write_box(number))]
                write_chunk(array, grid.index(number), ids)
                data = run.sidecars[number].to_bytes()
                write_atomic(sidecar_path(run_dir, number), data)
                sums = {"fragments": checksum(ids), "sidecar": checksum(data)}
            state = "done" if number in run.sidecars else "skipped"
            if states is not None:
                state = states.get(number, state)
            if state is not None:
                journal.finish(BlockRecord(number, state, sums=sums))


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two label arrays are equal up to renaming (0 must stay 0)."""
    pairs = np.unique(np.stack([one.ravel(), other.ravel()]).astype(np.uint64), axis=1)
    zero = (pairs == 0).sum(axis=0) != 1
    return bool(
        len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1] and zero.all()
    )


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
