"""Keeps as many worker jobs in the queue as are wanted, and says why none can work."""

import contextlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agq.blockwise.predict.coordinator import PredictProgress
from agq.blockwise.storage.logs import log_end
from agq.errors import InputError, RunStoppedError
from agq.pipeline.slurm import client
from agq.pipeline.slurm.jobs import Jobs, changing, lacking, live, load, submit_workers
from agq.pipeline.slurm.scripts import folder, log_folder
from agq.pipeline.slurm.settings import SlurmSettings

_WATCH_S = 15.0
_PAUSE_S = 30.0
_MAX_PAUSE_S = 600.0
_CALM_S = 300.0
_MAX_VAIN = 3
_START_S = 60
_SETTLED_S = 15
_MAX_DEATHS = 2
_LINES = 3
_BYTES = 4096

_HELD = "launch_failed_requeued_held"
_BROKEN = ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "BOOT_FAIL", "DEADLINE")
_MEMORY = ("out of memory", "oom_kill", "oom-kill")
_ENVIRONMENT = ("no such file", "not found", "no module named")

_logger = logging.getLogger(__name__)


class WorkerWatch:
    """Submits a worker job for each that is lost, and stops the run if none can work.

    Jobs on a bad node end at once, and SLURM gives the next job the same node: so it pauses after
    each submission, ever longer until all jobs stay; and it excludes a node on which jobs have
    ended twice at their start, as long as others work on more nodes than are excluded. A job that
    somebody has cancelled is wanted no more.

    Parameters
    ----------
    run_dir
        Run folder.
    section
        Settings of the jobs.
    """

    def __init__(self, run_dir: Path, section: SlurmSettings) -> None:
        self._run_dir = run_dir
        self._section = section
        self._next = time.monotonic() + _WATCH_S
        self._missed = 0
        self._vain = 0
        self._ended = -1
        self._pause = 0.0
        self._not_before = 0.0
        self._short_at = 0.0
        self._cancelled: set[tuple[int, int]] = set()
        self._deaths: dict[str, str] = {}
        self._since = time.time()

    def __call__(self, progress: PredictProgress) -> None:
        """Look after the jobs; called twice a second.

        Raises
        ------
        RunStoppedError
            If no job is left, and those submitted again do no block either.
        """
        now = time.monotonic()
        ended = progress.done + progress.skipped
        if now < self._next or ended >= progress.total:
            return
        self._next = now + _WATCH_S
        try:
            self._look(now, ended, progress.total - ended)
        except InputError as error:
            _logger.warning("the worker jobs cannot be looked after now: %s", error)

    def _look(self, now: float, ended: int, left: int) -> None:
        jobs = load(self._run_dir)
        here = _count(live(jobs, "workers"))
        cancelled = self._newly_ended(jobs)
        if here and not cancelled and not self._lost(jobs, here):
            self._missed = 0
            if now > self._short_at + _CALM_S:
                self._pause = 0.0
            return
        self._short_at = now
        # squeue does not show a job for a moment while it is requeued: ask twice.
        self._missed += 1
        with changing(self._run_dir) as jobs:
            # agq scale and agq cancel hold the lock too: they may have changed both meanwhile.
            entries = live(jobs, "workers")
            here = _count(entries)
            if jobs.cancelled:
                return
            if here and (unwanted := min(cancelled, jobs.workers - here)) > 0:
                jobs.workers -= unwanted
                _logger.info("worker jobs were cancelled: %d are wanted now", jobs.workers)
            lost = self._lost(jobs, here)
            if here and not lost:
                return
            if self._missed < 2 or (here and now < self._not_before):
                return
            if not here:
                self._vain = 0 if ended > self._ended else self._vain + 1
                self._ended = ended
                if self._vain > _MAX_VAIN or not jobs.workers:
                    raise RunStoppedError(
                        f"no worker job is left, and {left} blocks remain"
                        f"{self._cause(jobs)}; agq resume {self._run_dir} starts workers again"
                    )
            self._exclude_bad_nodes(jobs, entries)
            if lost:
                _logger.warning(
                    "%d of %d worker jobs are left: submitting %d", here, jobs.workers, lost
                )
                submit_workers(jobs, self._run_dir, self._section, lost)
        self._missed = 0
        self._pause = min(max(_PAUSE_S, 2 * self._pause), _MAX_PAUSE_S)
        self._not_before = now + self._pause

    def _lost(self, jobs: Jobs, here: int) -> int:
        return lacking(jobs.workers, here, self._section.limit)

    def _newly_ended(self, jobs: Jobs) -> int:
        """Count the tasks that somebody has cancelled since the last look; note those that died."""
        states = ["CANCELLED", *_BROKEN]
        entries = client.queue(jobs.ids("workers"), jobs.users(), states=states)
        ended = [(entry, task) for entry in entries for task in entry.tasks]
        # SLURM forgets jobs after some minutes.
        self._deaths |= {
            f"{entry.job}_{task}": entry.node
            for entry, task in ended
            if entry.state in _BROKEN and entry.node and entry.seconds < _START_S
        }
        tasks = {(entry.job, task) for entry, task in ended if entry.state == "CANCELLED"}
        new = tasks - self._cancelled
        self._cancelled |= tasks
        return len(new)

    def _exclude_bad_nodes(self, jobs: Jobs, entries: Sequence[client.QueueEntry]) -> None:
        """Exclude nodes on which workers do not start, fewer than there are others that work."""
        given_up = {end["worker"].partition(".")[0]: end["node"] for end in self._ends()}
        deaths = Counter((given_up | self._deaths).values())
        bad = [node for node, count in deaths.most_common() if count >= _MAX_DEATHS]
        good = {e.node for e in entries if e.state == "RUNNING" and e.seconds >= _SETTLED_S}
        for node in bad:
            if node not in jobs.excluded and len(jobs.excluded) < len(good.difference(bad)):
                _logger.warning("worker jobs end at their start on %s: they get it no more", node)
                jobs.excluded.append(node)

    def _cause(self, jobs: Jobs) -> str:
        """Say why the jobs have ended: what a worker, its log and SLURM say."""
        words, state, said = [], "", ""
        with contextlib.suppress(InputError):
            entries = client.queue(jobs.ids("workers"), jobs.users(), states=_BROKEN)
            last = max(entries, key=lambda entry: (entry.job, entry.tasks), default=None)
            if last is not None:
                state = last.state
                words.append(f"SLURM calls job {last.target} {state}")
        end = self._last_end()
        if end is not None:
            said = end["message"]
            words.append(f"worker {end['worker']} on {end['node']}: {said} ({end['log']})")
        elif (log := self._last_log()) is not None:
            said = " | ".join(_last_lines(self._run_dir, log))
            words.append(f"the end of {log}: {said or 'nothing'}")
        words += _hints(self._section, state, said.lower())
        return "".join(f"; {text}" for text in words)

    def _last_end(self) -> dict[str, Any] | None:
        """Return what the last worker that gave up since the start of this job has written."""
        return next(iter(self._ends()), None)

    def _ends(self) -> list[dict[str, Any]]:
        """Return what workers that gave up since this job began have written, newest first."""
        files = [*(folder(self._run_dir) / "ends").glob("*.json")]
        recent = [file for file in files if file.stat().st_mtime >= self._since]
        recent.sort(key=os.path.getmtime, reverse=True)
        return [dict(json.loads(file.read_text(encoding="utf-8"))) for file in recent]

    def _last_log(self) -> Path | None:
        logs = log_folder(self._run_dir).glob("workers-*.log")
        return max(logs, key=os.path.getmtime, default=None)


def _count(entries: Sequence[client.QueueEntry]) -> int:
    """Count the worker jobs that work, or will."""
    # A node that cannot start a job leaves it in the queue, where it waits for an administrator.
    return sum(entry.count for entry in entries if entry.reason != _HELD)


def _last_lines(run_dir: Path, log: Path) -> list[str]:
    text = log_end(run_dir, log, _BYTES)
    plain = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return [line for line in map(str.strip, plain.splitlines()) if line][-_LINES:]


def _hints(section: SlurmSettings, state: str, said: str) -> Iterator[str]:
    """Yield what to change, as far as SLURM's state or the words of a log, in lower case, tell."""
    if state == "OUT_OF_MEMORY" or any(text in said for text in _MEMORY):
        yield f"raise slurm.mem ({section.mem})"
    if state == "TIMEOUT" or "time limit" in said:
        limit = section.time or "the partition's"
        yield (
            f"raise slurm.time ({limit}): less slurm.lead_s ({section.lead_s}), it must do for "
            "loading the predictor and for a block"
        )
    if any(text in said for text in _ENVIRONMENT):
        yield (
            "a node lacks what workers need: look at slurm.python, slurm.prologue, slurm.container"
        )
