"""Workers that join a running prediction without SLURM: by hand, or from another scheduler."""

import logging
import secrets
import signal
import socket
import time
from pathlib import Path

from agq.blockwise.predict.spec import PredictSpec, Session
from agq.errors import InputError, RunStoppedError
from agq.pipeline.folder import RunFolder
from agq.pipeline.slurm.worker import Host, devices_of, places_of

_POLL_S = 0.5

_logger = logging.getLogger(__name__)


def join(run_dir: Path, count: int, *, wait_s: float, grace_s: float) -> int:
    """Keep prediction workers of this machine alive until the prediction has ended.

    Parameters
    ----------
    run_dir
        Run folder.
    count
        Worker processes; each has one of the devices in ``CUDA_VISIBLE_DEVICES``, if that is set.
    wait_s
        How long to wait for a run and its coordinator, the first or the next.
    grace_s
        What a worker has to finish its blocks after SIGTERM, SIGINT or SIGUSR2.

    Returns
    -------
    status
        0 if the prediction has ended; 128 and the signal if it goes on without these workers;
        another one if they cannot work here, as the log says.

    Raises
    ------
    InputError
        If no run comes, the folder holds something else, its files may be a stranger's, or workers
        of this machine cannot reach its coordinator.
    RunStoppedError
        If no coordinator came.
    """
    run_dir = run_dir.absolute()
    if not _is_needed(run_dir, wait_s):
        _logger.info("the prediction of %s is done: there is nothing to do", run_dir)
        return 0
    # What a worker would refuse is said here, in one line.
    PredictSpec.load(run_dir, to_run=True)
    # Not by process: in containers that share the name of their node, all have the same number.
    name = f"{socket.gethostname()}-{secrets.token_hex(3)}"
    host = Host(run_dir, wait_s, term_s=grace_s, usr1_s=grace_s)
    host.places = places_of(name, devices_of(count))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, host.on_signal)
    _logger.info("joining %s as worker %s (agq logs shows its log)", run_dir, name)
    status = host.run()
    if host.signals and not host.is_over():
        # A scheduler must not take that for the end of the work.
        return 128 + host.signals[0]
    return status


def _is_needed(run_dir: Path, wait_s: float) -> bool:
    """Wait for a run and its coordinator; False if the prediction is done."""
    run, deadline = RunFolder(run_dir), time.monotonic() + wait_s
    if not _is_there(run_dir):
        _logger.info("%s is not there yet: waiting for it, at most %g s", run_dir, wait_s)
        while not run.exists():
            if time.monotonic() >= deadline:
                raise InputError(f"{run_dir} is not there (waited {wait_s:g} s); is this its name?")
            time.sleep(_POLL_S)
    while True:
        # First: a coordinator that was killed leaves its session open.
        if run.record()["stages"].get("predict", {}).get("state") == "done":
            return False
        session = Session.load(run_dir)
        if session is not None and session.state == "open":
            _require_reachable(run_dir, session)
            return True
        if time.monotonic() >= deadline:
            raise RunStoppedError(
                f"{run_dir}: no coordinator hands out blocks (waited {wait_s:g} s); start one: "
                "agq predict CONFIG --set workers.host=ADDRESS, or agq submit CONFIG"
            )
        time.sleep(_POLL_S)


def _is_there(folder: Path) -> bool:
    """Tell whether a folder holds anything."""
    try:
        return any(folder.iterdir())
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return True


def _require_reachable(run_dir: Path, session: Session) -> None:
    here = socket.gethostname()
    if not session.token and session.machine not in ("", here):
        raise InputError(
            f"{run_dir}: its coordinator takes workers of its own machine only, which is "
            f"{session.machine}, not {here}; start it with --set workers.host=ADDRESS, its address "
            "on the network of the workers"
        )
