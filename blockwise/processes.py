"""Processes that must not outlive the one that started them, and what their end means."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time

from agq.blockwise.journal.writer import WorkerInfo

_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0


def die_with_parent(parent: int) -> None:
    """Make this process end when process `parent`, which started it, ends.

    Linux sends SIGKILL at once (``PR_SET_PDEATHSIG``). Elsewhere, and should the parent have ended
    before this call, a thread that looks every second does it.

    Parameters
    ----------
    parent
        Process id that the starter passed on; not read here, because a starter that died early
        has already been replaced by init.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def describe_exit(code: int) -> str:
    """Return what an exit status (negative: signal) means, for people."""
    if code >= 0:
        return f"exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"{name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


def this_worker(name: str | None = None, device: str = "cpu") -> WorkerInfo:
    """Describe this process for its journal; the default name is host and process id."""
    # The name that a cluster's users know; several emulated nodes may share one machine, too.
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return WorkerInfo(
        name=name or f"{host}-{os.getpid()}",
        host=host,
        pid=os.getpid(),
        device=device,
        job=f"{job}_{task}" if job and task else os.environ.get("SLURM_JOB_ID"),
        started=time.time(),
    )
