"""Memory of the process that runs the stitch, without voxels (see tables.py).

All of it is the real one but the workers: each task is pickled, as for the scheduler, and a made-up
result stands for its work.
"""

import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from memory import peak_mib
from volumes import made_grid, make_array

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.records import BlockState
from agq.blockwise.journal.snapshot import write_snapshot
from agq.blockwise.journal.table import ROW, BlockTable
from agq.blockwise.stitch.contacts import Collect
from agq.blockwise.stitch.merge.agglomeration import Merge
from agq.blockwise.stitch.output.boxes import Coarsen, Relabel
from agq.blockwise.stitch.output.pyramid import Pyramid
from agq.blockwise.stitch.run import StitchSpec, _Stitch
from agq.blockwise.stitch.segments import LeafSegments, Map, Resolve, WriteSegments
from agq.blockwise.stitch.steps import Checksums
from agq.blockwise.stitch.superblocks import StitchFiles
from agq.blockwise.stitch.workers import OwnProcess, Task

CORES = 3200
"""Of the cluster that is made up: 100 nodes of 32."""


def _write_rows(folder: Path, count: int) -> None:
    """Write the compacted journal of a stage that has done so many blocks."""
    rows, numbers = np.zeros(count, ROW), np.arange(count)
    rows["block"], rows["rank"], rows["digest"] = numbers, BlockState.DONE, numbers + 1
    folder.mkdir(parents=True, exist_ok=True)
    meta: dict[str, Any] = {"files": {}, "ended": [], "garbage": 0, "sources": [["made", "made"]]}
    meta |= {"span": [1.0, 2.0], "reasons": [""], "failed": [], "rivals": [], "workers": []}
    write_snapshot(folder, BlockTable(rows), meta)


@dataclass(frozen=True)
class NoWorkers(OwnProcess):
    """Pickles tasks, and answers for them."""

    grid: BlockGrid | None = None
    seen: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    """By step: bytes of its tasks, the peak memory after it in MiB, and when that was."""

    @property
    def cores(self) -> int:
        """Return those of a cluster."""
        return CORES

    def run(self, step: str, tasks: Sequence[Task], done: int = 0) -> list[Any]:
        """Pickle tasks, and answer for them."""
        size = sum(len(pickle.dumps(task)) for task in tasks)
        results = [self._answer(task) for task in tasks]
        if tasks and isinstance(tasks[0], (Relabel, Coarsen)):
            self._write_journals(tasks[0].pyramid, tasks[0])
        name = step.split(" ")[0] if "/" in step else step
        before = self.seen.get(name, (0, 0.0, 0.0))[0]
        self.seen[name] = before + size, peak_mib(), time.process_time()
        return results

    def _answer(self, task: Task) -> Any:
        files = StitchFiles(self.folder)
        if isinstance(task, Collect | Map):
            path = files.evidence if isinstance(task, Collect) else files.map
            for leaf, _ in task.items:
                path(leaf).parent.mkdir(parents=True, exist_ok=True)
                path(leaf).touch()
            return 1, 1, 0
        if isinstance(task, Merge):
            for superblock, _ in task.items:
                files.merges(superblock).parent.mkdir(parents=True, exist_ok=True)
                files.merges(superblock).touch()
            return np.zeros(3, np.int64)
        if isinstance(task, Resolve):
            none = np.zeros(0, np.uint64)
            places = [place for place, _ in task.items if place.level == 0]
            return [LeafSegments(leaf, 1, 0, 0, (i, i + 1), none) for i, leaf in enumerate(places)]
        if isinstance(task, WriteSegments):
            files.lut.mkdir(exist_ok=True)
            return {"largest": []}
        if isinstance(task, Checksums):
            return [(file, "crc32c:00000000") for file in task.items]
        return 0

    def _write_journals(self, pyramid: Pyramid, task: Task) -> None:
        assert self.grid is not None
        counts = {}
        if isinstance(task, Relabel):
            counts["relabel"] = self.grid.n_blocks
            counts["pyramid"] = pyramid.first(pyramid.passes[0].last + 1)
        else:
            counts["pyramid"] = pyramid.first(len(pyramid.levels))
        for stage, count in counts.items():
            _alone(_write_rows, self.folder / "journal" / stage, count)


def _alone(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def _measure(folder: Path, grid: BlockGrid, leaf: Sequence[int] | None) -> None:
    workers = NoWorkers(folder, None, grid=grid)
    spec = StitchSpec(run_dir=folder, grid=grid.to_dict(), superblock=leaf)
    before, begun = peak_mib(), time.process_time()
    stitch = _Stitch(spec, workers, None)
    report = stitch.run()
    blocks, leaves = report.blocks, len(stitch.leaves)
    print(f"{blocks:,} blocks in {leaves:,} leaves; {before:.0f} MiB before")
    print(f"{'step':>22} {'CPU s':>7} {'peak MiB':>9} {'tasks MiB':>10}")
    for step, (size, peak, when) in workers.seen.items():
        print(f"{step:>22} {when - begun:7.1f} {peak:9.0f} {size / 2**20:10.1f}")
    extra = (peak_mib() - before) * 2**20
    print(
        f"{'all':>22} {time.process_time() - begun:7.1f} {peak_mib():9.0f}"
        f"  {extra / blocks:.0f} bytes a block, {extra / leaves:.0f} a leaf",
        flush=True,
    )


def client(sizes: Sequence[int], leaf: Sequence[int] | None, folder: Path | None) -> None:
    """Stitch cubes of about so many blocks, each in a process of its own."""
    for size in sizes:
        side = round(size ** (1 / 3))
        grid = made_grid((side, side, side))
        with tempfile.TemporaryDirectory(dir=folder) as made:
            make_array(Path(made), "fragments", grid)
            _alone(_write_rows, Path(made) / "journal" / "predict", grid.n_blocks)
            _alone(_measure, Path(made), grid, leaf)
