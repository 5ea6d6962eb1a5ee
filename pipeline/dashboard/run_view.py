"""One run for the page: polled at most once a second, however many browsers ask."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pymongo.errors import PyMongoError

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.progress import StageProgress
from agq.blockwise.journal.records import BlockState
from agq.blockwise.journal.table import ROW
from agq.blockwise.ledger.database import Ledger
from agq.blockwise.threads import start_aside
from agq.blockwise.volumes.triples import Triple
from agq.errors import InputError
from agq.pipeline.config.schema import RoiSettings
from agq.pipeline.dashboard.blockmap import (
    By,
    MapImage,
    block_in_cell,
    block_states,
    block_values,
    layer_to_show,
    state_image,
    value_image,
)
from agq.pipeline.dashboard.details import (
    group_failures,
    history,
    log_tail,
    middle_voxel,
    results,
    settings,
    worker_rows,
)
from agq.pipeline.data.inputs import roi_box
from agq.pipeline.evaluate.plausibility import recorded_plausibility
from agq.pipeline.folder import RunFolder, grid_of
from agq.pipeline.records import check_document
from agq.pipeline.slurm.jobs import queue_status
from agq.pipeline.status.failures import failure_of
from agq.pipeline.status.monitor import Monitor
from agq.pipeline.status.run_status import RunStatus, StageStatus
from agq.pipeline.suspects.listed import TABLE, picture_of, read_suspects
from agq.reading import read_file

STAGE: Final = "predict"
"""The stage whose blocks, workers and failures the page shows."""

_POLL_S: Final = 1.0
_PATIENCE_S: Final = 1.0
_MAX_BLOCKS: Final = 10**9
_PICTURE_BYTES: Final = 2**26
_PNG: Final = b"\x89PNG\r\n\x1a\n"


class RunView:
    """One run: its status and all data on its page. Safe to use from several threads.

    Parameters
    ----------
    ledger
        Read if the run folder is not on this machine.
    ledger_id
        Id of a run that only the ledger is asked for: nothing in `run_dir` is read.
    """

    def __init__(
        self, run_dir: Path, ledger: Ledger | None = None, *, ledger_id: str | None = None
    ) -> None:
        self._run = RunFolder(run_dir)
        self._here = ledger_id is None and self._run.exists()
        self._ledger = None if self._here else ledger
        # The block map needs every row.
        self._monitor = Monitor(
            run_dir, self._ledger, lazy=False, queue=queue_status, ledger_id=ledger_id
        )
        self._lock = threading.Lock()
        self._polled = 0.0
        self._status: RunStatus | None = None
        self._record: dict[str, Any] = {}
        self._progress: StageProgress | None = None
        self._rows: npt.NDArray[Any] = np.zeros(0, ROW)
        self._grid: BlockGrid | None = None
        self._selected: npt.NDArray[np.int64] | None = None
        self._columns: dict[str, tuple[Any, npt.NDArray[Any]]] = {}
        self._opened = threading.Event()
        start_aside("open-run", self._open)

    @property
    def path(self) -> Path:
        """Run folder.

        Raises
        ------
        InputError
            If only the ledger knows the run.
        """
        if not self._here:
            raise InputError(
                f"this machine has no folder of the run at {self._run.path} that belongs to you or "
                "to a user whom you trust: look where it lies, or name the folder"
            )
        return self._run.path

    @property
    def rows(self) -> npt.NDArray[Any]:
        """One row per block that has ended, as in the journal's table."""
        with self._lock:
            self._refresh()
            return self._rows

    def overview(self, patience_s: float | None = _PATIENCE_S) -> dict[str, Any]:
        """Return the data of the page except the map, as plain data.

        Parameters
        ----------
        patience_s
            Seconds to wait for the first read of the journal; after that the answer is only
            ``loading``. None waits until it is read.

        Raises
        ------
        InputError
            If the run does not exist.
        """
        if not self._opened.wait(patience_s):
            return {"loading": True, "name": self._run.path.name, "run_dir": str(self._run.path)}
        with self._lock:
            status = self._refresh()
            stage = next((s for s in status.stages if s.name == STAGE), None)
            now = time.time()
            until = now if stage is None or stage.finished is None else stage.finished
            stitched = self._record.get("stages", {}).get("stitch", {})
            plausible = recorded_plausibility(stitched)
            begun = self._begun()
            begun = self._begun()
            failed = map(failure_of, self._progress.failed() if self._progress else ())
            count, failures = group_failures(failed, self._grid)
            return status.model_dump(
                mode="json", exclude={"stages": {"__all__": {"failures", "errors"}}}
            ) | {
                "now": now,
                "grid": None if self._grid is None else self._grid.to_dict(),
                "blocks": None if self._grid is None else self._grid.shape,
                "states": np.bincount(self._codes(), minlength=6).tolist() if self._grid else None,
                "history": history(self._rows, stage.started if stage else None, until, begun),
                "workers": [] if stage is None else self._workers(stage, now),
                "failed": count,
                "failures": failures,
                "results": results(self._record),
                "plausibility": plausible and plausible.to_dict(),
                "picture": _written(self._pictures()),
                "suspects": _written([self._run.path / TABLE] if self._here else []),
                "settings": settings(self._record),
                "here": self._here,
            }

    def progress(self) -> dict[str, Any]:
        """Return blocks that need no more work, and those that failed, the speed and time left."""
        if not self._opened.wait(_PATIENCE_S):
            return {}
        with self._lock:
            status = self._refresh()
        stage = next((s for s in status.stages if s.name == STAGE), None)
        if stage is None:
            return {}
        return {
            "done": stage.ended_blocks,
            "failed": stage.failed,
            "blocks_per_s": stage.blocks_per_s_now,
            "eta_s": stage.eta_s,
            "heard": status.heard,
        }

    def image(self, by: By, axis: int, index: int | None = None) -> MapImage:
        """Draw one layer of the block map; without an index, the one in which most happens.

        Raises
        ------
        InputError
            If the run has no grid yet, or the grid no such layer.
        """
        with self._fresh_grid() as grid:
            if index is None:
                index = layer_to_show(grid, self._codes(), axis)
            if not 0 <= index < grid.shape[axis]:
                raise InputError(f"no layer {index} on axis {axis} of {grid.shape} blocks")
            if by == "state":
                return state_image(grid, self._codes(), axis, index)
            return value_image(grid, self._values(by), axis, index)

    def block(self, at: Triple, axis: int, step: int) -> dict[str, Any]:
        """Return the state, place and record of the block that a cell of the map shows.

        Raises
        ------
        InputError
            If the run has no grid yet, or the grid no such block.
        """
        with self._fresh_grid() as grid:
            try:
                number = block_in_cell(grid, self._codes(), at, axis, step)
            except IndexError as error:
                raise InputError(str(error)) from None
            roi = grid.write_roi(number)
            about: dict[str, Any] = {
                "block": number,
                "index": grid.index(number),
                "code": int(self._codes()[number]),
                "at": middle_voxel(grid, number),
                "offset": list(roi.offset),
                "shape": list(roi.shape),
            }
            record = self._progress.record(number) if self._progress else None
            return about | ({} if record is None else {"record": record.to_dict()})

    def log(self, worker: str) -> str | None:
        """Return the end of a worker's log, if it is on this machine."""
        return log_tail(self.path, worker) if self._here else None

    def picture(self) -> bytes | None:
        """Return the picture (png) that the run has drawn of its result; None without one."""
        return self._png(self._pictures())

    def suspects(self) -> list[dict[str, Any]]:
        """Return the list of `agq suspects`, each with whether it was drawn; [] without one."""
        if not self._here:
            return []
        found = []
        for row in read_suspects(self._run.path):
            # JavaScript's numbers hold 53 bits.
            ids = {name: str(row[name]) for name in row if name.endswith(("segment", "fragment"))}
            drawn = (self._run.path / picture_of(row["rank"])).is_file()
            found.append(row | ids | {"drawn": drawn})
        return found

    def suspect(self, rank: int) -> bytes | None:
        """Return the picture (png) of a suspect; None without one."""
        return self._png([self._run.path / picture_of(rank)] if self._here else [])

    def _png(self, files: Sequence[Path]) -> bytes | None:
        for file in files:
            with suppress(OSError, InputError, ValueError):
                data = read_file(file, most=_PICTURE_BYTES, within=self._run.path, follow=False)
                if data.startswith(_PNG):
                    return data
        return None

    def _pictures(self) -> list[Path]:
        """Name where the picture may lie: named after the folder as it is, or as it was."""
        if not self._here:
            return []
        names = dict.fromkeys((self._run.path.name, str(self._record.get("name"))))
        return [self._run.path / f"{name}.png" for name in names]

    def _open(self) -> None:
        """Read the journal once in the background: 10^6 lines without a snapshot take a while."""
        try:
            with self._lock, suppress(InputError, PyMongoError, OSError):
                # The next request meets the error again and answers with it.
                self._refresh()
        finally:
            self._opened.set()

    def _refresh(self) -> RunStatus:
        if self._status is not None and time.monotonic() - self._polled < _POLL_S:
            return self._status
        self._status = self._monitor.poll()
        self._progress = self._monitor.progress(STAGE)
        if self._ledger is None:
            self._record = self._run.record()
            grid = self._record["identity"].get("grid")
        else:
            self._record = check_document(self._ledger.find_run(self._status.id) or {"_id": "x"})
            grid = self._record.get("grid")
        if self._progress is not None:
            self._rows = self._progress.rows
        if grid and (self._grid is None or self._grid.to_dict() != grid):
            self._grid = _drawable(grid_of(grid, f"the record of {self._run.path}"))
            self._selected = _selected(self._grid, self._record.get("config", {}))
            self._columns.clear()
        self._polled = time.monotonic()
        return self._status

    def _running(self) -> npt.NDArray[np.int64]:
        running = self._status is not None and self._status.state == "running"
        blocks = self._progress.running(time.time()) if running and self._progress else []
        return np.fromiter(blocks, np.int64)

    def _codes(self) -> npt.NDArray[np.uint8]:
        running, n = self._running(), self._known_grid().n_blocks
        return self._column(
            "state", running.tolist(), lambda: block_states(n, self._selected, self._rows, running)
        )

    def _values(self, by: By) -> npt.NDArray[np.float32]:
        n = self._known_grid().n_blocks
        return self._column("value", by, lambda: block_values(n, self._rows, by))

    def _column(self, name: str, of: Any, make: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return a column of all blocks, made anew if the rows or what it is made of changed."""
        version = (self._progress.version if self._progress else 0.0, of)
        cached = self._columns.get(name)
        if cached is None or cached[0] != version:
            cached = self._columns[name] = (version, make())
        return cached[1]

    @contextmanager
    def _fresh_grid(self) -> Iterator[BlockGrid]:
        """Lock and refresh the run; yield its grid."""
        with self._lock:
            self._refresh()
            yield self._known_grid()

    def _known_grid(self) -> BlockGrid:
        if self._grid is None:
            raise InputError("the run has no block grid yet: its prediction has not begun")
        return self._grid

    def _begun(self) -> list[float]:
        """Return when each block that is under way was begun."""
        running = set(self._running().tolist())
        workers = self._progress.workers.values() if self._progress else ()
        return [
            begun
            for worker in workers
            for block, (_, begun) in worker.current.items()
            if block in running
        ]

    def _workers(self, stage: StageStatus, now: float) -> list[dict[str, Any]]:
        begun: dict[str, float] = {}
        for worker in self._progress.workers.values() if self._progress else ():
            if worker.current:
                begun[worker.info.name] = min(b for _, b in worker.current.values())
        done = self._rows[-2000:]
        done = done[done["rank"] == BlockState.DONE]
        usual = float(np.median(done["finished"] - done["started"])) if done.size else 0.0
        return worker_rows(stage, begun, usual, now)


def _written(files: Sequence[Path]) -> float | None:
    """Return when the first of some files that is there was written."""
    for file in files:
        with suppress(OSError, ValueError):
            return file.lstat().st_mtime
    return None


def _selected(grid: BlockGrid, config: dict[str, Any]) -> npt.NDArray[np.int64] | None:
    """Return the blocks that the configured ROI touches; None for all, or if it is damaged."""
    section = config.get("input")
    roi = section.get("roi") if isinstance(section, dict) else None
    try:
        box = roi_box(RoiSettings.from_values(roi, "input.roi"), grid) if roi else None
    except InputError:
        return None
    return None if box is None else grid.select(*box)


def _drawable(grid: BlockGrid) -> BlockGrid:
    """Return a grid of which a map can be held in memory."""
    if grid.n_blocks > _MAX_BLOCKS:
        raise InputError(f"a grid of {grid.n_blocks:,} blocks is too large to be drawn")
    return grid
