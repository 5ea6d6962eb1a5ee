"""How one worker process holds several blocks at once: reading, computing and writing overlap.

A *lane* is a thread with a daisy client of its own that takes one block at a time through all its
steps; the calling thread computes what the lanes have read, in batches of whatever is ready, and
never waits for a batch to fill. At most `prefetch` blocks wait for it.

(One client could acquire several blocks before it releases the first, but only by entering its
context managers out of order; a client per lane keeps daisy's block timeout, its accounting and
its error paths as they are meant.)

The order of a block's end is what makes a run resumable: fragments, affinities and sidecar are
written, each atomically and synced; then the journal line; only then daisy is told.
"""

import contextlib
import logging
import math
import queue
import random
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import daisy.v2 as daisy
import numpy.typing as npt

from agq.blockwise.journal.writer import BlockRecord, Journal, JournalWriter
from agq.blockwise.predict.auth_proxy import enter
from agq.blockwise.predict.block_io import BlockError, BlockFiles
from agq.blockwise.predict.paths import TASK, journal_folder, retry_path
from agq.blockwise.predict.predictor import Prediction, Predictor
from agq.blockwise.predict.spec import PredictSpec, Session
from agq.blockwise.storage.files import FATAL_ERRNOS, require_writable

_IDLE_S = 0.2
_MAX_IDLE_S = 2.0
_DRAIN_S = 60.0
_PAUSE_S = 2.0
_MAX_PAUSE_S = 30.0
_FIRST_CLIENT_ID = 10**6

_logger = logging.getLogger(__name__)


@dataclass
class _Slot:
    """One place in the queue for the main thread; given back once, by whoever comes first."""

    places: threading.Semaphore
    _held: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def release(self) -> None:
        with self._lock:
            if self._held:
                self._held = False
                self.places.release()


@dataclass(frozen=True)
class _Ready:
    """A block that has been read and waits for the main thread."""

    raw: npt.NDArray[Any]
    slot: _Slot
    result: "Future[tuple[Prediction, float]]" = field(default_factory=Future)


class BlockLoop:
    """The lanes and the compute loop of one worker process.

    Parameters
    ----------
    spec
        The prediction.
    files
        Its input and outputs.
    predictor
        Used by the thread that calls `run` only.
    journal
        Of this process.
    stop_run
        Called, from any thread, with a message when no block can succeed any more (full disk);
        it must end the process.

    Attributes
    ----------
    drained
        Whether this process has found that it cannot compute what was computed before.
    """

    def __init__(
        self,
        spec: PredictSpec,
        files: BlockFiles,
        predictor: Predictor,
        journal: JournalWriter,
        stop_run: Callable[[str], object],
    ) -> None:
        self.spec = spec
        self.files = files
        self.predictor = predictor
        self.journal = journal
        self._stop_run = stop_run
        self._ready: queue.SimpleQueue[_Ready] = queue.SimpleQueue()
        self.drained = False
        self._leave_by = math.inf
        self._failed_in_a_row = 0
        self._tested_at = 0
        self._last_done: int | None = None

    @property
    def leaving(self) -> bool:
        """Whether the worker takes no more blocks."""
        return self._leave_by < math.inf

    def leave(self, seconds: float) -> None:
        """Take no more blocks, and finish those in hand if that is done within some seconds.

        Safe to call from a signal handler; a second call can only shorten the time.
        """
        self._leave_by = min(self._leave_by, time.monotonic() + seconds)

    def run(self, session: Session) -> None:
        """Compute blocks of a session until its dispatcher is gone."""
        batch_size = 1 if session.alone else int(self.predictor.batch_size)
        # With fewer blocks waiting than a batch takes, no batch would ever be full.
        prefetch = 1 if session.alone else max(self.spec.prefetch, batch_size)
        # One lane more than the blocks waiting and computing: it writes meanwhile.
        n_lanes = 1 if session.alone else prefetch + batch_size + 1
        places = threading.Semaphore(prefetch)
        over = threading.Event()
        lanes = [
            threading.Thread(
                target=self._lane, args=(session, places, over), name=f"lane-{i}", daemon=True
            )
            for i in range(n_lanes)
        ]
        for lane in lanes:
            lane.start()
        while any(lane.is_alive() for lane in lanes) or not self._ready.empty():
            if time.monotonic() > self._leave_by:
                return
            untested = self._failed_in_a_row - self._tested_at
            if 0 < self.spec.drain_after <= untested and not self.drained:
                self._test_myself()
            with contextlib.suppress(queue.Empty):
                self._compute(self._batch(batch_size))

    def _batch(self, size: int) -> list[_Ready]:
        """Return what is ready, at least one block and at most `size`."""
        batch = [self._ready.get(timeout=_IDLE_S)]
        with contextlib.suppress(queue.Empty):
            while len(batch) < size:
                batch.append(self._ready.get_nowait())
        for item in batch:
            item.slot.release()
        return batch

    def _compute(self, batch: list[_Ready]) -> None:
        """Predict a batch; if it raises, block by block, so that only the guilty block fails."""
        started = time.perf_counter()
        try:
            predictions = self.predictor.predict([item.raw for item in batch])
            if len(predictions) != len(batch):
                raise ValueError(
                    f"the predictor returned {len(predictions)} predictions for {len(batch)} blocks"
                )
        except Exception as error:
            if len(batch) == 1:
                batch[0].result.set_exception(error)
                return
            _logger.warning("a batch of %d failed; trying each block alone", len(batch))
            for item in batch:
                self._compute([item])
            return
        seconds = (time.perf_counter() - started) / len(batch)
        for item, prediction in zip(batch, predictions, strict=True):
            item.result.set_result((prediction, seconds))

    def _test_myself(self) -> None:
        """Compute a block that was computed before; leave if that fails now."""
        self._tested_at = self._failed_in_a_row
        known = self._last_done
        if known is None:
            done = Journal(journal_folder(self.files.run_dir)).done(self.files.grid.n_blocks)
            if not done.any():
                return
            known = int(done.argmax())
        _logger.warning("%d failures in a row: trying block %d", self.spec.drain_after, known)
        try:
            self.predictor.predict([self.files.read(known)])
            require_writable(self.files.run_dir)
        except Exception:
            _logger.exception("block %d was computed before and fails now: leaving", known)
            self.drained = True
            self.leave(_DRAIN_S)
            return
        self._failed_in_a_row = self._tested_at = 0

    def _pause(self) -> None:
        """Take blocks slowly while all fail: a broken worker must not use up every block's tries.

        That is how long others have for a block that shows whose fault it is.
        """
        if not self.spec.drain_after:
            return
        pause = min(_PAUSE_S * (self._failed_in_a_row // self.spec.drain_after), _MAX_PAUSE_S)
        until = time.monotonic() + pause
        while self._failed_in_a_row and not self.leaving and time.monotonic() < until:
            time.sleep(_IDLE_S)

    def _lane(self, session: Session, places: threading.Semaphore, over: threading.Event) -> None:
        client: Any = None
        idle_s = _IDLE_S
        while not (over.is_set() or self.leaving):
            self._pause()
            if not places.acquire(timeout=_IDLE_S):
                continue
            slot = _Slot(places)
            try:
                if client is None:
                    client = _connect(session)
                    if not client.connected:
                        over.set()
                        return
                with client.acquire_block() as block:
                    if block is None:
                        # Nothing is ready *now*; this client stays dead, so the next gets a new
                        # one. A block that another worker holds may still come back.
                        client = None
                    else:
                        idle_s = _IDLE_S
                        if not self._process(block, slot):
                            block.status = daisy.BlockStatus.FAILED
            except Exception as error:
                # Blocks' own errors end in _process: the dispatcher has ended or was killed.
                _logger.info("the dispatcher has gone: %s", error)
                over.set()
            finally:
                slot.release()
            if client is None:
                # Ever more slowly: at the end of a run, a thousand lanes wait for the last blocks.
                self._idle(idle_s * random.uniform(0.75, 1.25), over)  # noqa: S311
                idle_s = min(1.5 * idle_s, _MAX_IDLE_S)

    def _idle(self, seconds: float, over: threading.Event) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.leaving:
            if over.wait(min(left, _IDLE_S)):
                return

    def _process(self, block: Any, slot: _Slot) -> bool:
        """Take one block through all its steps; False if it failed."""
        number, attempt, started = -1, 1, time.time()
        try:
            number = self.files.grid.number_at(block.write_roi)
            attempt = 1 + self._failures(number)
            self.journal.begin(number, attempt)
            record = self._predict(number, attempt, started, slot)
            self.journal.finish(record)
            if record.state == "done":
                self._last_done, self._failed_in_a_row, self._tested_at = number, 0, 0
        except Exception as error:
            slot.release()
            # Unusable data are no sign of a broken machine.
            self._failed_in_a_row += not isinstance(error, BlockError)
            self._record_failure(number, attempt, started, error)
            return False
        return True

    def _predict(self, number: int, attempt: int, started: float, slot: _Slot) -> BlockRecord:
        """Read, compute and write one block; return its journal record."""
        begun = time.perf_counter()
        raw = self.files.read(number)
        read_s = time.perf_counter() - begun
        common: dict[str, Any] = {
            "block": number,
            "attempt": attempt,
            "started": started,
            "read_s": read_s,
            **self.files.grid.place(number),
        }
        if raw.min() == raw.max():
            slot.release()
            return BlockRecord(state="skipped", reason="constant", finished=time.time(), **common)
        item = _Ready(raw, slot)
        self._ready.put(item)
        prediction, compute_s = item.result.result()
        begun = time.perf_counter()
        sums = self.files.write(number, prediction)
        return BlockRecord(
            state="done",
            finished=time.time(),
            compute_s=compute_s,
            write_s=time.perf_counter() - begun,
            labels=int(prediction.n_labels),
            components=int(prediction.components),
            dropped=int(prediction.dropped),
            sums=sums,
            **common,
        )

    def _record_failure(self, number: int, attempt: int, started: float, error: Exception) -> None:
        fatal = next((e for e in _chain(error) if getattr(e, "errno", None) in FATAL_ERRNOS), None)
        _logger.error("block %d failed, attempt %d", number, attempt, exc_info=error)
        # The journal may be on the same full disk; the run is stopped below all the same.
        try:
            if number >= 0:
                record = BlockRecord(
                    block=number,
                    state="failed",
                    attempt=attempt,
                    started=started,
                    finished=time.time(),
                    reason=f"{type(error).__name__}: {error}".splitlines()[0],
                    error="".join(traceback.format_exception(error)),
                    **self.files.grid.place(number),
                )
                self.journal.finish(record)
                self._count_failure(number)
        except OSError as second:
            if fatal is None and second.errno in FATAL_ERRNOS:
                fatal = second
            _logger.exception("cannot record the failure of block %d", number)
        if fatal is not None:
            self._stop_run(f"block {number} cannot be written: {fatal}")

    def _failures(self, number: int) -> int:
        """Return how often a block has failed in this run, in any worker."""
        try:
            return retry_path(self.files.run_dir, number).stat().st_size
        except FileNotFoundError:
            return 0

    def _count_failure(self, number: int) -> None:
        path = retry_path(self.files.run_dir, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(b".")


def _connect(session: Session) -> Any:
    """Return a daisy client.

    Raises
    ------
    GateError
        If the gate has gone with its dispatcher, or refuses the token.
    """
    host, port = session.host, session.port
    if session.token:
        host, port = "127.0.0.1", enter(host, port, session.token)
    return daisy.Client(
        daisy.Context(
            hostname=host,
            port=port,
            task_id=TASK,
            # Outside the ids that the server gives to workers it starts itself.
            worker_id=_FIRST_CLIENT_ID + secrets.randbelow(2**31),
            logdir="",
            resource_tracking=0,
        )
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that caused it."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
