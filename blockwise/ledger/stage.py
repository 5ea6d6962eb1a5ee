"""Delivers the journal of one stage to the ledger, batch by batch; `ledger_feed` drives it."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final

from pymongo import UpdateOne

from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BadLineError, BlockState, Event, Order
from agq.blockwise.journal.tail import JournalTail, WorkerState
from agq.blockwise.ledger.database import Ledger
from agq.blockwise.ledger.settings import mask_secrets
from agq.blockwise.ledger.updates import (
    Attempt,
    Document,
    begin_update,
    block_update,
    give_back_update,
    worker_update,
)

_BATCH_BYTES: Final = 256 << 10
_BULK: Final = 500
#: A worker with a deep prefetch queue may have begun many blocks.
_MAX_CURRENT: Final = 16
_WORKER_FIELDS: Final = ("last", "done", "skipped", "failed", "voxels", "exit")

_Make = Callable[..., UpdateOne]


class StageFeed:
    """Delivers the journal of one stage.

    Parameters
    ----------
    folder : Path
        Journal folder; it need not exist yet.
    full : bool
        Deliver everything again, whatever the database says it has.

    Attributes
    ----------
    delivered : int
        Journal lines delivered.
    refused : int
        Documents that the database refused for good.
    sent : dict of str to int
        Bytes delivered of each journal file.

    Raises
    ------
    PyMongoError
        If the database cannot be asked; likewise from all methods, which may be called again.
    """

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
        read = self._journal.tail.positions
        if delivered.keys() - read.keys():
            # The stage was started over: what the database has is of another attempt.
            self._ledger.remove_stage(self._run, self.name)
            delivered = {}
        ended = {f for f in self._journal.tail.ended if delivered.get(f) == read.get(f)}
        self._tail = JournalTail(self.folder, delivered, ended)
        self._batch: list[Event] = []
        # When a worker was heard of last whose blocks have been given back.
        self._given_back: dict[str, float] = {}
        self._totals_key: tuple[int, int] | None = None
        self._totals_time = 0.0
        self.sent = delivered

    def deliver(self) -> bool:
        """Send one batch of events; after an error, the same batch is sent again the next time.

        Returns
        -------
        bool
            Whether there was anything to send, so that there may be more.
        """
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
        newest: dict[int, tuple[Order, _Make]] = {}
        failed: defaultdict[int, list[Attempt]] = defaultdict(list)
        for event in self._batch:
            if event.kind not in ("begin", "block"):
                continue
            try:
                block, order, make = self._update_of(event, failed)
            except (BadLineError, KeyError, TypeError, ValueError):
                continue
            if block not in newest or newest[block][0] < order:
                newest[block] = order, make
        updates = [make(earlier=failed.get(block, ())) for block, (_, make) in newest.items()]
        for start in range(0, len(updates), _BULK):
            self.refused += self._ledger.write("blocks", updates[start : start + _BULK])

    def _update_of(
        self, event: Event, failed: defaultdict[int, list[Attempt]]
    ) -> tuple[int, Order, _Make]:
        """Return block, order and update of an event; note a failed attempt."""
        worker = self._journal.workers.get(event.token)
        info = worker.info if worker else None
        where = self._run, self.name
        if event.kind == "begin":
            block, attempt = int(event.data["block"]), int(event.data.get("attempt", 1))
            revision = int(event.data.get("revision", 0))
            begun = Order(revision, BlockState.OPEN, event.time, attempt, event.token)
            return block, begun, partial(begin_update, *where, block, begun)
        record = event.record
        if record.state == "failed":
            failed[record.block].append((record, info))
        return record.block, record.order, partial(block_update, *where, record, info)

    def _send_workers(self) -> None:
        files = {event.file: event.token for event in self._batch}
        updates = [
            worker_update(
                self._run,
                self.name,
                file,
                _worker_fields(self._journal.workers.get(token)),
                read=self._journal.tail.positions.get(file, 0),
                delivered=self._tail.positions[file],
            )
            for file, token in files.items()
        ]
        self.refused += self._ledger.write("workers", updates)

    def give_back(self, *, over: bool = False) -> None:
        """Mark blocks as queued that a worker had in hand when it ended or fell silent.

        Parameters
        ----------
        over : bool
            Nobody works on the stage any more: so do those of all other workers.
        """
        now = time.time()
        updates = []
        for token, worker in self._journal.workers.items():
            ended = over or worker.exit is not None or worker.is_silent(now)
            if ended and self._given_back.get(token) != worker.last:
                updates += [
                    give_back_update(self._run, self.name, block, token)
                    for block in (*worker.left, *worker.current)
                ]
                self._given_back[token] = worker.last
        for start in range(0, len(updates), _BULK):
            self._ledger.write("blocks", updates[start : start + _BULK])

    def send_totals(self, since: float | None, *, at_once: bool = False) -> None:
        """Send the totals of the stage if they have changed; at most now and then, or at once.

        They count from `since`, when the stage was started last, in seconds since the epoch.
        """
        size = sum(self._journal.tail.positions.values())
        key = self._journal.version, size
        started = time.monotonic()
        if key == self._totals_key or (started < self._totals_time and not at_once):
            return
        now = time.time()
        totals = self._journal.progress(since, now) | {"updated": now}
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
    fields = asdict(info) | {name: getattr(worker, name) for name in _WORKER_FIELDS}
    fields["voxels_per_s"] = worker.voxels / max(worker.last - info.started, 1e-3)
    fields["current"] = [
        {"block": block, "attempt": attempt, "begun": begun}
        for begun, block, attempt in current[-_MAX_CURRENT:]
    ]
    return mask_secrets(fields) | {"token": worker.token}


def count_lines(folder: Path, sent: Mapping[str, int]) -> int:
    """Count the whole lines of a journal folder after the delivered positions, bytes by file."""
    lines = 0
    for path in folder.glob("*.jsonl") if folder.is_dir() else ():
        with path.open("rb") as file:
            file.seek(sent.get(path.name, 0))
            while piece := file.read(1 << 20):
                lines += piece.count(b"\n")
    return lines
