"""Checks, repairs and packs a run by its folder."""

import time
from collections.abc import Callable
from pathlib import Path

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.pack_arrays import ARRAYS, pack_array
from agq.blockwise.journal.pack import pack_journal
from agq.blockwise.journal.reader import Journal
from agq.blockwise.stitch.output.pyramid import Pyramid
from agq.blockwise.verify.check import verify
from agq.blockwise.verify.repair import repair as take_back
from agq.blockwise.verify.report import VerifyReport
from agq.blockwise.verify.stitched import written_files
from agq.errors import InputError, repairable
from agq.pipeline.config.recorded import require_own_folder
from agq.pipeline.folder import RunFolder

_STAGES = ("predict", "stitch")
_JOURNALS = ("predict", "relabel", "pyramid")


def verify_run(
    folder: Path,
    *,
    sample: float = 1.0,
    repair: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Compare what a folder holds with what was recorded when it was written.

    Parameters
    ----------
    folder
        Run folder.
    sample
        Share of the files whose contents are read, above 0 and at most 1.
    repair
        Take back what is missing or differs, so that the next run makes it again.
    on_progress
        Called with items done, and items in all.

    Raises
    ------
    InputError
        If it is no run folder, the sample is no share, or a repair meets another process that
        works on the run.
    """
    if not 0 < sample <= 1:
        raise InputError(f"--sample {sample:g}: a share of the files, above 0 and at most 1")
    run = RunFolder(folder)
    grid, affinities = _layout(run)

    def check() -> VerifyReport:
        return verify(run.path, grid, affinities=affinities, sample=sample, on_progress=on_progress)

    if not repair:
        return check()
    require_own_folder(run.path)
    with run.lock():
        report = check()
        report.taken_back = take_back(run.path, grid, report.problems)
        if report.taken_back:
            _mark_stopped(run, blocks="blocks" in report.taken_back)
    return report


def _mark_stopped(run: RunFolder, *, blocks: bool) -> None:
    """Say in the record which stages are not done any more."""
    for stage in ("predict", "stitch") if blocks else ("stitch",):
        if stage in run.record()["stages"]:
            run.update_stage(stage, state="stopped", error="taken back by agq verify --repair")


def require_segmentation(folder: Path) -> None:
    """Check that no chunk of the full resolution is missing, before it is copied elsewhere.

    A chunk without a file would read as background. Contents are not read.

    Raises
    ------
    InputError
        If one is, or it is no such folder.
    """
    run = RunFolder(folder)
    grid, _ = _layout(run)
    for file in written_files(run.path, grid):
        if file.kind == "segmentation" and (what := file.problem(run.path, contents=False)):
            raise repairable(f"{run.path / file.path}: {what}", run.path)


def pack_run(
    folder: Path, *, undo: bool = False, on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Put fragments and affinities of a run into shards, or back into a file a block.

    Journals are packed too, and stay so. Those of a run with a database are not: it has a document
    for each of their files.

    Parameters
    ----------
    folder
        Run folder.
    undo
        Unpack.
    on_progress
        Called with boxes done, and boxes in all, of one array after the other.

    Raises
    ------
    InputError
        If it is no run folder, a stage is not finished, or another process works on the run.
    """
    run = RunFolder(folder)
    grid = run.grid()
    require_own_folder(run.path)
    with run.lock():
        stages = run.record()["stages"]
        for name in _STAGES if not undo else ():
            # The stitch of another model's fragments has no prediction.
            state = stages.get(name, {}).get("state")
            if state != "done" and (name == "stitch" or name in stages):
                raise InputError(f"{run.path}: {name} is not finished; pack the run after it")
        if busy := Journal(run.journal("predict")).running(time.time()):
            raise InputError(
                f"{run.path}: {len(busy)} blocks are in the hands of workers (block {min(busy)});"
                " pack the run when these have ended"
            )
        box = Pyramid.planned(run.path, "", grid).passes[0].box
        for name in ARRAYS:
            if (run.path / "data.zarr" / name / "zarr.json").exists():
                pack_array(run.path, name, box, undo=undo, on_progress=on_progress)
        has_ledger = bool((run.record().get("config") or {}).get("ledger"))
        for stage in _JOURNALS if not (undo or has_ledger) else ():
            pack_journal(run.journal(stage))


def _layout(run: RunFolder) -> tuple[BlockGrid, bool]:
    """Return the blocks of a folder, and whether affinities are kept."""
    return run.grid(), bool(run.record()["identity"].get("affinities"))
