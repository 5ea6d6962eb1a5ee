"""A thread in the coordinator that brings the ledger to what the journal says.

It reads the journal files as any watcher does, so that blocks never wait for it. What it has not
delivered stays in the files: an outage of the database costs no memory, only a longer tail to read
afterwards. How far each file has been delivered is kept in the database itself, so that a new
coordinator goes on where the last one stopped.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from bson.errors import InvalidDocument
from pymongo import UpdateOne

from blockwise.journal_read import Journal
from blockwise.journal_records import BadLineError, Event
from blockwise.journal_tail import JournalTail, WorkerState
from blockwise.ledger import Ledger, mask_secrets
from blockwise.ledger_updates import (
    RANK,
    Attempt,
    Document,
    begin_update,
    block_update,
    worker_update,
)

logger = logging.getLogger(__name__)

_BATCH_BYTES: Final = 256 << 10
_BULK: Final = 500
_MAX_WAIT_S: Final = 30.0
_RECENT_S: Final = 60.0
#: A worker with a deep prefetch queue may have begun many blocks.
_MAX_CURRENT: Final = 16


@dataclass(frozen=True)
class FeedReport:
    """What the feeder has done.

    Attributes
    ----------
    delivered : int
        Journal lines delivered.
    undelivered : int
        Journal lines that are not in the database; the next run, or a sync, delivers them.
    refused : int
        Documents that the database refused for good.
    error : str or None
        Last error (without the password) if anything is undelivered.
    """

    delivered: int
    undelivered: int
    refused: int
    error: str | None

    @property
    def complete(self) -> bool:
        """Whether the ledger says all that the journal says."""
        return not (self.undelivered or self.refused or self.error)


class LedgerFeeder:
    """Delivers the journals of one run to the ledger, in the background.

    Parameters
    ----------
    ledger : Ledger
        Where to; it may be away at any time. The feeder does not close it.
    run_id : str
        The run.
    folders : mapping of str to Path
        Journal folder of each stage; they need not exist yet.
    run_info : dict, optional
        Fields of the run's document (config, versions, host, user); secrets are masked here.
    full : bool
        Deliver everything again, whatever the database says it has.
    """

    def __init__(
        self,
        ledger: Ledger,
        run_id: str,
        folders: Mapping[str, Path],
        run_info: Mapping[str, Any] | None = None,
        *,
        full: bool = False,
    ) -> None:
        self._ledger = ledger
        self._run = run_id
        self._folders = {stage: Path(folder) for stage, folder in folders.items()}
        self._full = full
        self._fields: Document = dict(mask_secrets(dict(run_info or {})))
        self._user: str | None = self._fields.get("user")
        self._since: dict[str, float] = {}
        self._lock = threading.Lock()
        self._stages: list[_StageFeed] | None = None
        self._wake = threading.Event()
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._loop, name="ledger-feeder", daemon=True)
        self._error: str | None = None
        self._failures = 0
        self._refused = 0

    def start(self) -> None:
        """Start delivering."""
        self._thread.start()

    def update_run(self, **fields: Any) -> None:
        """Set fields of the run's document (``state``, ``finished``, ...), soon."""
        with self._lock:
            self._fields |= mask_secrets(fields)
        self._wake.set()

    def update_stage(self, stage: str, **fields: Any) -> None:
        """Set fields of a stage in the run's document (``state``, ``blocks_total``), soon."""
        with self._lock:
            if "started" in fields:
                self._since[stage] = float(fields["started"])
            self._fields |= {f"stages.{stage}.{k}": v for k, v in mask_secrets(fields).items()}
        self._wake.set()

    def stop(self, timeout: float = 10.0) -> FeedReport:
        """Deliver what is left and end.

        Parameters
        ----------
        timeout : float
            Seconds to try at most; then the rest stays in the journal.

        Returns
        -------
        FeedReport
            What has been delivered and what has not.
        """
        self._deadline = time.monotonic() + timeout
        self._wake.set()
        if self._thread.is_alive():
            # A request under way may outlast the deadline; the thread is a daemon and is left.
            self._thread.join(timeout + 0.5)
        return self._report()

    def _report(self) -> FeedReport:
        stages = self._stages
        if stages is None:
            undelivered = sum(_count_lines(folder, {}) for folder in self._folders.values())
            return FeedReport(0, undelivered, 0, self._error or "the database never answered")
        undelivered = sum(_count_lines(s.folder, s.sent) for s in stages)
        with self._lock:
            waiting = bool(self._fields)
        error = None
        if undelivered or waiting or self._thread.is_alive():
            error = self._error or "no time left to deliver the rest"
        return FeedReport(
            delivered=sum(s.delivered for s in stages),
            undelivered=undelivered,
            refused=self._refused + sum(s.refused for s in stages),
            error=error,
        )

    def _loop(self) -> None:
        while True:
            stopping = self._deadline is not None
            wait = self.ledger_interval
            try:
                more = self._cycle(final=stopping)
                if self._failures:
                    logger.info("ledger: database is back, delivering again")
                self._failures = 0
                self._error = None
                if more:
                    wait = 0.0
                elif stopping:
                    return
            # Whatever happens here must not reach the run, and must not end the deliveries.
            except Exception as error:
                self._failures += 1
                self._error = self._ledger.hide(f"{type(error).__name__}: {error}")[:300]
                if self._failures == 1:
                    logger.warning("%s; trying again later", self._ledger.error(error))
                wait = min(_MAX_WAIT_S, self.ledger_interval * 2 ** min(self._failures, 10))
                if stopping:
                    wait = min(wait, 0.5)
            if self._deadline is not None and time.monotonic() > self._deadline:
                return
            if stopping:
                time.sleep(wait)
            elif wait:
                self._wake.wait(wait)
                self._wake.clear()

    @property
    def ledger_interval(self) -> float:
        """Seconds between two deliveries."""
        return self._ledger.settings.interval_s

    def _cycle(self, *, final: bool) -> bool:
        """Deliver one batch per stage; return whether there may be more."""
        self._ledger.prepare()
        self._send_fields()
        self._remove_old()
        if self._stages is None:
            self._stages = [
                _StageFeed(self._ledger, self._run, stage, folder, full=self._full)
                for stage, folder in self._folders.items()
            ]
        more = False
        for stage in self._stages:
            more |= stage.deliver()
        for stage in self._stages:
            stage.send_totals(self._since.get(stage.name), at_once=final and not more)
        return more

    def _remove_old(self) -> None:
        """Delete this user's old runs, once."""
        days, user = self._ledger.settings.keep_days, self._user
        if days is None or user is None:
            return
        if removed := self._ledger.remove_old(user, days):
            logger.info("ledger: removed %d runs older than %g days", removed, days)
        self._user = None

    def _send_fields(self) -> None:
        with self._lock:
            fields = dict(self._fields)
        if not fields and self._stages is not None:
            return
        now = {"updated": time.time()} if self._stages is not None else {"run": self._run}
        try:
            self._ledger.set_run(self._run, fields | now)
        except InvalidDocument as error:
            # Too large, usually. It would be refused for ever, and hold up everything behind it.
            self._refused += 1
            logger.error("ledger: fields %s left out: %s", ", ".join(fields), str(error)[:200])
        with self._lock:
            # A field set again meanwhile stays for the next time.
            for name, value in fields.items():
                if self._fields.get(name) is value:
                    del self._fields[name]


_Order = tuple[int, float, int, str]
_Make = Callable[..., UpdateOne]


class _StageFeed:
    """Delivers the journal of one stage."""

    def __init__(self, ledger: Ledger, run: str, stage: str, folder: Path, *, full: bool) -> None:
        self.folder = folder
        self.delivered = 0
        self.refused = 0
        self._ledger = ledger
        self._run = run
        self.name = stage
        self._open({} if full else ledger.delivered(run, stage))

    def _open(self, delivered: dict[str, int]) -> None:
        """Start reading; ``delivered`` says how far the database has each file."""
        self._journal = Journal(self.folder)
        read = self._journal.positions
        if delivered.keys() - read.keys():
            # The stage was started over: what the database has is of another attempt.
            self._ledger.remove_stage(self._run, self.name)
            delivered = {}
        ended = {f for f in self._journal.ended if delivered.get(f) == read.get(f)}
        self._tail = JournalTail(self.folder, delivered, ended)
        self._batch: list[Event] = []
        self._totals_key: tuple[int, int] | None = None
        self._totals_time = 0.0
        self.sent = delivered

    def deliver(self) -> bool:
        """Send one batch of events; on an error the same batch is sent again the next time."""
        if self._journal.replaced():
            self._ledger.remove_stage(self._run, self.name)
            self._open({})
        if not self._batch:
            self._batch = self._tail.poll(_BATCH_BYTES)
            # After the tail, so that the journal knows at least as much.
            self._journal.catch_up()
        if self._batch:
            self._send_blocks()
            self._send_workers()
            self.delivered += len(self._batch)
            self._batch = []
            self.sent = dict(self._tail.positions)
            return True
        return False

    def _send_blocks(self) -> None:
        newest: dict[int, tuple[_Order, _Make]] = {}
        failed: defaultdict[int, list[Attempt]] = defaultdict(list)
        for event in self._batch:
            try:
                block, order, make = self._update_of(event)
                if event.kind == "block" and event.data["state"] == "failed":
                    worker = self._journal.workers.get(event.token)
                    failed[block].append((event.record, worker.info if worker else None))
            except (BadLineError, KeyError, TypeError, ValueError):
                continue
            if block >= 0 and (block not in newest or newest[block][0] < order):
                newest[block] = order, make
        updates = [make(earlier=failed.get(block, ())) for block, (_, make) in newest.items()]
        for start in range(0, len(updates), _BULK):
            self.refused += self._ledger.write("blocks", updates[start : start + _BULK])

    def _update_of(self, event: Event) -> tuple[int, _Order, _Make]:
        worker = self._journal.workers.get(event.token)
        info = worker.info if worker else None
        where = self._run, self.name
        if event.kind == "block":
            record = event.record
            order = RANK[record.state], record.finished, record.attempt, record.token
            return record.block, order, partial(block_update, *where, record, info)
        if event.kind == "begin":
            block, attempt = int(event.data["block"]), int(event.data.get("attempt", 1))
            order = RANK["running"], event.time, attempt, event.token
            who = event.token, info
            return block, order, partial(begin_update, *where, block, attempt, event.time, *who)
        return -1, (0, 0.0, 0, ""), partial(UpdateOne, {}, {})

    def _send_workers(self) -> None:
        files = {event.file: event.token for event in self._batch}
        updates = [
            worker_update(
                self._run,
                self.name,
                file,
                _worker_fields(self._journal.workers.get(token)),
                read=self._journal.positions.get(file, 0),
                delivered=self._tail.positions[file],
            )
            for file, token in files.items()
        ]
        self.refused += self._ledger.write("workers", updates)

    def send_totals(self, since: float | None, *, at_once: bool = False) -> None:
        """Send the totals of the stage, begun at ``since``, if they have changed."""
        size = sum(self._journal.positions.values())
        key = self._journal.version, size
        started = time.monotonic()
        if key == self._totals_key or (started < self._totals_time and not at_once):
            return
        journal = self._journal
        now = time.time()
        sums = journal.totals()
        session = journal.recent(since or sums["started"])
        blocks, voxels = journal.recent(now - _RECENT_S)
        totals = {
            **journal.counts(),
            **sums,
            "running": len(journal.running()),
            "duplicates": len(journal.duplicates),
            "conflicts": len(journal.conflicts),
            "session": {"blocks": session[0], "voxels": session[1]},
            "recent": {"seconds": _RECENT_S, "blocks": blocks, "voxels": voxels},
            "updated": now,
        }
        self._ledger.set_totals(self._run, self.name, size, totals)
        self._totals_key = key
        # At 10^7 blocks adding up takes a good part of a second: do not spend all time on it.
        spent = time.monotonic() - started
        self._totals_time = started + max(1.0, 20 * spent)


def _worker_fields(worker: WorkerState | None) -> Document:
    if worker is None:
        return {}
    info = worker.info
    current = sorted((begun, block, attempt) for block, (attempt, begun) in worker.current.items())
    return mask_secrets(
        {
            "name": info.name,
            "host": info.host,
            "pid": info.pid,
            "device": info.device,
            "job": info.job,
            "gpu": info.gpu,
            "gpu_bytes": info.gpu_bytes,
            "voxels_per_s": worker.voxels / max(worker.last - info.started, 1e-3),
            "started": info.started,
            "last": worker.last,
            "done": worker.done,
            "skipped": worker.skipped,
            "failed": worker.failed,
            "voxels": worker.voxels,
            "exit": worker.exit,
            "current": [
                {"block": block, "attempt": attempt, "begun": begun}
                for begun, block, attempt in current[-_MAX_CURRENT:]
            ],
        }
    ) | {"token": worker.token}


def _count_lines(folder: Path, sent: Mapping[str, int]) -> int:
    """Count the whole lines after the delivered positions."""
    lines = 0
    for path in folder.glob("*.jsonl") if folder.is_dir() else ():
        with path.open("rb") as file:
            file.seek(sent.get(path.name, 0))
            while piece := file.read(1 << 20):
                lines += piece.count(b"\n")
    return lines
