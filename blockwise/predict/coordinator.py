"""Predict blocks: the coordinator of one run on one machine.

`run_predict` starts a dispatcher (daisy) and local workers, watches them, and returns when every
block is done, skipped, or has failed for good. It may be killed at any time; the caller resumes by
passing the blocks that the journal does not have (`Journal.done`).

How a block fails:

- it raises: the worker records it with its traceback, daisy hands it out again, `retries` times;
- it takes its worker down (killed, out of memory, timed out): daisy hands out again all blocks that
  the worker held. Innocent ones may use up their attempts that way, so what is lost at the end is
  tried once more in an *alone* session, in which a worker holds one block at a time. Only blocks
  that are lost there too are recorded as failed.

What a worker gives back because it is told to leave (pre-emption, time limit), and what fails in
one that finds itself broken (*drained*), is not held against the block: it is handed out again.
"""

import contextlib
import errno
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agq.blockwise.blocks.pack_arrays import is_packed
from agq.blockwise.blocks.writer import BlockWriter
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockRecord, BlockState, this_worker
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.predict.local_processes import (
    DRAINED,
    EXIT_START_FAILED,
    EXIT_STOP_RUN,
    EXIT_TIMED_OUT,
    Dispatcher,
    LocalWorker,
    LocalWorkers,
    describe_exit,
    termination_unwinds,
)
from agq.blockwise.predict.paths import journal_folder, retry_path, session_path
from agq.blockwise.predict.spec import PredictSpec, Session
from agq.blockwise.storage.files import require_folder
from agq.blockwise.storage.leftovers import remove_temporaries
from agq.blockwise.threads import EXIT_DISK
from agq.errors import InputError, RunGoneError, RunStoppedError

__all__ = ["PredictProgress", "PredictReport", "PredictSpec", "run_predict"]

_POLL_S = 0.1
_PROGRESS_S = 0.5
_LEAVE_S = 2.0
_DISPATCHER_RESTARTS = 3
_START_CRASHES = 3
_IDLE_SESSIONS = 10
_COMPACT_BLOCKS = 20_000


@dataclass(frozen=True)
class PredictProgress:
    """Where a run is.

    Attributes
    ----------
    total
        Blocks that this call was given.
    done, skipped, failed
        Of those: computed, skipped (constant raw), and failed at the last attempt so far.
    voxels
        Voxels written.
    workers
        Worker processes of this machine.
    seconds
        Since the start of this call.
    """

    total: int
    done: int
    skipped: int
    failed: int
    voxels: int
    workers: int
    seconds: float


@dataclass(frozen=True)
class PredictReport:
    """How a run ended.

    Attributes
    ----------
    blocks
        Blocks that this call was given.
    done, skipped
        Blocks computed, and blocks skipped because their raw is constant.
    failed
        Numbers of the blocks that failed for good; their records are in the journal.
    voxels
        Voxels written.
    labels, dropped
        Labels found, and objects dropped by a limit of the predictor, in the blocks computed.
    retries
        Attempts that failed or were lost with their worker.
    workers_lost
        Worker processes that died and were replaced.
    read_s, compute_s, write_s
        Sums over the blocks; they overlap.
    wall_s
        Seconds from start to end.
    """

    blocks: int
    done: int
    skipped: int
    failed: tuple[int, ...]
    voxels: int
    labels: int
    dropped: int
    retries: int
    workers_lost: int
    read_s: float
    compute_s: float
    write_s: float
    wall_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return asdict(self) | {"failed": list(self.failed)}


def run_predict(
    spec: PredictSpec,
    blocks: npt.ArrayLike,
    *,
    on_progress: Callable[[PredictProgress], object] | None = None,
) -> PredictReport:
    """Predict blocks until each is done, skipped or failed for good.

    Parameters
    ----------
    spec
        The prediction; its run folder holds the output arrays (`agq.blockwise.volumes.create`).
    blocks
        Numbers of the blocks to compute, those not yet done; any order.
    on_progress
        Called about twice a second, and at the end, from this thread.

    Returns
    -------
    report
        Failed blocks do not raise; they are listed.

    Raises
    ------
    InputError
        If a block number is not in the grid, or a worker cannot load the predictor or the input.
    RunStoppedError
        If the disk is full, workers keep dying or the dispatcher does. What is done stays done.
    """
    grid = spec.block_grid()
    numbers = np.unique(np.asarray(blocks, dtype=np.int64))
    if numbers.size and not 0 <= numbers[0] <= numbers[-1] < grid.n_blocks:
        raise InputError(
            f"blocks {numbers[0]}..{numbers[-1]} are not all in a grid of {grid.n_blocks} blocks"
        )
    spec.save()
    run = _Run(spec, numbers, on_progress)
    if numbers.size:
        with termination_unwinds():
            run.execute()
    elif spec.listen is not None:
        # Workers of other machines may wait since a coordinator was killed.
        Session(id="", state="closed").save(spec.run_dir)
    run.clean_up()
    return run.report()


class _Run:
    """State of one call of `run_predict`."""

    def __init__(
        self,
        spec: PredictSpec,
        numbers: npt.NDArray[np.int64],
        on_progress: Callable[[PredictProgress], object] | None,
    ) -> None:
        self.spec = spec
        self.grid = spec.block_grid()
        self.numbers = numbers
        self._on_progress = on_progress
        self._started = time.monotonic()
        self._next_progress = 0.0
        self._journal = Journal(journal_folder(spec.run_dir))
        self._compacted = self._journal.version
        self._workers = LocalWorkers(spec.run_dir)
        # Of each block, the tokens of the processes in which it failed.
        self._failures: defaultdict[int, list[str]] = defaultdict(list)
        self._losses: Counter[int] = Counter()
        self._lost: set[int] = set()
        self._lost_alone: Counter[int] = Counter()
        self._last_loss: dict[int, str] = {}
        # (token, block) begun and not ended, by processes that did not say that they leave.
        self._open: set[tuple[str, int]] = set()
        # By place in `numbers`: the best outcome so far, as `BlockState`.
        self._ranks = np.zeros(numbers.size, np.uint8)
        # Sums over the records of done blocks.
        self._totals: dict[str, Any] = dict.fromkeys(("voxels", "labels", "dropped"), 0)
        self._totals |= dict.fromkeys(("read_s", "compute_s", "write_s"), 0.0)
        self._deaths = 0
        self._deaths_in_a_row = 0
        self._crashes_at_start = 0

    def execute(self) -> None:
        """Run sessions until no block is left to try."""
        # What an earlier, killed run left behind would be taken for this run's.
        session_path(self.spec.run_dir).unlink(missing_ok=True)
        shutil.rmtree(retry_path(self.spec.run_dir, 0).parent, ignore_errors=True)
        self._open = self._unended()
        ended = False
        # Workers of a cluster wait for a coordinator that was pre-empted, not for one that gave up.
        over = self.spec.listen is None
        try:
            for index in range(min(self.spec.workers, self.numbers.size)):
                self._workers.start(index)
            self._run_sessions()
            ended = over = True
        except (InputError, RunStoppedError):
            over = True
            raise
        finally:
            if over:
                # All workers that see it leave, those of other machines too.
                with contextlib.suppress(OSError, RunGoneError):
                    Session(id="", state="closed").save(self.spec.run_dir)
            self._workers.stop(grace_s=_LEAVE_S if ended else 0.0)

    def clean_up(self) -> None:
        """Remove what workers left half written, those of earlier runs too.

        The journal knows the blocks: a worker that was killed, or told to end at once, began them
        and never wrote how they ended. No worker writes any more.
        """
        self._journal.refresh()
        workers = self._journal.workers.values()
        blocks = {block for worker in workers for block in (*worker.current, *worker.left)}
        if blocks and not is_packed(Path(self.spec.run_dir)):
            writer = BlockWriter.open(
                Path(self.spec.run_dir), self.grid, affinities=self.spec.affinities
            )
            remove_temporaries(file for block in blocks for file in writer.files(block))

    def _run_sessions(self) -> None:
        pending, alone, crashes, idle = self.numbers, self.numbers[:0], 0, 0
        while pending.size or alone.size:
            # Suspects wait until the others are done.
            together = bool(pending.size)
            batch = pending if together else alone
            code = self._session(batch, alone=not together)
            if code == EXIT_DISK:
                session = str(session_path(self.spec.run_dir))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), session)
            left = batch[self._journal.ranks(batch) < BlockState.SKIPPED]
            progress = left.size < batch.size
            crashes = crashes + 1 if code and not progress else 0
            if crashes > _DISPATCHER_RESTARTS:
                raise RunStoppedError(
                    f"the dispatcher keeps ending with {describe_exit(code)}; see "
                    f"{self.spec.run_dir}/logs/predict/dispatcher.log"
                )
            idle = 0 if progress or code else idle + 1
            lost = self._note_lost(alone=not together and not code)
            left = np.setdiff1d(left, self._given_up(), assume_unique=True)
            if together:
                if code:
                    pending = left
                    continue
                # Those given back by workers told to leave are no suspects.
                suspect = np.isin(left, list(lost)) | (idle >= _IDLE_SESSIONS)
                pending, alone = left[~suspect], np.union1d(alone, left[suspect])
                idle = idle if pending.size else 0
                continue
            given_up = [
                n
                for n in left.tolist()
                if self._lost_alone[n] > self.spec.retries or idle >= _IDLE_SESSIONS
            ]
            self._record_lost(np.asarray(given_up, dtype=np.int64))
            alone = np.setdiff1d(left, given_up, assume_unique=True)
        self._tick(final=True)

    def _given_up(self) -> list[int]:
        """Blocks that have failed too often, in workers that were not broken themselves."""
        drained = {t for t, w in self._journal.workers.items() if w.exit == DRAINED}
        return [
            n
            for n, tokens in self._failures.items()
            if sum(token not in drained for token in tokens) > self.spec.retries
        ]

    def _unended(self) -> set[tuple[str, int]]:
        workers = self._journal.workers.items()
        return {(token, block) for token, w in workers if w.exit is None for block in w.current}

    def _note_lost(self, *, alone: bool) -> set[int]:
        """Return the blocks that this run lost with a worker that gave no notice."""
        new = self._unended() - self._open
        self._open |= new
        for token, block in new:
            info = self._journal.workers[token].info
            self._last_loss.setdefault(block, f"worker {info.name} on {info.host} was lost")
            self._lost.add(block)
            self._lost_alone[block] += alone
        return self._lost

    def _session(self, numbers: npt.NDArray[np.int64], *, alone: bool) -> int:
        """Hand out blocks until the dispatcher ends; return its exit status."""
        dispatcher = Dispatcher(self.spec.run_dir, numbers, alone=alone)
        try:
            while (code := dispatcher.poll()) is None:
                self._tick()
                time.sleep(_POLL_S)
        finally:
            dispatcher.kill()
        self._tick(final=True)
        return code

    def _tick(self, *, final: bool = False) -> None:
        """Look after workers; now and then, and when one has ended, read and report progress."""
        ended = self._workers.ended()
        now = time.monotonic()
        if not (ended or final or now >= self._next_progress):
            return
        # Each reading opens the journal file of every worker: not ten times a second.
        self._next_progress = now + _PROGRESS_S
        require_folder(self.spec.run_dir)
        for event in self._journal.refresh():
            if event.kind == "block" and event.record.revision == self.spec.revision:
                self._note(event.record)
        self._compact()
        for index, worker in ended.items():
            self._replace(index, worker)
        if self._on_progress is not None:
            self._on_progress(self._progress())

    def _compact(self) -> None:
        """Save a snapshot now and then, so that a status reads fewer lines.

        Of 10^6 blocks, at most 31 000 are then read line by line, which takes about a second.
        """
        grown = self._journal.version - self._compacted
        if grown >= max(_COMPACT_BLOCKS, len(self._journal.rows) // 32):
            # A full disk is noticed by the workers, whose lines matter.
            with contextlib.suppress(OSError):
                self._journal.save()
            self._compacted = self._journal.version

    def _note(self, record: BlockRecord) -> None:
        """Count the end of an attempt."""
        place = int(np.searchsorted(self.numbers, record.block))
        if place == self.numbers.size or self.numbers[place] != record.block:
            return
        if record.state == "failed":
            self._failures[record.block].append(record.token)
        else:
            self._deaths_in_a_row = self._crashes_at_start = 0
        if record.order.state <= self._ranks[place]:
            return
        self._ranks[place] = record.order.state
        if record.state == "done":
            for name in self._totals:
                self._totals[name] += getattr(record, name)

    def _replace(self, index: int, worker: LocalWorker) -> None:
        """Start another worker for one that has ended, or stop the run."""
        if worker.code == EXIT_START_FAILED:
            kind = RunStoppedError if self._ranks.any() else InputError
            raise kind(f"worker {index} cannot start: {worker.message} (log: {worker.log})")
        if worker.code == EXIT_STOP_RUN:
            raise RunStoppedError(f"{worker.message}; fix it and run again to resume")
        self._deaths += 1
        self._deaths_in_a_row += 1
        how = worker.how
        if worker.code == EXIT_TIMED_OUT:
            how = f"a block took longer than {self.spec.timeout_s:g} s"
        if worker.token is not None:
            state = self._journal.workers.get(worker.token)
            for block in state.current if state is not None else ():
                self._losses[block] += 1
                self._last_loss[block] = f"worker {index} ended ({how}), log: {worker.log}"
        self._crashes_at_start = 0 if worker.token is not None else self._crashes_at_start + 1
        if (
            self._deaths_in_a_row > self.spec.max_restarts
            or self._crashes_at_start >= _START_CRASHES
        ):
            raise RunStoppedError(
                f"{self._deaths_in_a_row} workers in a row ended without finishing a block, the "
                f"last by {how}; see {worker.log}, then run again to resume"
            )
        self._workers.start(index)

    def _record_lost(self, numbers: npt.NDArray[np.int64]) -> None:
        """Record blocks that were alone in every worker they took down."""
        if not numbers.size:
            return
        now = time.time()
        info = this_worker("coordinator")
        with JournalWriter(journal_folder(self.spec.run_dir), info) as journal:
            journal.revision = self.spec.revision
            journal.finish_many(
                BlockRecord(
                    block=number,
                    state="failed",
                    attempt=len(self._failures[number]) + self._losses[number],
                    started=now,
                    finished=now,
                    reason=self._last_loss.get(number, "every worker that took it was lost"),
                    **self.grid.place(number),
                )
                for number in numbers.tolist()
            )

    def _count(self, state: BlockState) -> int:
        return int(np.count_nonzero(self._ranks == state))

    def _progress(self) -> PredictProgress:
        return PredictProgress(
            total=int(self.numbers.size),
            done=self._count(BlockState.DONE),
            skipped=self._count(BlockState.SKIPPED),
            failed=self._count(BlockState.FAILED),
            voxels=self._totals["voxels"],
            workers=len(self._workers),
            seconds=time.monotonic() - self._started,
        )

    def report(self) -> PredictReport:
        """Return how the run ended."""
        failed = self.numbers[self._ranks == BlockState.FAILED]
        return PredictReport(
            blocks=int(self.numbers.size),
            done=self._count(BlockState.DONE),
            skipped=self._count(BlockState.SKIPPED),
            failed=tuple(failed.tolist()),
            retries=sum(map(len, self._failures.values())) + sum(self._losses.values()),
            workers_lost=self._deaths,
            wall_s=time.monotonic() - self._started,
            **self._totals,
        )
