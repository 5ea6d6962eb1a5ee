"""A thread in the coordinator that brings the ledger to what the journal says.

It reads the journal files as any watcher does, so that blocks never wait for it. What it has not
delivered stays in the files: an outage of the database costs no memory, only a longer tail to read
afterwards. How far each file has been delivered is kept in the database itself, so that a new
coordinator goes on where the last one stopped. Every delivery also sets when the run was heard of
last; if that finds the run gone, all of it is delivered again.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bson.errors import InvalidDocument

from agq.blockwise.ledger.database import Ledger
from agq.blockwise.ledger.settings import mask_secrets
from agq.blockwise.ledger.stage import StageFeed, count_lines
from agq.blockwise.ledger.updates import Document
from agq.blockwise.threads import start_aside

logger = logging.getLogger(__name__)

_MAX_WAIT_S: Final = 30.0


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
    folders : mapping of str to Path
        Journal folder of each stage; they need not exist yet.
    run_info : dict, optional
        Fields of the run's document (config, created, versions, host, user); secrets are masked
        here.
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
        self._fields: Document = {"run": run_id, **mask_secrets(dict(run_info or {}))}
        self._known = dict(self._fields)
        self._user: str | None = self._fields.get("user")
        self._since: dict[str, float] = {}
        self._lock = threading.Lock()
        self._stages: list[StageFeed] | None = None
        self._wake = threading.Event()
        self._deadline: float | None = None
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._failures = 0
        self._refused = 0
        self._delivered = 0
        self._heard = False

    def start(self) -> None:
        """Start delivering."""
        # Its loop outlives any error; without it blocks go on, and the report says what is left.
        self._thread = start_aside("ledger-feeder", self._loop)

    def update_stage(self, stage: str, **fields: Any) -> None:
        """Set fields of a stage in the run's document (``state``, ``blocks_total``), soon."""
        with self._lock:
            if "started" in fields:
                self._since[stage] = float(fields["started"])
            entries = {f"stages.{stage}.{k}": v for k, v in mask_secrets(fields).items()}
            self._fields |= entries
            self._known |= entries
        self._wake.set()

    def stop(self, timeout: float = 10.0) -> FeedReport:
        """Deliver what is left and end.

        Parameters
        ----------
        timeout : float
            Seconds to try at most; then the rest stays in the journal.
        """
        self._deadline = time.monotonic() + timeout
        self._wake.set()
        if self._thread is not None and self._thread.is_alive():
            # A request under way may outlast the deadline; the thread is a daemon and is left.
            self._thread.join(timeout + 0.5)
        return self._report()

    def _report(self) -> FeedReport:
        stages = self._stages
        if stages is None:
            undelivered = sum(count_lines(folder, {}) for folder in self._folders.values())
            return FeedReport(0, undelivered, 0, self._error or "the database never answered")
        undelivered = sum(count_lines(s.folder, s.sent) for s in stages)
        with self._lock:
            waiting = bool(self._fields)
        error = None
        if undelivered or waiting or (self._thread is not None and self._thread.is_alive()):
            error = self._error or "no time left to deliver the rest"
        return FeedReport(
            delivered=self._delivered + sum(s.delivered for s in stages),
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
                StageFeed(self._ledger, self._run, stage, folder, full=self._full)
                for stage, folder in self._folders.items()
            ]
        more = False
        for stage in self._stages:
            more |= stage.deliver()
        self._heard |= more
        for stage in self._stages:
            if not more:
                stage.give_back(over=final)
            stage.send_totals(self._since.get(stage.name), at_once=final and not more)
        return more

    def _remove_old(self) -> None:
        """Delete this user's old runs, once."""
        days, user = self._ledger.settings.keep_days, self._user
        if days is None or user is None:
            return
        if removed := self._ledger.remove_old(user, days, keep=self._run):
            logger.info("ledger: removed %d runs that rest for more than %g days", removed, days)
        self._user = None

    def _send_fields(self) -> None:
        with self._lock:
            fields = dict(self._fields)
        first = self._stages is None
        if not (fields or first or self._heard):
            return
        new = self._set_run(fields)
        with self._lock:
            # A field set again meanwhile stays for the next time.
            for name, value in fields.items():
                if self._fields.get(name) is value:
                    del self._fields[name]
        self._heard = False
        if new and not first:
            self._start_over()

    def _set_run(self, fields: Document) -> bool:
        try:
            return self._ledger.set_run(self._run, fields | {"updated": time.time()})
        except InvalidDocument as error:
            # Too large, usually. It would be refused for ever, and hold up everything behind it.
            self._refused += 1
            logger.error("ledger: fields %s left out: %s", ", ".join(fields), str(error)[:200])
            with self._lock:
                for name in fields:
                    self._known.pop(name, None)
            return self._ledger.set_run(self._run, {"run": self._run, "updated": time.time()})

    def _start_over(self) -> None:
        """Deliver all of a run again that somebody has deleted meanwhile."""
        logger.warning("ledger: the run is not in the database any more; delivering all of it")
        self._ledger.prepare(again=True)
        with self._lock:
            self._fields = dict(self._known)
        self._full = True
        for stage in self._stages or ():
            self._delivered += stage.delivered
            self._refused += stage.refused
        self._stages = None
