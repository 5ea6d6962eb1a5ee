"""Packs the blocks of a finished run into few files."""

import time
from collections.abc import Callable
from pathlib import Path

from agq.blockwise.blocks.pack_arrays import ARRAYS, pack_array
from agq.blockwise.journal.reader import Journal
from agq.blockwise.stitch.output.pyramid import Pyramid
from agq.errors import InputError
from agq.pipeline.config.recorded import require_own_folder
from agq.pipeline.folder import RunFolder

_STAGES = ("predict", "stitch")


def pack_run(
    folder: Path, *, undo: bool = False, on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Put fragments and affinities of a run into shards, or back into a file a block.

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
