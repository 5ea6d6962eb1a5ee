"""The program of a worker job: it keeps one prediction worker per GPU alive until the run ends.

It is a separate process, because a worker that is killed, runs out of memory or breaks its GPU can
neither report that nor start again. Its exit status is

- 0 if the run has ended, no coordinator came for ``slurm.wait_s``, or it was told to leave
  (SIGTERM, SIGUSR2);
- 75 before the time limit (SIGUSR1): the batch script then requeues the job;
- another one if workers cannot start on this node, or fail blocks that were computed before.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agq.blockwise.predict.local_processes import (
    EXIT_DRAINED,
    EXIT_START_FAILED,
    EXIT_STOP_RUN,
    LocalWorker,
)
from agq.blockwise.predict.paths import log_path
from agq.blockwise.predict.spec import Session
from agq.blockwise.storage.files import require_folder, require_writable, write_atomic
from agq.blockwise.storage.logs import cap_output
from agq.credentials import log_to_stderr
from agq.errors import InputError, RunGoneError
from agq.pipeline.slurm.jobs import load, load_config, section_of
from agq.pipeline.slurm.scripts import EXIT_REQUEUE, folder

_POLL_S = 0.2
_PROBE_S = 2.0
_SHORT_S = 60.0
_MAX_CRASHES = 5
_MAX_DRAINS = 1
_KILL_S = 2.0
_LOOK_S = 5.0
_END_S = 30.0
_LINE_BYTES = 4096

_logger = logging.getLogger(__name__)


@dataclass
class Place:
    """One device and the worker process on it, which is started again when it ends."""

    name: str
    device: str | None
    index: int = 0
    process: LocalWorker | None = None
    started: float = 0.0
    not_before: float = 0.0
    crashes: int = 0
    drains: int = 0
    ready: bool = False
    blocked_since: float | None = None
    result: int | None = None


@dataclass
class Host:
    """The workers of one job, or of one `agq worker`.

    Attributes
    ----------
    run_dir
        Run folder.
    wait_s
        How long they wait for a coordinator, the first or the next.
    term_s, usr1_s
        What a worker has to finish its blocks after SIGTERM, and after SIGUSR1 or SIGUSR2.
    ends
        Folder for the reasons why places were given up; None: they are only logged.
    places
        Where workers run.
    signals
        Those that came.
    """

    run_dir: Path
    wait_s: float
    term_s: float
    usr1_s: float
    ends: Path | None = None
    places: list[Place] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)
    kill_at: float = float("inf")
    over_since: float | None = None
    look_at: float = 0.0
    patience: float = field(init=False)

    def __post_init__(self) -> None:
        self.patience = time.monotonic() + self.wait_s

    def _has_coordinator(self, now: float) -> bool:
        """Whether a coordinator has begun the run: until then a worker has nothing to open."""
        session = Session.load(self.run_dir)
        if session is None and now > self.patience:
            _logger.warning("no coordinator came for %.0f s: leaving", self.wait_s)
        return session is not None

    def start(self, place: Place) -> None:
        """Start the worker of a place."""
        environment = dict(os.environ)
        if place.device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = place.device
        options = {
            "--index": place.index,
            "--name": place.name,
            "--wait": self.wait_s,
            "--term": self.term_s,
            "--usr1": self.usr1_s,
        }
        words = [word for option in options.items() for word in option]
        place.process = LocalWorker(
            self.run_dir,
            f"worker-{place.name}",
            [*words, "--closed-is-over"],
            env=environment,
            own_group=True,
        )
        place.started = time.monotonic()

    def look_after(self, place: Place) -> None:
        """Start the worker of a place, start it again if it has ended, or give the place up."""
        now = time.monotonic()
        if place.result is not None:
            return
        if place.process is None:
            if self.over_since is not None:
                place.result = 0
            elif self.signals or not self._has_coordinator(now):
                place.result = 0 if self.signals or now > self.patience else None
            elif now >= place.not_before and self._storage_is_there(place):
                self.start(place)
            return
        worker = place.process
        code = worker.process.poll()
        worker.listen()
        place.ready |= worker.token is not None
        if code is None:
            if worker.frozen:
                worker.kill()
            return
        worker.close()
        place.process = None
        if code == 0 or self.signals or self.over_since is not None:
            place.result = 0
        elif code == EXIT_START_FAILED:
            self._give_up(place, code, _last_line(log_path(self.run_dir, f"worker-{place.name}")))
        elif code == EXIT_STOP_RUN:
            _logger.warning("%s cannot write the run folder: waiting", place.name)
            place.blocked_since = place.blocked_since or now
            place.not_before = now + _PROBE_S
        elif code == EXIT_DRAINED:
            place.drains += 1
            if place.drains > _MAX_DRAINS:
                self._give_up(place, code, "it fails blocks that were computed before")
            else:
                # A new process often works where a broken GPU context made the old one fail.
                _logger.warning("%s fails every block: starting a new process", place.name)
        else:
            short = now - place.started < _SHORT_S
            place.crashes = place.crashes + 1 if short else 1
            _logger.warning("%s ended (%s)", place.name, worker.how)
            if place.crashes > _MAX_CRASHES:
                last = _last_line(log_path(self.run_dir, f"worker-{place.name}"))
                self._give_up(place, 1, f"it keeps ending with {worker.how}; its last line: {last}")
            place.not_before = now + min(2.0 ** (place.crashes - 1), 30.0) - 1.0

    def _storage_is_there(self, place: Place) -> bool:
        """After a full or read-only disk: whether it is writable again."""
        if place.blocked_since is None:
            return True
        try:
            require_writable(self.run_dir)
        except InputError as error:
            if time.monotonic() - place.blocked_since > self.wait_s:
                self._give_up(place, EXIT_STOP_RUN, str(error))
            place.not_before = time.monotonic() + _PROBE_S
            return False
        place.blocked_since = None
        return True

    def _give_up(self, place: Place, code: int, why: str) -> None:
        _logger.error("%s: %s", place.name, why)
        place.result = code
        if self.ends is None:
            return
        end = {
            "worker": place.name,
            "node": os.environ.get("SLURMD_NODENAME", ""),
            "status": code,
            "message": why,
            "log": str(log_path(self.run_dir, f"worker-{place.name}")),
            "time": time.time(),
        }
        with contextlib.suppress(OSError, RunGoneError):
            require_folder(self.run_dir)
            write_atomic(self.ends / f"{place.name}.json", json.dumps(end).encode())

    def on_signal(self, signum: int, _frame: Any) -> None:
        """Pass a signal on; `run` kills workers that do not end in time."""
        self.signals.append(signum)
        soft = signum in (signal.SIGUSR1, signal.SIGUSR2)
        allowed = self.usr1_s if soft else self.term_s
        self.kill_at = min(self.kill_at, time.monotonic() + allowed + _KILL_S)
        for place in self.places:
            if place.process is not None:
                place.process.send_signal(signal.SIGUSR1 if soft else signal.SIGTERM)

    def is_over(self) -> bool:
        """Whether the run has ended, or its folder is gone."""
        try:
            session = Session.load(self.run_dir)
        except (OSError, ValueError):
            return False  # not known now
        return not self.run_dir.exists() if session is None else session.state == "closed"

    def end_those_left(self) -> None:
        """Kill workers that do not end in time after a signal, or after the end of the run.

        Those are frozen, or in a call for a block that is of no use any more.
        """
        now = time.monotonic()
        if now >= self.look_at:
            self.look_at = now + _LOOK_S
            self.over_since = (self.over_since or now) if self.is_over() else None
        since_end = 0.0 if self.over_since is None else now - self.over_since
        if now <= self.kill_at and since_end <= _END_S:
            return
        for place in self.places:
            if place.process is None:
                continue
            place.process.kill()
            if now > self.kill_at + _END_S or since_end > 2 * _END_S:
                _logger.error("%s cannot be killed: its disk or device hangs", place.name)
                place.process, place.result = None, 1

    def _before_limit(self) -> int:
        """Return the exit status before the time limit: again, unless that would be for ever."""
        again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        begun = [place for place in self.places if place.started]
        if not again or not begun or any(place.ready for place in begun):
            return EXIT_REQUEUE
        for place in begun:
            self._give_up(place, 1, "the time limit comes before the predictor is loaded, again")
        return 1

    def run(self) -> int:
        """Keep workers alive until the run ends or they leave; return the exit status."""
        while True:
            for place in self.places:
                self.look_after(place)
            results = [place.result for place in self.places]
            if all(result is not None for result in results):
                break
            self.end_those_left()
            time.sleep(_POLL_S)
        if self.signals and self.signals[0] == signal.SIGUSR1 and not self.is_over():
            return self._before_limit()
        return next((result for result in results if result), 0)


def _last_line(log: Path) -> str:
    """Return the line with which a worker that cannot start says why."""
    with contextlib.suppress(OSError):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LINE_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
        if lines:
            return lines[-1]
    return "its log is empty"


def places_of(name: str, devices: list[str | None]) -> list[Place]:
    """Return a place for each device, named after the job."""
    return [
        # A process with one visible device calls it device 0.
        Place(name if len(devices) == 1 else f"{name}.{i}", device, i if device is None else 0)
        for i, device in enumerate(devices)
    ]


def devices_of(gpus: int) -> list[str | None]:
    """Return the devices that a scheduler has bound to the job, one per worker."""
    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    return list(visible[:gpus]) if gpus and visible else [None] * max(1, gpus)


def main(arguments: list[str]) -> int:
    """Run the workers of this job; see the module."""
    log_to_stderr()
    cap_output()
    try:
        return _work(Path(arguments[0]))
    except InputError as error:
        _logger.error("%s", " ".join(str(error).split()))
        return 1


def _work(run_dir: Path) -> int:
    section = section_of(load_config(run_dir))
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID", str(os.getpid()))
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    name = job if task is None else f"{job}_{task}"
    session = Session.load(run_dir)
    if session is not None and session.state == "closed":
        _logger.info("the run has ended")
        return 0
    devices = devices_of(section.gpus)
    # The rest of the lead is for ending and requeueing.
    usr1_s = section.lead_s - min(30, max(5, section.lead_s // 4))
    ends = folder(run_dir) / "ends"
    host = Host(run_dir, section.wait_s, load(run_dir).grace_s, usr1_s, ends)
    host.places = places_of(name, devices)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, host.on_signal)
    _logger.info("job %s on %s", name, os.environ.get("SLURMD_NODENAME", "this machine"))
    status = host.run()
    _logger.info("leaving with status %d", status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
