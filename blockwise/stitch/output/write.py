"""The steps of the stitch that write volumes: the segmentation and its pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from agq.blockwise.journal.writer import Journal
from agq.blockwise.stitch.output.pyramid import (
    Level,
    chunk_numbers,
    coarse_chunks,
    create_levels,
    downsample_batch,
    plan_levels,
    pyramid_size,
    write_metadata,
)
from agq.blockwise.stitch.output.relabel import relabel_batch
from agq.blockwise.stitch.spec import StitchReport, StitchSpec
from agq.blockwise.stitch.steps import Progress, Step, StitchError, cores, digest, run_tasks
from agq.blockwise.storage.files import make_folder
from agq.blockwise.volumes.create import open_array
from agq.errors import InputError

FRAGMENTS = "fragments"
SEGMENTATION = "segmentation"


class Writer:
    """Relabels fragments and makes the coarse levels; both go on where they were stopped.

    Raises
    ------
    InputError
        If the fragments are missing or of another grid.
    """

    def __init__(
        self,
        spec: StitchSpec,
        client: Client,
        on_progress: Progress | None,
        report: StitchReport,
    ) -> None:
        self.spec = spec
        self.client = client
        self.on_progress = on_progress
        self.report = report
        self.grid = spec.block_grid()
        self.run_dir = spec.run_dir
        self.container = spec.run_dir / "data.zarr"
        self.unit = self._check_fragments()

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

    def relabel(self, maps: Sequence[tuple[Path, Sequence[int]]], key: str) -> str:
        """Write the full resolution; return the key of the result.

        Parameters
        ----------
        maps
            File of each part of the id map, and the blocks that it holds.
        """
        group, journals = self.container / SEGMENTATION, self.run_dir / "journal"
        folder = journals / "relabel"
        # The coarse levels are made of this one, so what says they are done goes with it.
        outputs = [group, folder, journals / "pyramid"]
        step = Step(self.client, self.run_dir, "relabel", key, outputs, later=["pyramid"])
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
            done = Journal(folder).done(self.grid.n_blocks)
            total = sum(len(blocks) for _, blocks in maps)
            todo = [(file, [n for n in blocks if not done[n]]) for file, blocks in maps]
            size = max(1, min(self.spec.batch_blocks, -(-total // (8 * cores(self.client)))))
            parts = [
                (file, blocks[at : at + size])
                for file, blocks in todo
                for at in range(0, len(blocks), size)
            ]
            self._journalled(
                "relabel",
                folder,
                relabel_batch,
                [
                    (
                        str(self.container),
                        FRAGMENTS,
                        f"{SEGMENTATION}/{levels[0].name}",
                        str(file),
                        str(folder),
                        self.spec.grid,
                        blocks,
                    )
                    for file, blocks in parts
                ],
                [len(blocks) for _, blocks in parts],
                total - sum(len(blocks) for _, blocks in parts),
            )
            step.finish({})
        self.report.end(step)
        return step.key

    def pyramid(self, numbers: NDArray[np.int64], key: str) -> None:
        """Write the coarse levels over some blocks, and the metadata of all."""
        group, folder = self.container / SEGMENTATION, self.run_dir / "journal" / "pyramid"
        levels, chunks = self._levels(), self.grid.write_shape
        names = {level.name for level in levels[1:]} | {path.name for path in group.glob("s*")}
        outputs = [group / name for name in sorted(names - {levels[0].name})]
        step = Step(
            self.client,
            self.run_dir,
            "pyramid",
            digest(key, len(levels), self.spec.downsampling),
            [*outputs, folder],
        )
        if step.finished() is None:
            create_levels(
                self.container, SEGMENTATION, levels[1:], chunks, self.grid.offset, self.unit
            )
            make_folder(folder)
            indices = np.stack(np.unravel_index(numbers, self.grid.shape), axis=1)
            for i, level in enumerate(levels[1:], 1):
                indices = coarse_chunks(indices, level.step)
                self._coarsen(levels, i, indices, folder)
            write_metadata(
                self.container,
                SEGMENTATION,
                levels,
                self.grid.offset,
                self.unit,
                self.spec.downsampling,
            )
            step.finish({})
        self.report.levels = len(levels)
        self.report.end(step)

    def _coarsen(
        self, levels: list[Level], i: int, indices: NDArray[np.int64], folder: Path
    ) -> None:
        chunks = self.grid.write_shape
        named = chunk_numbers(levels, chunks, i, indices)
        todo = np.flatnonzero(~Journal(folder).done(pyramid_size(levels, chunks))[named])
        size = max(1, min(self.spec.batch_blocks, -(-len(todo) // (4 * cores(self.client)))))
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
                    self.spec.downsampling,
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
        failed = run_tasks(
            self.client, self.run_dir, name, function, calls, weights, self.on_progress, done
        )
        if sum(failed):
            first = Journal(folder).failed()[0]
            raise StitchError(
                f"{name}: {sum(failed)} blocks failed, first block {first.block}: {first.reason}"
                f" (tracebacks in {folder})"
            )

    def _levels(self) -> list[Level]:
        grid = self.grid
        return plan_levels(grid.volume_shape, grid.write_shape, grid.voxel_size, self.spec.levels)
