"""A prediction worker: loads the predictor once, then computes blocks until the run has ended.

Run as ``python -m agq.blockwise.predict.worker RUN_DIR``; it may be started at any time, on any
machine that sees the run folder, by the coordinator or by a batch system.
"""

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from agq.blockwise.journal.records import this_worker
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.predict.block_threads import BlockFiles, BlockLoop
from agq.blockwise.predict.local_processes import (
    BEAT_S,
    DRAINED,
    EXIT_DRAINED,
    EXIT_START_FAILED,
    EXIT_STOP_RUN,
    OWN_END,
    Terminated,
    die_with_parent,
)
from agq.blockwise.predict.paths import journal_folder
from agq.blockwise.predict.predictor import gpu_of, load_predictor
from agq.blockwise.predict.spec import PredictSpec, Session
from agq.blockwise.storage.files import FATAL_ERRNOS
from agq.blockwise.storage.logs import cap_output
from agq.blockwise.threads import start_vital
from agq.credentials import hidden, hide, log_to_stderr
from agq.errors import InputError

_POLL_S = 0.2
_AGAIN_S = 10.0

_logger = logging.getLogger(__name__)


class CoordinatorPipe:
    """What a worker tells the process that started it: the coordinator, or that of a job.

    Parameters
    ----------
    descriptor
        The pipe; None for a worker that something else started.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def tell(self, **message: Any) -> None:
        """Send the coordinator one message."""
        if self._descriptor is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._descriptor, json.dumps(hidden(message)).encode() + b"\n")

    def stop_run(self, reason: str) -> None:
        """End the process with `EXIT_STOP_RUN`, whatever other threads do."""
        self.tell(event="stop", message=reason)
        _logger.error("stopping the run: %s", reason)
        logging.shutdown()
        os._exit(EXIT_STOP_RUN)


def work(options: argparse.Namespace) -> int:
    """Work for a run until it has ended.

    Parameters
    ----------
    options
        The command line.

    Returns
    -------
    status
        Exit status: 0; `EXIT_START_FAILED` after an error that is on stderr and in the pipe;
        `EXIT_DRAINED` if this machine cannot compute what was computed before.
    """
    coordinator = CoordinatorPipe(options.status_fd)
    try:
        loop = _block_loop(options, coordinator)
    except OWN_END:
        raise
    # A user's predictor may raise anything, and would raise it again.
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in FATAL_ERRNOS:
            # No fault of this worker: it can start once there is room.
            coordinator.stop_run(f"a worker cannot start: {error}")
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        text = hide(text)
        coordinator.tell(event="start_failed", message=text.splitlines()[0])
        # The last line of the log says why: whoever else started the worker reads it there.
        unexpected = not isinstance(error, InputError)
        _logger.error("the worker cannot start: %s", text, exc_info=unexpected)
        return EXIT_START_FAILED
    coordinator.tell(event="ready", token=loop.journal.token)
    # One each: the journal may be on a disk that hangs, which is no fault of this process.
    start_vital("sign-of-life", _beat, lambda: coordinator.tell(event="alive"))
    start_vital("heartbeat", _beat, loop.journal.alive)
    _on_signals(loop, {signal.SIGTERM: options.term, signal.SIGUSR1: options.usr1})
    reason = "terminated"
    try:
        for session in _sessions(options, lambda: loop.leaving):
            loop.run(session)
        reason = DRAINED if loop.drained else "terminated" if loop.leaving else "end"
    finally:
        loop.journal.close(reason)
    return EXIT_DRAINED if loop.drained else 0


def _block_loop(options: argparse.Namespace, coordinator: CoordinatorPipe) -> BlockLoop:
    """Open all that a run names, and a journal of this process."""
    run_dir, index, name = options.run_dir, options.index, options.name
    local = index if index is not None else int(os.environ.get("SLURM_LOCALID", "0"))
    spec = PredictSpec.load(run_dir, to_run=True)
    files = BlockFiles.open(spec, run_dir)
    predictor = load_predictor(spec.factory, spec.options, local, spec.files)
    device = str(getattr(predictor, "device", spec.options.get("device", "cpu")))
    info = this_worker(name or (None if index is None else f"worker-{index}"), device)
    journal = JournalWriter(journal_folder(run_dir), replace(info, **gpu_of(device)))
    return BlockLoop(spec, files, predictor, journal, coordinator.stop_run)


def _beat(tell: Callable[[], object]) -> None:
    """Let watchers see that this process lives, however long its blocks take."""
    while True:
        time.sleep(BEAT_S)
        tell()


def _on_signals(loop: BlockLoop, seconds_left: Mapping[int, float]) -> None:
    """Leave on a signal, after some seconds for the blocks in hand; 0 ends at once."""

    def leave(signum: int, _frame: Any) -> None:
        if seconds_left[signum] <= 0:
            raise Terminated(signum)
        loop.leave(seconds_left[signum])

    for number in seconds_left:
        signal.signal(number, leave)


def _sessions(options: argparse.Namespace, leaving: Callable[[], bool]) -> Iterator[Session]:
    """Yield each new session, until the run has ended or none comes for too long.

    A session that is still open a while after it was left is yielded again: the network may have
    failed, and not the dispatcher.
    """
    last, deadline, again = "", time.monotonic() + options.wait, 0.0
    while time.monotonic() < deadline and not leaving():
        session = Session.load(options.run_dir)
        # A worker that has just started may come before its coordinator, which then still has to
        # replace the closed session of an earlier run.
        if session is not None and session.state == "closed" and (last or options.closed_is_over):
            return
        new = session is not None and session.id != last
        if session is not None and session.state == "open" and (new or time.monotonic() > again):
            last = session.id
            yield session
            again = time.monotonic() + _AGAIN_S
            deadline = time.monotonic() + options.wait if new else deadline
        time.sleep(_POLL_S)
    if not leaving():
        _logger.warning("no dispatcher for %.0f s: leaving", options.wait)


def _end_now(signum: int, frame: Any) -> None:
    raise Terminated(signum)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and work; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m agq.blockwise.predict.worker", description=__doc__
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--index", type=int, help="number on this machine, which chooses the GPU")
    help_text = "seconds to wait for a dispatcher, the first or the next"
    parser.add_argument("--wait", type=float, default=60.0, help=help_text)
    parser.add_argument("--parent", type=int, help="process to die with")
    parser.add_argument("--status-fd", type=int, help="pipe to the process that started it")
    help_text = "take a session that is closed at the start for the end of this run"
    parser.add_argument("--closed-is-over", action="store_true", help=help_text)
    parser.add_argument("--name", help="name in the journal; default: from the number")
    help_text = "seconds to finish the blocks in hand after the signal"
    parser.add_argument("--term", type=float, default=0.0, help=help_text)
    parser.add_argument("--usr1", type=float, default=0.0, help=help_text)
    options = parser.parse_args(arguments)
    if options.parent is not None:
        die_with_parent(options.parent)
        # Ctrl-C reaches every process of the terminal; the coordinator decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    # There is no block to finish yet.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _end_now)
    cap_output()
    faulthandler.enable()
    log_to_stderr("%(asctime)s %(levelname)s %(threadName)s %(message)s")
    return work(options)


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    logging.shutdown()
    sys.stderr.flush()
    # A block thread may be inside a call that cannot be interrupted; its block is done again.
    os._exit(status)
