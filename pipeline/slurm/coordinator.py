"""The program of the coordinator job: it hands out blocks to the worker jobs until all are done.

It may be killed, pre-empted or requeued at any time; the next one goes on from the journal, and
the workers wait for it (``slurm.wait_s``). It ends with 75 before its time limit (SIGUSR1): the
batch script then requeues the job.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agq.blockwise.predict.local_processes import CANCELLED, Terminated
from agq.blockwise.predict.spec import Session
from agq.blockwise.storage.files import FATAL_ERRNOS, require_writable
from agq.blockwise.storage.logs import cap_output
from agq.credentials import log_to_stderr
from agq.errors import InputError, RunGoneError, RunStoppedError, machine_fault
from agq.pipeline.folder import RunFolder, RunLockedError
from agq.pipeline.notify.notifier import Notifier, reason_of
from agq.pipeline.run import stages
from agq.pipeline.run.prepare import prepare
from agq.pipeline.run.session import open_session, record_stop
from agq.pipeline.slurm import client
from agq.pipeline.slurm.jobs import load, load_config, record_gone, section_of
from agq.pipeline.slurm.scripts import EXIT_REQUEUE
from agq.pipeline.slurm.settings import SlurmSettings
from agq.pipeline.slurm.worker_watch import WorkerWatch

_LOCKED_S = 5.0

_logger = logging.getLogger(__name__)


def listen_address(section: SlurmSettings) -> str:
    """Return the address of this node on the cluster's network.

    Raises
    ------
    InputError
        If the node has no such address.
    """
    node = os.environ.get("SLURMD_NODENAME")
    name = section.address or (node and client.node_address(node)) or node or socket.gethostname()
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        raise InputError(
            f"slurm.address: {name} has no address on {node or 'this machine'} ({error}); name the "
            "coordinator's address on the network of the cluster"
        ) from None


def wait_for_storage(run_dir: Path, wait_s: float, why: OSError) -> None:
    """Wait until a full or read-only run folder can be written again.

    Raises
    ------
    InputError
        If that takes longer than `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    while True:
        _logger.warning("the run folder cannot be written (%s); waiting", why.strerror)
        time.sleep(_LOCKED_S)
        try:
            require_writable(run_dir)
        except InputError:
            if time.monotonic() > deadline:
                raise
        else:
            return


def record_end(run_dir: Path, stage: str, why: str, since: float) -> None:
    """Record that a stage ended before it began; nobody else would say why."""
    try:
        record_stop(RunFolder(run_dir), stage, why, since, load_config(run_dir).ledger)
    except (InputError, OSError) as error:
        _logger.warning("not recorded in run.json: %s", error)


def _requeue_before_limit(signum: int, _frame: Any) -> None:
    raise Terminated(signum, EXIT_REQUEUE, "requeued before the time limit of its job")


def notifier_of(run_dir: Path) -> Notifier:
    """Return what tells of a submitted run, by the configuration that its jobs read."""
    try:
        return Notifier(run_dir, load_config(run_dir).notify)
    except InputError:
        return Notifier(run_dir, None)  # that ends this job, with a reason, a moment later


def tell_of_signal(run_dir: Path, notifier: Notifier, end: SystemExit) -> None:
    """Tell that a signal has ended a job for good, unless by `agq cancel`."""
    with contextlib.suppress(InputError):
        again = section_of(load_config(run_dir)).requeue and CANCELLED not in str(end)
        if not again and not load(run_dir).cancelled:
            notifier.tell("failure", str(end))


def _stitch_follows(run_dir: Path) -> bool:
    """Tell whether a stitch was submitted behind this coordinator."""
    roles = [job.role for job in load(run_dir).jobs if job.role in ("coordinator", "stitch")]
    return roles[-1:] == ["stitch"]


def _tell_of_end(
    run_dir: Path, notifier: Notifier, failed: Sequence[int], since: float = 0.0
) -> None:
    """Tell that blocks failed, that all is done if no stitch follows, or that it has been lost."""
    if failed:
        notifier.tell("failure", f"{len(failed)} blocks failed, the first is {failed[0]}")
        return
    if not _stitch_follows(run_dir):
        notifier.tell("end")
        return
    stitch = RunFolder(run_dir).record()["stages"].get("stitch", {})
    if stitch.get("state") == "stopped" and (stitch.get("finished") or 0.0) >= since:
        notifier.tell("failure", stitch.get("error"))


def _predict(run_dir: Path, notifier: Notifier) -> int:
    begun = time.time()
    config = load_config(run_dir)
    section = section_of(config)
    listen = listen_address(section)
    prepared = prepare(config, workers_here=False, trust=True)
    watch = WorkerWatch(run_dir, section)
    while True:
        try:
            with open_session(prepared) as session:
                session.on_move = notifier.moved
                report = stages.predict(
                    session,
                    cluster=stages.Cluster(listen=listen, drain_after=section.drain_after),
                    on_progress=watch,
                )
            break
        except RunLockedError as error:
            # SLURM can run one job twice for a while: the other one does the work.
            _logger.warning("%s", error)
            time.sleep(_LOCKED_S)
        except OSError as error:
            if error.errno not in FATAL_ERRNOS:
                raise
            wait_for_storage(run_dir, section.wait_s, error)
    # A prediction with nothing to do has opened no session, whose end workers would read.
    _close(run_dir)
    # Without scancel (in a container) these jobs find the run closed when they start, and end.
    with contextlib.suppress(client.SlurmError):
        client.cancel([str(n) for n in load(run_dir).ids("workers")], "--state=PENDING")
    # A stitch that was cancelled while it waited: after this job nobody may ask the queue.
    record_gone(run_dir)
    for number in report.failed[:20]:
        _logger.error("block %d failed (agq logs %s --block %d)", number, run_dir, number)
    failed = () if config.stitch.allow_missing else report.failed
    _tell_of_end(run_dir, notifier, failed, begun)
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    """Predict; see the module."""
    log_to_stderr()
    cap_output()
    run_dir = Path(arguments[0])
    signal.signal(signal.SIGUSR1, _requeue_before_limit)
    with notifier_of(run_dir) as notifier:
        return _watched(run_dir, notifier)


def _watched(run_dir: Path, notifier: Notifier) -> int:
    begun = time.time()
    try:
        return _predict(run_dir, notifier)
    except SystemExit as end:
        if load(run_dir).cancelled:
            # SLURM does not start this job again: workers need not wait for it. And it has not
            # succeeded: no stitch that waits for that may begin.
            _close(run_dir)
            return 128 + signal.SIGTERM
        _logger.info("%s; blocks that are done are in the journal", end)
        if not _stitch_follows(run_dir):
            # SLURM is about to kill this job, and a stitch has the time to tell of that.
            tell_of_signal(run_dir, notifier, end)
        return end.code if isinstance(end.code, int) else 1
    except Exception as error:
        # SLURM does not start this job again, whatever it was.
        _close(run_dir)
        known = isinstance(error, InputError | RunStoppedError)
        line = str(error) if known else machine_fault(error) if isinstance(error, OSError) else None
        if line is not None:
            line = " ".join(line.split())
            _logger.error("%s", line)
            record_end(run_dir, "predict", line, begun)
        notifier.tell("failure", reason_of(error))
        if line is None:
            raise
        return 1


def _close(run_dir: Path) -> None:
    """Tell workers that no coordinator comes any more, if that can be written."""
    with contextlib.suppress(OSError, RunGoneError):
        Session(id="", state="closed").save(run_dir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
