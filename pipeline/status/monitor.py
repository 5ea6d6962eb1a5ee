"""How far a run is: from the ledger if the run has one, else from the run folder alone.

Both give the same picture, because the ledger is made from the journal. The ledger is asked first:
it answers from totals, and from any machine. Where it is away, does not know the run, or is behind
the journal files, those are read.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from agq.blockwise.journal.progress import RECENT_S, StageProgress
from agq.errors import InputError
from agq.pipeline.folder import RunFolder
from agq.pipeline.records import check_document
from agq.pipeline.status.compare import compare
from agq.pipeline.status.failures import placed
from agq.pipeline.status.notices import read_notices
from agq.pipeline.status.run_status import QueueStatus, RunStatus, StageStatus
from agq.pipeline.status.stages import (
    LEADERS,
    Batch,
    Record,
    coordinator_alive,
    run_state_of,
    stage_entries,
    stage_status,
)

# numpy and the database's client are imported where they are used: a status needs one of them.
if TYPE_CHECKING:
    from rich.console import Console

    from agq.blockwise.journal.reader import Journal
    from agq.blockwise.ledger.database import Ledger
    from agq.blockwise.ledger.progress import LedgerStage

#: Stages with a journal of their own; the last two are parts of the stage "stitch".
_JOURNALS: Final = ("predict", "relabel", "pyramid")
_BEHIND_S: Final = 10.0
_NOT_ASKED: Final = (
    "its batch jobs cannot be asked for here: agq status on the cluster tells whether they are lost"
)
NO_TOTALS: Final[Record] = {
    "session": {"blocks": 0, "voxels": 0},
    "recent": {"seconds": RECENT_S, "blocks": 0, "voxels": 0},
}
"""What earlier releases did not deliver."""


Queue = Callable[[Path], tuple[QueueStatus, ...] | None]
"""Counts the jobs of a run folder in the batch system's queue.

It gives None where there is no batch system, and raises InputError if that does not say.
"""


def load_status(
    run_dir: Path, ledger: "Ledger | None" = None, queue: Queue | None = None
) -> RunStatus:
    """Say how far a run is; see `Monitor`.

    With a ledger that knows it, the run folder need not be on this machine.

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
    console : Console, optional
        Where to; without a terminal only the last picture is printed.

    Raises
    ------
    InputError
        As in `load_status`.
    """
    from rich.live import Live

    from agq.pipeline.status.text import render
    from agq.terminal import console as plain_console

    monitor = Monitor(run_dir, ledger, queue=queue)
    status = monitor.poll()
    over = 0
    with Live(
        render(status), console=console or plain_console(wrap=True), auto_refresh=False
    ) as live:
        # Twice: between two stages, and seen from another machine, nothing runs for a moment.
        while over < 2:
            goes_on = status.state in ("new", "waiting", "running") or status.may_go_on
            over = 0 if goes_on else over + 1
            live.update(render(status), refresh=True)
            if over < 2:
                time.sleep(interval_s)
                status = monitor.poll()
    return status


class Monitor:
    """Follows one run; keeps what it has read of the journals between polls.

    Parameters
    ----------
    ledger : Ledger, optional
        Ask it first.
    lazy : bool
        Read no more of a journal than a status needs; off for callers that ask for all of it.
    queue : callable, optional
        Asked for the jobs of a submitted run.
    ledger_id : str, optional
        Id of a run that only the ledger is asked for: nothing in `run_dir` is read.
    """

    def __init__(
        self,
        run_dir: Path,
        ledger: "Ledger | None" = None,
        *,
        lazy: bool = True,
        queue: Queue | None = None,
        ledger_id: str | None = None,
    ) -> None:
        self._run = RunFolder(Path(run_dir))
        self._ledger_id = ledger_id
        self._ledger = ledger
        self._lazy = lazy
        self._queue = queue
        self._journals: dict[str, Journal] = {}
        self._documents: dict[tuple[str, str], LedgerStage] = {}
        self._progress: dict[str, StageProgress] = {}
        self._ended: dict[str, tuple[Record, StageStatus]] = {}
        self._batch = Batch()

    def poll(self) -> RunStatus:
        """Return the present state.

        Raises
        ------
        InputError
            If the folder holds no run and the ledger does not know it either.
        """
        queue, unknown = None, None
        self._batch = Batch()
        if self._ledger_id is None and (self._run.path / "slurm").is_dir():
            try:
                queue = None if self._queue is None else self._queue(self._run.path)
            except InputError as error:
                unknown = str(error)
            if queue is not None or (
                self._run.exists() and self._run.has_own_id(self._run.record())
            ):
                self._batch = Batch(self._run.submitted(), queue)
        status = self._poll()
        asked = self._queue is not None or self._ledger_id is not None
        if asked and queue is None and unknown is None and self._waits(status):
            notes = filter(None, [status.note, _NOT_ASKED])
            status = status.model_copy(update={"note": "; ".join(notes)})
        sent = None if self._ledger_id is not None else read_notices(self._run.path)
        notices = () if sent is None else tuple(sent.notices)
        update = {"queue": queue, "queue_error": unknown, "notices": notices}
        return status.model_copy(update=update)

    def _waits(self, status: RunStatus) -> bool:
        """Tell whether nothing runs, and a stage waits that was submitted: only then it says so."""
        waits = [s.name for s in status.stages if s.state == "waiting" and s.name in LEADERS]
        return bool(waits) and status.state in ("new", "waiting")

    def progress(self, stage: str) -> StageProgress | None:
        """Return the progress of a stage as last polled; None for a stage without a journal."""
        return self._progress.get(stage)

    def _poll(self) -> RunStatus:
        here = self._ledger_id is None and self._run.exists()
        note = None
        if self._ledger is not None:
            from pymongo.errors import PyMongoError

            from agq.blockwise.journal.records import BadLineError

            try:
                status = self._from_ledger(self._run.record() if here else None)
                if status is not None:
                    return status
                note = "the ledger is behind or does not know this run: read from the journal"
            except (InputError, BadLineError) as error:
                if not here:
                    raise InputError(str(error)) from None
                note = f"{error}: read from the journal"
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
        begun = [s for s in _JOURNALS if next(self._run.journal(s).glob("*.jsonl"), None)]
        alive = coordinator_alive(self._run.path)
        entries = stage_entries(record, begun, self._batch, alive)
        self._progress = {
            stage: self.journal(stage)
            for stage in _JOURNALS
            if stage in begun and not self._is_over(stage, entries[stage])
        }
        status = self._status(record, self._run.path, entries, "journal", note, alive)
        for stage in status.stages:
            name, entry = stage.name, entries[stage.name]
            if name != "predict" and status.state != "running" and entry.get("state") == "done":
                # A table of 10^6 blocks is 77 MB: what cannot change any more is let go.
                self._journals.pop(name, None)
                self._progress.pop(name, None)
                self._ended[name] = (entry, stage)
        return status

    def _is_over(self, stage: str, entry: Record) -> bool:
        """Tell whether the status of a stage is final."""
        return stage in self._ended and self._ended[stage][0] == entry

    def journal(self, stage: str) -> "Journal":
        """Return the journal of a stage, read up to now."""
        from agq.blockwise.journal.reader import Journal

        journal = self._journals.get(stage)
        if journal is None or journal.replaced():
            journal = self._journals[stage] = Journal(self._run.journal(stage), lazy=self._lazy)
        else:
            journal.catch_up()
        return journal

    # From the ledger

    def _from_ledger(self, here: Record | None) -> RunStatus | None:
        """Status from the ledger; None if the journal on this machine says more."""
        assert self._ledger is not None
        if here is not None:
            # The ledger knows a copy only once it has an id of its own.
            own = self._run.has_own_id(here)
            document = self._ledger.find_run(here["id"]) if own else None
        elif self._ledger_id is not None:
            document = self._ledger.find_run(self._ledger_id)
        else:
            document = self._ledger.runs.find_one(
                {"$or": [{"run_dir": str(self._run.path)}, {"_id": self._run.path.name}]},
                sort=[("created", -1)],
            )
        if document is None and here is None:
            raise InputError(f"{self._run.path} is not a run folder, and unknown to the ledger")
        if document is None:
            return None
        document = check_document(document)
        if here is not None and self._behind(document):
            return None
        # What the coordinator says of its stages is in run.json sooner than in the ledger.
        record = document | {"id": document["_id"]} | ({"stages": here["stages"]} if here else {})
        # Here it may be mounted or moved elsewhere than where its coordinator works.
        path = self._run.path if here else Path(document.get("run_dir", self._run.path))
        stages = document.get("stages", {}).items()
        sums_of = {name: stage.get("totals", {}) for name, stage in stages}
        totals = {name: NO_TOTALS | s for name, s in sums_of.items() if s.get("bytes")}
        self._progress = {
            name: self._documents_of(document["_id"], name, sums) for name, sums in totals.items()
        }
        alive = None if here is None else coordinator_alive(self._run.path)
        entries = stage_entries(record, totals, self._batch, alive)
        status = self._status(record, path, entries, "ledger", None, alive)
        times = [
            document.get("updated", 0.0),
            *(sums.get("updated", 0) for sums in totals.values()),
        ]
        return status.model_copy(update={"updated": max(times)})

    def _documents_of(self, run: str, stage: str, totals: Record) -> StageProgress:
        from agq.blockwise.ledger.progress import LedgerStage

        assert self._ledger is not None
        documents = self._documents.get((run, stage))
        if documents is None:
            documents = self._documents[run, stage] = LedgerStage(self._ledger, run, stage)
        documents.refresh(totals)
        return documents

    def _behind(self, document: Record) -> bool:
        for stage in _JOURNALS:
            size = sum(p.stat().st_size for p in self._run.journal(stage).glob("*.jsonl"))
            totals = document.get("stages", {}).get(stage, {}).get("totals", {})
            old = time.time() - totals.get("updated", 0.0) > _BEHIND_S
            if size > totals.get("bytes", 0) and old:
                return True
        return False

    # From both

    def _status(
        self,
        record: Record,
        path: Path,
        entries: dict[str, Record],
        source: Literal["ledger", "journal"],
        note: str | None,
        alive: bool | None,
    ) -> RunStatus:
        now = time.time()
        state = run_state_of(entries.values(), alive)
        stages = [
            self._ended[name][1]
            if self._is_over(name, entry)
            else placed(
                stage_status(name, entry, self._progress.get(name), state, path, now), record
            )
            for name, entry in entries.items()
        ]
        times = [entry.get(name) for entry in entries.values() for name in ("started", "finished")]
        for progress in self._progress.values():
            times += [worker.last for worker in progress.workers.values()]
        return RunStatus(
            id=str(record.get("id", "")),
            name=str(record.get("name", path.name)),
            run_dir=str(path),
            state=state,
            source=source,
            note=note,
            created=record.get("created"),
            updated=now,
            stages=tuple(stages),
            user=_user(record),
            heard=max(filter(None, times), default=None),
            forecast=compare(entries, stages, self._progress.get("predict"), now),
        )


def _user(record: Record) -> str | None:
    """Return who gave the last command, as the record of a run or a document of the ledger says."""
    commands = record.get("commands") or [record]
    return commands[-1].get("user")
