"""How far a run is: from the ledger where there is one, else from the run folder alone.

Both give the same picture, because the ledger is made from the journal. The ledger is asked first:
it answers from totals, and from any machine. Where it is away, does not know the run, or is behind
the journal files, those are read.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from agq.errors import InputError
from agq.pipeline.folder import RunFolder
from agq.pipeline.status.failures import failures_of_journal, failures_of_ledger
from agq.pipeline.status.run_status import QueueStatus, RunState, RunStatus, StageStatus
from agq.pipeline.status.stages import (
    Record,
    coordinator_alive,
    journal_totals,
    ledger_totals,
    run_state_of,
    stage_entries,
    stage_status,
    workers_of_documents,
    workers_of_states,
)

# numpy and the database's client are imported where they are used: a status needs one of them.
if TYPE_CHECKING:
    from rich.console import Console

    from agq.blockwise.journal.writer import Journal
    from agq.blockwise.ledger.database import Ledger

#: Stages with a journal of their own; the last two are parts of the stage "stitch".
_JOURNALS: Final = ("predict", "relabel", "pyramid")
_BEHIND_S: Final = 10.0


Queue = Callable[[Path], tuple[QueueStatus, ...] | None]
"""Counts the jobs of a run folder in the batch system's queue; None where it cannot be asked."""


def load_status(
    run_dir: Path, ledger: "Ledger | None" = None, queue: Queue | None = None
) -> RunStatus:
    """Say how far a run is.

    Parameters
    ----------
    run_dir : Path
        Run folder. With a ledger that knows it, it need not be on this machine.
    ledger : Ledger, optional
        Ask it first.
    queue : callable, optional
        Asked for the jobs of a submitted run.

    Raises
    ------
    InputError
        If the folder holds no run and the ledger does not know it either.
    """
    return Monitor(run_dir, ledger, queue=queue).poll()


def watch(
    run_dir: Path,
    ledger: "Ledger | None" = None,
    *,
    queue: Queue | None = None,
    interval_s: float = 2.0,
    console: "Console | None" = None,
) -> RunStatus:
    """Show how far a run is until it is over (or Ctrl-C).

    Parameters
    ----------
    run_dir : Path
        Run folder.
    ledger : Ledger, optional
        Ask it first.
    queue : callable, optional
        Asked for the jobs of a submitted run.
    interval_s : float
        Seconds between updates.
    console : Console, optional
        Where to; without a terminal only the last picture is printed.

    Returns
    -------
    RunStatus
        The last state seen.

    Raises
    ------
    InputError
        As in `load_status`.
    """
    from rich.console import Console
    from rich.live import Live

    from agq.pipeline.status.text import render

    monitor = Monitor(run_dir, ledger, queue=queue)
    status = monitor.poll()
    over = 0
    with Live(render(status), console=console or Console(), auto_refresh=False) as live:
        # Twice: between two stages, and seen from another machine, nothing runs for a moment.
        while over < 2:
            over = 0 if status.state in ("new", "running") else over + 1
            live.update(render(status), refresh=True)
            if over < 2:
                time.sleep(interval_s)
                status = monitor.poll()
    return status


class Monitor:
    """Follows one run; keeps what it has read of the journals between polls.

    Parameters
    ----------
    run_dir : Path
        Run folder.
    ledger : Ledger, optional
        Ask it first.
    lazy : bool
        Read no more of a journal than a status needs; off for callers that ask for all of it.
    queue : callable, optional
        Asked for the jobs of a submitted run.
    """

    def __init__(
        self,
        run_dir: Path,
        ledger: "Ledger | None" = None,
        *,
        lazy: bool = True,
        queue: Queue | None = None,
    ) -> None:
        self._run = RunFolder(Path(run_dir))
        self._ledger = ledger
        self._lazy = lazy
        self._queue = queue
        self._journals: dict[str, Journal] = {}
        self._ended: dict[str, tuple[Record, StageStatus]] = {}

    def poll(self) -> RunStatus:
        """Return the present state.

        Raises
        ------
        InputError
            If the folder holds no run and the ledger does not know it either.
        """
        status = self._poll()
        if self._queue is None or not (self._run.path / "slurm").is_dir():
            return status
        return status.model_copy(update={"queue": self._queue(self._run.path)})

    def _poll(self) -> RunStatus:
        here = self._run.exists()
        note = None
        if self._ledger is not None:
            from pymongo.errors import PyMongoError

            try:
                found = self._from_ledger(self._run.record() if here else None)
                if found is not None:
                    return found
                note = "the ledger is behind or does not know this run: read from the journal"
            except PyMongoError as error:
                note = f"{self._ledger.error(error)}: read from the journal"
                if not here:
                    raise InputError(f"this machine has no {self._run.path}, and {note}") from None
        from agq.blockwise.journal.snapshot import SnapshotError

        record = self._run.record()
        try:
            return self._from_journal(record, note)
        except SnapshotError:
            # A network file system takes away what the coordinator has replaced: once more.
            self._journals.clear()
        try:
            return self._from_journal(record, note)
        except SnapshotError:
            # Damaged, then: the lines say all of it.
            self._journals.clear()
            self._lazy = False
        return self._from_journal(record, note)

    # From the run folder

    def _from_journal(self, record: Record, note: str | None) -> RunStatus:
        now = time.time()
        alive = coordinator_alive(self._run.path)
        entries = stage_entries(record, [s for s in _JOURNALS if self._run.journal(s).is_dir()])
        state = run_state_of(entries.values(), alive)
        stages = []
        for name, entry in entries.items():
            known = self._ended.get(name)
            if known is not None and known[0] == entry:
                stages.append(known[1])
                continue
            journal = self.journal(name) if name in _JOURNALS else None
            totals = journal_totals(journal, entry, now) if journal else {}
            failures, errors = (
                failures_of_journal(journal, name, self._run.path) if journal else ((), ())
            )
            stages.append(
                stage_status(
                    name,
                    entry,
                    totals,
                    state,
                    failures=failures,
                    errors=errors,
                    workers=workers_of_states(
                        journal.workers.values() if journal else (), state, now
                    ),
                    now=now,
                )
            )
            if name != "predict" and state != "running" and entry.get("state") == "done":
                # A table of 10^6 blocks is 77 MB: what cannot change any more is let go.
                self._journals.pop(name, None)
                self._ended[name] = (entry, stages[-1])
        return _status(record, self._run.path, state, "journal", note, now, stages)

    def journal(self, stage: str) -> "Journal":
        """Return the journal of a stage, read up to now."""
        from agq.blockwise.journal.writer import Journal

        journal = self._journals.get(stage)
        if journal is None or journal.replaced():
            journal = self._journals[stage] = Journal(self._run.journal(stage), lazy=self._lazy)
        else:
            journal.catch_up()
        return journal

    # From the ledger

    def _from_ledger(self, here: Record | None) -> RunStatus | None:
        """Status from the ledger; None where the journal here says more."""
        assert self._ledger is not None
        if here is not None:
            known = self._ledger.find_run(here["id"])
        else:
            known = self._ledger.runs.find_one(
                {"$or": [{"run_dir": str(self._run.path)}, {"_id": self._run.path.name}]},
                sort=[("created", -1)],
            )
            if known is None:
                raise InputError(f"{self._run.path} is not a run folder, and unknown to the ledger")
        if known is None or (here is not None and self._behind(known)):
            return None
        now = time.time()
        # What the coordinator says of its stages is in run.json sooner than in the ledger.
        record = known | {"stages": here["stages"]} if here else known
        # Here it may be mounted or moved elsewhere than where its coordinator works.
        path = self._run.path if here else Path(known.get("run_dir", self._run.path))
        totals = {name: s.get("totals", {}) for name, s in known.get("stages", {}).items()}
        alive = coordinator_alive(self._run.path) if here is not None else None
        entries = stage_entries(record, [name for name in totals if totals[name]])
        state = run_state_of(entries.values(), alive)
        stages = []
        for name, entry in entries.items():
            total = ledger_totals(totals.get(name, {}), entry, now)
            failures, errors = (
                failures_of_ledger(self._ledger, known["_id"], name, path)
                if total.get("failed")
                else ((), ())
            )
            workers = self._ledger.find_workers(known["_id"], name) if total else ()
            stages.append(
                stage_status(
                    name,
                    entry,
                    total,
                    state,
                    failures=failures,
                    errors=errors,
                    workers=workers_of_documents(workers, state, now),
                    now=now,
                )
            )
        updated = max([known.get("updated", 0.0), *(t.get("updated", 0) for t in totals.values())])
        return _status(record | {"id": known["_id"]}, path, state, "ledger", None, updated, stages)

    def _behind(self, known: Record) -> bool:
        for stage in _JOURNALS:
            size = sum(p.stat().st_size for p in self._run.journal(stage).glob("*.jsonl"))
            totals = known.get("stages", {}).get(stage, {}).get("totals", {})
            old = time.time() - totals.get("updated", 0.0) > _BEHIND_S
            if size > totals.get("bytes", 0) and old:
                return True
        return False


def _status(
    record: Record,
    path: Path,
    state: RunState,
    source: Literal["ledger", "journal"],
    note: str | None,
    updated: float,
    stages: list[StageStatus],
) -> RunStatus:
    return RunStatus(
        id=str(record.get("id", "")),
        name=str(record.get("name", path.name)),
        run_dir=str(path),
        state=state,
        source=source,
        note=note,
        created=record.get("created"),
        updated=updated,
        stages=tuple(stages),
    )
