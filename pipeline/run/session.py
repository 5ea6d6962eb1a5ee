"""A run while a command works on it: its lock, its record, its ledger and its progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from agq.blockwise.ledger.settings import LedgerSettings
from agq.blockwise.predict.coordinator import PredictProgress
from agq.blockwise.predict.local_processes import Terminated, termination_unwinds
from agq.credentials import hide
from agq.errors import InputError
from agq.pipeline.config.schema import masked
from agq.pipeline.folder import RunFolder
from agq.pipeline.run.identity import start
from agq.pipeline.run.overwrite import clear
from agq.pipeline.run.prepare import Prepared
from agq.pipeline.status.progress import Progress, Shown, open_progress

if TYPE_CHECKING:
    from agq.blockwise.ledger.database import Ledger
    from agq.blockwise.ledger.feeder import LedgerFeeder

logger = logging.getLogger(__name__)

_STEP_S = 5.0

STAGES = ("predict", "relabel", "pyramid")
"""Stages that work by blocks and so have a journal."""


class Session:
    """What the stages of a run share while a command runs them; made by `open_session`.

    Attributes
    ----------
    prepared
        The checked run.
    progress
        Where progress is shown.
    on_move
        Called with what a stage is at; the same again means that it has not moved.
    """

    def __init__(self, prepared: Prepared, progress: Progress, feeder: LedgerFeeder | None) -> None:
        self.prepared = prepared
        self.progress = progress
        self.on_move: Callable[..., object] = lambda *_: None
        self._feeder = feeder
        self._step = ""
        self._step_due = 0.0

    def update_stage(self, name: str, **entries: Any) -> None:
        """Merge entries into the record of a stage, in run.json and in the ledger."""
        self.prepared.run.update_stage(name, **entries)
        if self._feeder is not None:
            self._feeder.update_stage(name, **entries)

    def show_blocks(self, progress: PredictProgress) -> None:
        """Show how far the prediction is."""
        self.progress.blocks(progress)
        self.on_move("predict", progress.done, progress.skipped, progress.failed)

    def show_step(self, step: str, done: int, total: int) -> None:
        """Show how far a step is."""
        self.progress.step(step, done, total)
        self.on_move(step, done, total)

    def update_step(self, stage: str, step: str, done: int, total: int) -> None:
        """Show how far a step of a stage is, and record it now and then."""
        self.show_step(step, done, total)
        now = time.monotonic()
        if step == self._step and now < self._step_due:
            return
        self._step, self._step_due = step, now + _STEP_S
        # For watching only: what is wrong here shows up in the work itself.
        with suppress(OSError, InputError):
            self.update_stage(stage, step=step, step_done=done, step_total=total)

    def has_report(self, name: str) -> bool:
        """Tell whether an earlier command has left a report of a stage."""
        return bool(self.prepared.run.record()["stages"].get(name, {}).get("report"))

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[dict[str, Any]]:
        """Record begin, end and outcome of a stage; the block may set entries of the record.

        What it does not set stays as an earlier command left it: a report, say, if nothing was to
        be done.
        """
        self.update_stage(
            name,
            state="running",
            blocks_total=total,
            started=time.time(),
            finished=None,
            error=None,
            step=None,
        )
        record: dict[str, Any] = {"state": "done"}
        try:
            yield record
        # SystemExit and KeyboardInterrupt too: a later status must not say "running".
        except BaseException as error:
            record = {"state": "stopped", "error": _reason(error)}
            raise
        finally:
            # A run folder that has been moved away is not made anew.
            if self.prepared.run.exists():
                self.update_stage(name, finished=time.time(), **record)


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted (Ctrl-C)"
    if isinstance(error, Terminated):
        return str(error)
    return hide(f"{type(error).__name__}: {error}")


@contextmanager
def open_session(
    prepared: Prepared,
    *,
    overwrite: bool = False,
    on_progress: Shown = "bars",
) -> Iterator[Session]:
    """Hold the run's lock, open or start the run, feed the ledger, and show progress.

    Parameters
    ----------
    prepared
        The checked run.
    overwrite
        Delete what the folder holds and start over.
    on_progress
        Where progress goes, see `open_progress`.

    Raises
    ------
    InputError
        If another process works on the run, or the folder holds a different run.
    """
    run = prepared.run
    with run.lock(), termination_unwinds():
        if overwrite:
            clear(run, prepared.config)
        prepared = prepared.as_begun()
        start(prepared, masked(prepared.config))
        with _ledger(prepared) as feeder, open_progress(run.path, on_progress) as progress:
            for note in prepared.notes:
                progress.note(note)
            yield Session(prepared, progress, feeder)


def feeder_of(run: RunFolder, ledger: Ledger, *, full: bool = False) -> LedgerFeeder:
    """Return what brings a ledger to what a run folder says; `full` as for `LedgerFeeder`."""
    from agq.blockwise.ledger.feeder import LedgerFeeder

    record = run.record()
    feeder = LedgerFeeder(
        ledger,
        record["id"],
        {stage: run.journal(stage) for stage in STAGES},
        {
            "name": record["name"],
            "created": record["created"],
            "run_dir": str(run.path),
            "config": record["config"],
            "grid": record["identity"].get("grid"),
            **(record["commands"][-1] if record["commands"] else {}),
        },
        full=full,
    )
    # Those of earlier commands too: the database may be new, or have lost the run.
    for name, entries in record["stages"].items():
        feeder.update_stage(name, **entries)
    return feeder


def record_stop(
    run: RunFolder, stage: str, why: str, since: float, ledger: LedgerSettings | None = None
) -> None:
    """Record why a stage has not begun, if nothing was recorded of it since a time.

    Raises
    ------
    InputError
        If another process works on the run, or its record cannot be read or written.
    """
    with run.lock():
        if (run.record()["stages"].get(stage, {}).get("finished") or 0.0) >= since:
            return
        run.update_stage(stage, state="stopped", error=why, finished=time.time())
    database = _connect(ledger)
    if database is not None:
        feeder = feeder_of(run, database)
        feeder.start()
        feeder.stop()
        database.close()


def _connect(settings: LedgerSettings | None) -> Ledger | None:
    """Open the ledger that the settings or the environment name; most runs have none."""
    settings = settings or LedgerSettings()
    if not settings.asked_for:
        return None
    from agq.blockwise.ledger.database import connect  # imports pymongo

    return connect(settings)


@contextmanager
def _ledger(prepared: Prepared) -> Iterator[LedgerFeeder | None]:
    ledger = _connect(prepared.config.ledger)
    if ledger is None:
        yield None
        return
    feeder = feeder_of(prepared.run, ledger)
    feeder.start()
    try:
        yield feeder
    finally:
        report = feeder.stop()
        ledger.close()
        if not report.complete:
            logger.warning(
                "ledger: %d journal lines not delivered (%s); the next command on this run "
                "delivers them",
                report.undelivered,
                report.error,
            )
