"""Tell of a run while a command or a job works on it, each event once in an attempt.

An attempt is one command, or one submission with all of its jobs and their requeues. What was sent
is recorded in the run folder, so that a job that starts again does not send it again. Where a
process is killed between sending and recording, the next one sends again, with the same key.
"""

import logging
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from agq.blockwise.storage import locks
from agq.blockwise.storage.files import make_folder, write_atomic
from agq.blockwise.threads import start_aside
from agq.errors import InputError, RunStoppedError, machine_fault
from agq.pipeline.notify.deliver import deliver, ways
from agq.pipeline.notify.kept import begin_attempt, keep_address
from agq.pipeline.notify.message import compose
from agq.pipeline.notify.settings import Event, NotifySettings
from agq.pipeline.status.notices import (
    Notice,
    Notices,
    folder,
    notices_path,
    read_notices,
)

_logger = logging.getLogger(__name__)


class Notifier:
    """Tells of one run; in a ``with`` block it also tells when the run stands still.

    Nothing here raises: what goes wrong is one line in the log and in the status of the run.

    Parameters
    ----------
    run_dir
        Run folder.
    settings
        Whom to tell; None: nobody.
    """

    def __init__(self, run_dir: Path, settings: NotifySettings | None) -> None:
        self._run_dir = run_dir
        self._settings = settings
        self._what: tuple[Any, ...] = ()
        self._since = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.failure: str | None = None
        """Why the run has failed though nothing was raised."""

    def __enter__(self) -> Self:
        if self._settings is not None and "stall" in self._settings.events:
            self._since = time.monotonic()
            self._thread = start_aside("notify", self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None and self._settings is not None:
            self._thread.join(self._settings.timeout_s)

    def moved(self, *what: Any) -> None:
        """Take how far the run is; when that stays the same, the run stands still."""
        if what != self._what:
            self._what, self._since = what, time.monotonic()

    def _watch(self) -> None:
        assert self._settings is not None
        limit = 60 * self._settings.stall_minutes
        while not self._over.wait(max(0.0, self._since + limit - time.monotonic())):
            if time.monotonic() >= self._since + limit:
                minutes = self._settings.stall_minutes
                self.tell("stall", f"no block has been done for {minutes:g} minutes")
                return

    def tell(self, event: Event, reason: str | None = None) -> list[Notice]:
        """Tell of an event by every way that has not told of it in this attempt.

        Returns
        -------
        notices
            What was sent now, or could not be.
        """
        if self._settings is None or event not in self._settings.events:
            return []
        try:
            return list(self._tell(self._settings, event, reason))
        except Exception as error:
            # Whatever it is: a run that computes for weeks does not end because of a message.
            _logger.warning("notify: %s: %s: %s", event, type(error).__name__, error)
            return []

    def _tell(self, settings: NotifySettings, event: Event, reason: str | None) -> Iterator[Notice]:
        with _locked(self._run_dir):
            sent = read_notices(self._run_dir)
            if sent is None:
                sent = Notices(attempt=secrets.token_hex(8))
                self._save(sent)
            done = {n.way for n in sent.notices if n.event == event and n.problem is None}
            left = [way for way in ways(settings) if way not in done]
            message = compose(event, self._run_dir, sent.attempt, reason) if left else None
            for way in left:
                assert message is not None
                problem = deliver(settings, way, message)
                notice = Notice(event=event, way=way, time=time.time(), problem=problem)
                if problem is not None:
                    _logger.warning("notify: %s not told by the %s: %s", event, way, problem)
                others = [n for n in sent.notices if (n.event, n.way) != (event, way)]
                sent.notices = [*others, notice]
                self._save(sent)
                yield notice

    def _save(self, sent: Notices) -> None:
        text = sent.model_dump_json(indent=1)
        # A full disk is what some messages are about. A folder that was moved is not made anew.
        with suppress(OSError):
            if self._run_dir.is_dir():
                write_atomic(notices_path(self._run_dir), text.encode(), mode=0o644)


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Let one process tell at a time, if the run folder can be written."""
    with ExitStack() as stack:
        with suppress(OSError):
            if run_dir.is_dir():
                make_folder(folder(run_dir), own=True)
            stack.enter_context(locks.hold(folder(run_dir) / ".lock", wait=True))
        yield


def reason_of(error: BaseException) -> str:
    """Say in a line why an error ends a run."""
    if isinstance(error, InputError | RunStoppedError | SystemExit):
        return str(error)
    fault = machine_fault(error) if isinstance(error, OSError) else None
    return fault or f"{type(error).__name__}: {error}"


@contextmanager
def notifying(run_dir: Path, settings: NotifySettings | None) -> Iterator[Notifier]:
    """Tell of the end, the failure or the standstill of what the block does, a new attempt.

    Ctrl-C is none of these: who pressed it knows.
    """
    begin_attempt(run_dir)
    keep_address(run_dir, settings)
    with Notifier(run_dir, settings) as notifier:
        try:
            yield notifier
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            notifier.tell("failure", reason_of(error))
            raise
        notifier.tell("failure" if notifier.failure else "end", notifier.failure)
