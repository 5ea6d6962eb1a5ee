"""The stitch: from fragments and sidecars of a run to one segmentation, on dask.

Steps, each with a key made from all that its output depends on, skipped if that output is there:

1. ``contacts``: evidence of batches of blocks, added up to one table (``contacts/``);
2. ``agglomerate``: exact greedy agglomeration of the whole graph in one task;
3. ``lut``: segment ids by block (``lut/``);
4. ``relabel``: ``data.zarr/segmentation/s0``, by batches of blocks, journalled by block;
5. ``pyramid``: ``s1``, ``s2``, ... and the OME-NGFF metadata, journalled by chunk.

The result depends on fragments, evidence and thresholds alone, not on batches or workers. After a
crash anywhere, running again ends in the same bytes.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from blockwise import contacts as contacts_module
from blockwise import sidecar as sidecar_module
from blockwise import stitch_tasks as tasks
from blockwise.agglomerate import Thresholds
from blockwise.array_files import save_array
from blockwise.arrays import open_array
from blockwise.cluster import local_client
from blockwise.errors import InputError
from blockwise.files import make_folder
from blockwise.journal import Journal
from blockwise.journal_records import STATE_RANK
from blockwise.litter import remove_all_temporaries
from blockwise.pyramid import (
    Level,
    chunk_numbers,
    coarse_chunks,
    create_levels,
    downsample_batch,
    plan_levels,
    pyramid_size,
    write_metadata,
)
from blockwise.relabel import relabel_batch
from blockwise.stitch_spec import StitchReport, StitchSpec, find_blocks
from blockwise.stitch_steps import Progress, Step, StitchError, digest, run_tasks

__all__ = [
    "Progress",
    "StitchError",
    "StitchReport",
    "StitchSpec",
    "find_blocks",
    "local_client",
    "run_stitch",
]

FRAGMENTS = "fragments"
SEGMENTATION = "segmentation"
ALGORITHM_VERSION = 1
"""Raised whenever the same evidence would give another segmentation or other bytes."""

_DONE = STATE_RANK["done"]
_SKIPPED = STATE_RANK["skipped"]


def run_stitch(
    spec: StitchSpec, client: Client, on_progress: Progress | None = None
) -> StitchReport:
    """Stitch the fragments of a run.

    Parameters
    ----------
    spec
        What to stitch.
    client
        Dask client; its workers must see the run folder under the same path.
    on_progress
        Called with the name of the step, items done, and items in all.

    Raises
    ------
    InputError
        If blocks failed or are missing (unless allowed), or files of the run do not fit.
    StitchError
        If blocks could not be relabelled, or workers kept dying. Running again does the rest.
    """
    return _Stitch(spec, client, on_progress).run()


class _Stitch:
    def __init__(self, spec: StitchSpec, client: Client, on_progress: Progress | None) -> None:
        self.spec = spec
        self.client = client
        self._workers = frozenset(client.ncores())
        self.on_progress = on_progress
        self.grid = spec.block_grid()
        self.run_dir = spec.run_dir
        self.container = spec.run_dir / "data.zarr"
        self.contacts = spec.run_dir / "contacts"
        self.lut = spec.run_dir / "lut"
        self.report = StitchReport()
        self.unit = self._check_fragments()

    def run(self) -> StitchReport:
        thresholds = Thresholds(self.spec.across, self.spec.within)
        numbers, key = self._blocks()
        key = self._collect(numbers, key)
        key = self._agglomerate(key, thresholds)
        key = self._number(key)
        key = self._relabel(numbers, key)
        self._pyramid(numbers, key)
        return self.report

    def _check_fragments(self) -> str:
        """Return the world unit of the fragments; refuse those of another grid."""
        array = open_array(self.container, FRAGMENTS, "r")
        if array.shape != self.grid.volume_shape or array.chunks != self.grid.write_shape:
            raise InputError(
                f"{self.container / FRAGMENTS}: shape {array.shape} in chunks {array.chunks} is not"
                f" that of the block grid, {self.grid.volume_shape} in {self.grid.write_shape}"
            )
        units: Any = array.attrs["units"]
        return str(units[0])

    def _blocks(self) -> tuple[NDArray[np.int64], str]:
        """Return the blocks to stitch, and a digest of what predict wrote for them."""
        selected, ranks, journal = find_blocks(self.spec)
        self.report.skipped = int((ranks == _SKIPPED).sum())
        self.report.missing = int((ranks < _SKIPPED).sum())
        numbers = selected[ranks == _DONE]
        self.report.blocks = len(numbers)
        rows = journal.rows
        rows = rows[np.argsort(rows["block"])]
        sums = rows["digest"][np.searchsorted(rows["block"], numbers)]
        return numbers, digest(
            [ALGORITHM_VERSION, contacts_module.FORMAT_VERSION, sidecar_module.FORMAT_VERSION],
            self.grid.to_dict(),
            numbers.tobytes(),
            np.ascontiguousarray(sums).tobytes(),
        )

    def _collect(self, numbers: NDArray[np.int64], key: str) -> str:
        step = Step(self.run_dir, "contacts", key, [self.contacts])
        result = step.finished()
        if result is None:
            present = np.zeros(self.grid.n_blocks, bool)
            present[numbers] = True
            make_folder(self.contacts)
            save_array(self.contacts / tasks.PRESENT_FILE, present)
            shape = self._batch_shape(len(numbers))
            folder = make_folder(self.contacts / ("parts-" + "x".join(map(str, shape))))
            batches = [
                (folder / f"{first}.npz", batch) for first, batch in self._batches(numbers, shape)
            ]
            todo = [(part, batch) for part, batch in batches if not part.exists()]
            run_tasks(
                self.client,
                "contacts",
                tasks.contacts_batch,
                [
                    (str(self.run_dir), str(self.contacts), str(part), self.spec.grid, batch)
                    for part, batch in todo
                ],
                [len(batch) for _, batch in todo],
                self.on_progress,
                len(numbers) - sum(len(batch) for _, batch in todo),
            )
            parts = [str(part) for part, _ in batches]
            result = step.finish(self._one("merge", tasks.merge_parts, str(self.contacts), parts))
            for parts_folder in self.contacts.glob("parts-*"):
                shutil.rmtree(parts_folder)
        self.report.fragments, self.report.contacts = result["fragments"], result["contacts"]
        return self._end(step)

    def _agglomerate(self, key: str, thresholds: Thresholds) -> str:
        step = Step(
            self.run_dir,
            "agglomerate",
            digest(key, thresholds.half_units),
            [self.contacts / tasks.AGGLOMERATION_FILE],
        )
        result = step.finished()
        if result is None:
            result = step.finish(
                self._one(
                    "agglomerate",
                    tasks.agglomerate_run,
                    str(self.contacts),
                    thresholds.across,
                    thresholds.within,
                )
            )
        self.report.merges = result["merges"]
        return self._end(step)

    def _number(self, key: str) -> str:
        spec = self.spec
        step = Step(self.run_dir, "lut", digest(key, spec.segment_ids, spec.min_size), [self.lut])
        result = step.finished()
        if result is None:
            result = step.finish(
                self._one(
                    "lut",
                    tasks.write_lut,
                    str(self.contacts),
                    str(self.lut),
                    self.grid.n_blocks,
                    spec.segment_ids,
                    spec.min_size,
                )
            )
        for name in ("segments", "small_segments", "small_voxels", "largest"):
            setattr(self.report, name, result[name])
        return self._end(step)

    def _relabel(self, numbers: NDArray[np.int64], key: str) -> str:
        group, journals = self.container / SEGMENTATION, self.run_dir / "journal"
        folder = journals / "relabel"
        # The coarse levels are made of this one, so what says they are done goes with it.
        step = Step(self.run_dir, "relabel", key, [group, folder, journals / "pyramid"])
        if step.finished() is None:
            levels = self._levels()
            create_levels(
                self.container,
                SEGMENTATION,
                levels[:1],
                self.grid.write_shape,
                self.grid.offset,
                self.unit,
            )
            make_folder(folder)
            make_folder(journals / "pyramid")
            todo = numbers[~Journal(folder).done(self.grid.n_blocks)[numbers]]
            batches = self._batches(todo, self._batch_shape(len(todo)))
            self._journalled(
                "relabel",
                folder,
                relabel_batch,
                [
                    (
                        str(self.container),
                        FRAGMENTS,
                        f"{SEGMENTATION}/{levels[0].name}",
                        str(self.lut),
                        str(folder),
                        self.spec.grid,
                        batch,
                    )
                    for _, batch in batches
                ],
                [len(batch) for _, batch in batches],
                len(numbers) - len(todo),
            )
            self._finish_arrays(step, [group])
        return self._end(step)

    def _pyramid(self, numbers: NDArray[np.int64], key: str) -> None:
        group, folder = self.container / SEGMENTATION, self.run_dir / "journal" / "pyramid"
        levels, chunks = self._levels(), self.grid.write_shape
        names = {level.name for level in levels[1:]} | {path.name for path in group.glob("s*")}
        outputs = [group / name for name in sorted(names - {levels[0].name})]
        step = Step(self.run_dir, "pyramid", digest(key, len(levels)), [*outputs, folder])
        if step.finished() is None:
            create_levels(
                self.container, SEGMENTATION, levels[1:], chunks, self.grid.offset, self.unit
            )
            make_folder(folder)
            indices = np.stack(np.unravel_index(numbers, self.grid.shape), axis=1)
            for i, level in enumerate(levels[1:], 1):
                indices = coarse_chunks(indices, level.step)
                self._coarsen(levels, i, indices, folder)
            write_metadata(self.container, SEGMENTATION, levels, self.grid.offset, self.unit)
            self._finish_arrays(step, outputs)
        self.report.levels = len(levels)
        self._end(step)

    def _coarsen(
        self, levels: list[Level], i: int, indices: NDArray[np.int64], folder: Path
    ) -> None:
        chunks = self.grid.write_shape
        named = chunk_numbers(levels, chunks, i, indices)
        todo = np.flatnonzero(~Journal(folder).done(pyramid_size(levels, chunks))[named])
        size = max(1, min(self.spec.batch_blocks, -(-len(todo) // (4 * self._cores()))))
        batches = [todo[at : at + size] for at in range(0, len(todo), size)]
        self._journalled(
            f"pyramid {levels[i].name}",
            folder,
            downsample_batch,
            [
                (
                    str(self.container),
                    f"{SEGMENTATION}/{levels[i - 1].name}",
                    f"{SEGMENTATION}/{levels[i].name}",
                    levels[i].step,
                    str(folder),
                    list(zip(named[batch].tolist(), indices[batch].tolist(), strict=True)),
                )
                for batch in batches
            ],
            [len(batch) for batch in batches],
            len(indices) - len(todo),
        )

    def _journalled(
        self,
        name: str,
        folder: Path,
        function: Any,
        calls: list[tuple[Any, ...]],
        weights: list[int],
        done: int,
    ) -> None:
        failed = run_tasks(self.client, name, function, calls, weights, self.on_progress, done)
        if sum(failed):
            first = Journal(folder).failed()[0]
            raise StitchError(
                f"{name}: {sum(failed)} blocks failed, first block {first.block}: {first.reason}"
                f" (tracebacks in {folder})"
            )

    def _finish_arrays(self, step: Step, arrays: list[Path]) -> None:
        """Mark a step done; after a crash, remove what killed writers left in its arrays."""
        if step.resumed or frozenset(self.client.ncores()) != self._workers:
            for path in arrays:
                remove_all_temporaries(path)
        step.finish({})

    def _one(self, name: str, function: Any, *arguments: Any) -> dict[str, Any]:
        result: dict[str, Any] = run_tasks(
            self.client, name, function, [arguments], [1], self.on_progress
        )[0]
        return result

    def _levels(self) -> list[Level]:
        grid = self.grid
        return plan_levels(grid.volume_shape, grid.write_shape, grid.voxel_size, self.spec.levels)

    def _cores(self) -> int:
        return max(1, sum(self.client.ncores().values()))

    def _batch_shape(self, blocks: int) -> tuple[int, int, int]:
        """Return a compact box of blocks for a task, small enough to keep all workers busy."""
        most = min(self.spec.batch_blocks, -(-blocks // (4 * self._cores())))
        shape = [1, 1, 1]
        while True:
            open_axes = [d for d in range(3) if shape[d] < self.grid.shape[d]]
            axis = min(open_axes, key=lambda d: shape[d], default=None)
            if axis is None or 2 * shape[0] * shape[1] * shape[2] > most:
                return shape[0], shape[1], shape[2]
            shape[axis] *= 2

    def _batches(
        self, numbers: NDArray[np.int64], shape: tuple[int, int, int]
    ) -> list[tuple[int, list[int]]]:
        """Cut blocks into boxes of a shape: (first block number of the box, its blocks)."""
        index = np.stack(np.unravel_index(numbers, self.grid.shape), axis=1) // np.array(shape)
        corner = np.ravel_multi_index(tuple((index * np.array(shape)).T), self.grid.shape)
        order = np.argsort(corner, kind="stable")
        first, at = np.unique(corner[order], return_index=True)
        parts = np.split(numbers[order], at[1:])
        return [(int(f), part.tolist()) for f, part in zip(first, parts, strict=True)]

    def _end(self, step: Step) -> str:
        self.report.seconds[step.name] = round(time.monotonic() - step.begun, 3)
        if step.reused:
            self.report.reused.append(step.name)
        return step.key
