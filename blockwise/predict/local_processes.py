"""The processes that a coordinator starts on its own machine: one dispatcher, several workers.

How they start, that they end with it, and what their end means.
"""

import contextlib
import ctypes
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agq.blockwise.predict.paths import log_path
from agq.blockwise.spawn import search_named_folders_only
from agq.blockwise.storage.files import descriptor_of, make_folder, require_folder
from agq.blockwise.storage.logs import own_output_end
from agq.blockwise.threads import start_vital

EXIT_START_FAILED = 70
"""Exit status of a worker whose predictor or input cannot be loaded."""

EXIT_STOP_RUN = 71
"""Exit status of a worker that met a condition no other worker or attempt could pass."""

EXIT_DRAINED = 72
"""Exit status of a worker that can no longer compute what was computed before."""

EXIT_TIMED_OUT = 87
"""Exit status with which daisy's client ends a process that holds a block for too long."""

DRAINED = "drained"
"""Reason in the journal's exit line of a worker that ends with `EXIT_DRAINED`."""

BEAT_S = 30.0
"""A worker gives a sign of life that often, whatever its blocks do."""

SILENT_S = 10 * BEAT_S
"""A worker that has given none for so long is ended by the process that started it."""

_STOP_S = 3.0
_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0


_BORN = time.time()
_OUTPUT_BYTES = 4096
# What SLURM writes into the output of a job before it signals it.
_ENDED = re.compile(
    r"\*\*\* (?:JOB|STEP) (\d+)\S* ON \S+ CANCELLED AT (\S+)(?: DUE TO ([A-Z ]+))? "
)
CANCELLED = "cancelled (scancel)"
"""Words of a `Terminated` whose batch job SLURM does not start again."""
_CAUSES = {
    "": CANCELLED,
    "JOB REQUEUE": "requeued",
    "NODE FAILURE": "ended because its node failed",
    "PREEMPTION": "pre-empted",
    "TIME LIMIT": "ended at its time limit",
}


def end_of_batch_job() -> str:
    """Return what has become of the batch job of this process, which was signalled, for people."""
    said = own_output_end(_OUTPUT_BYTES)
    if said is None:
        return "its batch job was pre-empted, requeued or cancelled"
    for job, when, cause in reversed(_ENDED.findall(said)):
        # The output has the words of earlier runs of the job too.
        with contextlib.suppress(ValueError):
            recent = datetime.fromisoformat(when).timestamp() > _BORN - 1.0
            if recent and job == os.environ.get("SLURM_JOB_ID"):
                return f"its batch job was {_CAUSES.get(cause) or f'ended ({cause.lower()})'}"
    return "its batch job was told to end"


class Terminated(SystemExit):
    """A signal ends this process: what is open is closed on the way, and nothing may stop it.

    Parameters
    ----------
    signum
        The signal.
    status
        Exit status; default: as of a process that the signal has killed.
    why
        What that means, for people.
    """

    def __init__(self, signum: int, status: int | None = None, why: str | None = None) -> None:
        super().__init__(128 + signum if status is None else status)
        name = signal.Signals(signum).name
        self._why = why or f"told to end ({name})"
        if why is None and "SLURM_JOB_ID" in os.environ:
            self._why = f"{end_of_batch_job()} ({name})"

    def __str__(self) -> str:
        return self._why


OWN_END = (KeyboardInterrupt, Terminated)
"""What ends this process; all else that a user's predictor raises, `SystemExit` too, is its own."""


class LocalWorker:
    """One worker process and what it has said through its pipe.

    Parameters
    ----------
    run_dir
        Run folder.
    name
        Name of the worker, and of its log.
    options
        Further arguments of `agq.blockwise.predict.worker`.
    env
        Environment; default: that of this process.
    own_group
        Whether it leads a process group, which `kill` ends as a whole.

    Attributes
    ----------
    log
        Its log file.
    token
        Its journal token; None if it never got as far as that.
    message
        Why it ends on purpose.
    """

    def __init__(
        self,
        run_dir: str | Path,
        name: str,
        options: Sequence[object],
        *,
        env: dict[str, str] | None = None,
        own_group: bool = False,
    ) -> None:
        self.log = log_path(run_dir, name)
        self.token: str | None = None
        self.message: str | None = None
        self._text = b""
        self._group = own_group
        self._silent_s = 0.0
        self._looked = time.monotonic()
        self._pipe, child_end = os.pipe()
        os.set_blocking(self._pipe, False)
        words = [run_dir, *options, "--status-fd", child_end, "--parent", os.getpid()]
        try:
            self.process = start_module(
                "agq.blockwise.predict.worker",
                [str(word) for word in words],
                log=self.log,
                stdin=subprocess.DEVNULL,
                pass_fds=(child_end,),
                env=env,
                process_group=0 if own_group else None,
            )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(child_end)

    @property
    def code(self) -> int:
        """Exit status once it has ended; negative for a signal."""
        return int(self.process.returncode)

    @property
    def frozen(self) -> bool:
        """Whether it has said nothing for so long that it is stopped or hangs as a whole."""
        return self.token is not None and self._silent_s > SILENT_S

    @property
    def how(self) -> str:
        """How it has ended, for people."""
        frozen = f"killed after {SILENT_S:g} s without a sign of life"
        return frozen if self.frozen else describe_exit(self.code)

    def listen(self) -> None:
        """Read what the worker has said; to be called at least every second."""
        now = time.monotonic()
        # Where this process was stopped too, nobody can tell how long the worker was silent.
        self._silent_s += min(now - self._looked, 1.0)
        self._looked = now
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._pipe, 65536):
                self._text += data
                self._silent_s = 0.0
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.token = message.get("token", self.token)
            self.message = message.get("message", self.message)

    def send_signal(self, signum: int) -> None:
        """Send the process a signal, if it lives."""
        self.process.send_signal(signum)

    def kill(self) -> None:
        """End it at once, whatever it does; a process that is stopped ends too."""
        if not self._group:
            self.process.kill()
        elif self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Forget the process; it has ended."""
        self.process.wait()
        os.close(self._pipe)


class LocalWorkers:
    """The worker processes of a coordinator; none outlives it.

    Parameters
    ----------
    run_dir
        Run folder.
    """

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._running: dict[int, LocalWorker] = {}

    def __len__(self) -> int:
        return len(self._running)

    def start(self, index: int) -> None:
        """Start worker `index`."""
        options = ["--index", index, "--wait", "1e9"]
        self._running[index] = LocalWorker(self._run_dir, f"worker-{index}", options)

    def ended(self) -> dict[int, LocalWorker]:
        """Return the workers that have ended since the last call, by index, and forget them.

        One that is frozen is ended: it holds its device, and its block until that times out.
        """
        ended = {i: w for i, w in self._running.items() if w.process.poll() is not None}
        for worker in self._running.values():
            worker.listen()
            if worker.frozen:
                worker.kill()
        for index, worker in ended.items():
            worker.close()
            del self._running[index]
        return ended

    def stop(self, grace_s: float) -> None:
        """End all workers: let them go for `grace_s`, then terminate, seconds later kill."""
        processes = [worker.process for worker in self._running.values()]
        _wait(processes, grace_s)
        for process in processes:
            process.terminate()
        _wait(processes, _STOP_S)
        for process in processes:
            process.kill()
        for worker in self._running.values():
            worker.close()
        self._running.clear()


class Dispatcher:
    """The dispatcher process of a coordinator.

    Parameters
    ----------
    run_dir
        Run folder.
    numbers
        Block numbers to hand out.
    alone
        Whether workers are to take one block at a time.
    """

    def __init__(self, run_dir: str, numbers: npt.NDArray[np.int64], *, alone: bool) -> None:
        self.log = log_path(run_dir, "dispatcher")
        self._process = start_module(
            "agq.blockwise.predict.dispatcher",
            [run_dir, str(os.getpid()), "alone" if alone else "together"],
            log=self.log,
            stdin=subprocess.PIPE,
        )
        buffer = io.BytesIO()
        np.save(buffer, numbers, allow_pickle=False)
        assert self._process.stdin is not None
        # A dispatcher that ends before it has read all is noticed by its exit status.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(buffer.getbuffer())
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End it now; it holds nothing that is not in the journal."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def start_module(
    module: str, arguments: list[str], *, log: Path, **options: Any
) -> "subprocess.Popen[bytes]":
    """Start ``python -P -m module`` with its output in a log file.

    ``-P`` keeps the current folder off the import path: a user's ``model.py`` or ``yaml.py`` there
    is none of ours.
    """
    require_folder(log.parents[2])
    make_folder(log.parent)
    search_named_folders_only()
    with os.fdopen(descriptor_of(log, os.O_WRONLY | os.O_APPEND), "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            **options,
        )


def _wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait until all processes have ended, `seconds` at most."""
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


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

    start_vital("watch-parent", watch)


@contextlib.contextmanager
def termination_unwinds() -> Iterator[None]:
    """Let SIGTERM (a cluster's way to say stop) unwind like Ctrl-C: workers end, records close."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def stop(signum: int, _frame: object) -> None:
        raise Terminated(signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def describe_exit(code: int) -> str:
    """Return what an exit status (negative: signal) means, for people."""
    if code >= 0:
        return f"exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"{name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
