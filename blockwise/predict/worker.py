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
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agq.blockwise.journal.records import this_worker
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.predict.block_threads import BlockFiles, BlockLoop
from agq.blockwise.predict.local_processes import (
    DRAINED,
    EXIT_DRAINED,
    EXIT_START_FAILED,
    EXIT_STOP_RUN,
    die_with_parent,
)
from agq.blockwise.predict.paths import journal_folder
from agq.blockwise.predict.predictor import load_predictor
from agq.blockwise.predict.spec import PredictSpec, Session
from agq.errors import InputError

_POLL_S = 0.2
_BEAT_S = 30.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leaving:
    """How long a worker that is told to leave may go on with the blocks in hand.

    Attributes
    ----------
    term_s
        Seconds after SIGTERM; 0 ends at once.
    usr1_s
        Seconds after SIGUSR1, which comes some time before a time limit; 0 ends at once.
    """

    term_s: float = 0.0
    usr1_s: float = 0.0


class StopRun:
    """Ends the process at once, after telling the coordinator why.

    Parameters
    ----------
    status_fd
        Pipe to the coordinator that started this worker, None for any other worker.
    """

    def __init__(self, status_fd: int | None) -> None:
        self._fd = status_fd

    def tell(self, **message: Any) -> None:
        """Send the coordinator one message."""
        if self._fd is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._fd, json.dumps(message).encode() + b"\n")

    def __call__(self, reason: str) -> None:
        """End the process with `EXIT_STOP_RUN`; other threads may be anywhere."""
        self.tell(event="stop", message=reason)
        _logger.error("stopping the run: %s", reason)
        logging.shutdown()
        os._exit(EXIT_STOP_RUN)


def work(
    run_dir: str | Path,
    *,
    index: int | None = None,
    name: str | None = None,
    wait_s: float = 60.0,
    status_fd: int | None = None,
    leaving: Leaving = Leaving(),
    closed_is_over: bool = False,
) -> int:
    """Work for a run until it has ended.

    Parameters
    ----------
    run_dir
        Run folder, with ``predict.json`` and the output arrays.
    index
        Number of the worker on its machine, which chooses its GPU; default: the batch system's.
    name
        Name in the journal; default: from `index`, or host and process id.
    wait_s
        Seconds to wait for a dispatcher (the first, or the next after one has gone).
    status_fd
        Pipe to the coordinator.
    leaving
        What SIGTERM and SIGUSR1 mean.
    closed_is_over
        Take a session that is closed already for the end of this run, not of an earlier one.

    Returns
    -------
    status
        Exit status: 0; `EXIT_START_FAILED` after an error that is on stderr and in the pipe;
        `EXIT_DRAINED` if this machine cannot compute what was computed before.
    """
    run_dir = Path(run_dir)
    stop_run = StopRun(status_fd)
    local = index if index is not None else int(os.environ.get("SLURM_LOCALID", "0"))
    try:
        spec = PredictSpec.load(run_dir)
        files = BlockFiles.open(spec, run_dir)
        predictor = load_predictor(spec.factory, spec.options, local)
        device = str(getattr(predictor, "device", spec.options.get("device", "cpu")))
        info = this_worker(name or (None if index is None else f"worker-{index}"), device)
        journal = JournalWriter(journal_folder(run_dir), replace(info, **_gpu(device)))
    # A predictor of the user's may raise anything; whatever it is, trying again will not help.
    except Exception as error:
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        stop_run.tell(event="start_failed", message=text.splitlines()[0])
        _logger.exception("the worker cannot start")
        return EXIT_START_FAILED
    stop_run.tell(event="ready", token=journal.token)
    threading.Thread(target=_beat, args=(journal,), name="heartbeat", daemon=True).start()
    loop = BlockLoop(spec, files, predictor, journal, stop_run)
    _on_signals(loop, leaving)
    reason = "terminated"
    try:
        for session in _sessions(run_dir, wait_s, lambda: loop.leaving, closed_is_over):
            loop.run(session)
        reason = DRAINED if loop.drained else "terminated" if loop.leaving else "end"
    finally:
        journal.close(reason)
    return EXIT_DRAINED if loop.drained else 0


def _gpu(device: str) -> dict[str, Any]:
    """Return name and memory of a CUDA device, nothing for another one."""
    if not device.startswith("cuda"):
        return {}
    import torch  # its predictor has loaded it

    found = torch.cuda.get_device_properties(device)
    return {"gpu": found.name, "gpu_bytes": int(found.total_memory)}


def _beat(journal: JournalWriter) -> None:
    """Let watchers see that this process lives, however long its blocks take."""
    while True:
        time.sleep(_BEAT_S)
        journal.alive()


def _on_signals(loop: BlockLoop, leaving: Leaving) -> None:
    def leave(signum: int, _frame: Any) -> None:
        seconds = leaving.usr1_s if signum == signal.SIGUSR1 else leaving.term_s
        if seconds <= 0:
            raise SystemExit(128 + signum)
        loop.leave(seconds)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, leave)


def _sessions(
    run_dir: Path, wait_s: float, leaving: Callable[[], bool], closed_is_over: bool
) -> Iterator[Session]:
    """Yield each new session, until the run has ended or none comes for `wait_s`."""
    last, deadline = "", time.monotonic() + wait_s
    while time.monotonic() < deadline and not leaving():
        session = Session.load(run_dir)
        # A worker that has just started may come before its coordinator, which then still has to
        # replace the closed session of an earlier run.
        if session is not None and session.state == "closed" and (last or closed_is_over):
            return
        if session is not None and session.state == "open" and session.id != last:
            last = session.id
            yield session
            deadline = time.monotonic() + wait_s
        time.sleep(_POLL_S)
    if not leaving():
        _logger.warning("no dispatcher for %.0f s: leaving", wait_s)


def _end_now(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and work; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m agq.blockwise.predict.worker", description=__doc__
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--index", type=int, help="number of the worker on this machine")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds to wait for a dispatcher")
    parser.add_argument("--parent", type=int, help="process to die with")
    parser.add_argument("--status-fd", type=int, help="pipe to the coordinator")
    help_text = "a session that is closed already is this run's"
    parser.add_argument("--closed-is-over", action="store_true", help=help_text)
    parser.add_argument("--name", help="name in the journal")
    help_text = "seconds to finish the blocks in hand after the signal"
    parser.add_argument("--term", type=float, default=0.0, help=help_text)
    parser.add_argument("--usr1", type=float, default=0.0, help=help_text)
    options = parser.parse_args(arguments)
    if options.parent is not None:
        die_with_parent(options.parent)
        # Ctrl-C reaches every process of the terminal; the coordinator decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Until there is a block to finish.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _end_now)
    faulthandler.enable()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(threadName)s %(message)s"
    )
    return work(
        options.run_dir,
        index=options.index,
        wait_s=options.wait,
        status_fd=options.status_fd,
        name=options.name,
        leaving=Leaving(options.term, options.usr1),
        closed_is_over=options.closed_is_over,
    )


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    logging.shutdown()
    sys.stderr.flush()
    # A block thread may be inside a call that cannot be interrupted; its block is done again.
    os._exit(status)
