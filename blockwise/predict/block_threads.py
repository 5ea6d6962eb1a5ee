"""How one worker process holds several blocks at once: reading, computing and writing overlap.

Every *block thread* takes one block at a time through all its steps; the calling thread computes
what they have read, in batches of whatever is ready, and never waits for a batch to fill. At most
`prefetch` blocks wait for it. Where a predictor has stages, a block's thread does the first and the
last of them, so that the calling thread and its device go on with other blocks.

The order of a block's end is what makes a run resumable: `blocks.writer` writes fragments,
affinities and sidecar, each atomically and synced; then the journal line is written; only then the
block is given back to the dispatcher.
"""

import contextlib
import logging
import math
import os
import queue
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.label_pairs import MaskAgreement
from agq.blockwise.blocks.mask import Tissue
from agq.blockwise.blocks.writer import BlockWriter
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockRecord
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.predict.daisy import Blocks, TakenBlock
from agq.blockwise.predict.local_processes import OWN_END
from agq.blockwise.predict.paths import journal_folder, retry_path
from agq.blockwise.predict.predictor import Prediction, Predictor, StagedPredictor
from agq.blockwise.predict.raw_blocks import BlockError, RawBlocks
from agq.blockwise.predict.spec import PredictSpec, Session
from agq.blockwise.storage.files import FATAL_ERRNOS, descriptor_of, require_writable
from agq.blockwise.threads import start_vital
from agq.blockwise.volumes.content import require_content
from agq.blockwise.volumes.open import Volume, open_volume
from agq.errors import InputError, RunGoneError
from agq.reading import NotAFileError

# Of a record of a volume: a thousand workers that start at once read no more than this.
_COMPARED = 64

_IDLE_S = 0.2
_MAX_IDLE_S = 2.0
_DRAIN_S = 60.0
_PAUSE_S = 2.0
_MAX_PAUSE_S = 30.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockFiles:
    """The input and the outputs of a run, open; shared by the threads of a worker."""

    raw: RawBlocks
    writer: BlockWriter
    mask: Volume | None = None
    hidden: frozenset[int] = frozenset()

    @classmethod
    def open(cls, spec: PredictSpec, run_dir: Path) -> "BlockFiles":
        """Open the raw volume, its mask and the output arrays, which must exist.

        Raises
        ------
        InputError
            If one is missing, does not fit the grid, or holds something else than when the run
            began.
        """
        grid = spec.block_grid()
        raw = RawBlocks.open(spec)
        mask = None if spec.mask is None else open_volume(**spec.mask, kind="mask")
        for name, volume in (("raw", raw.volume), ("mask", mask)):
            if volume is not None and (recorded := spec.contents.get(name)):
                require_content(volume, recorded, f"input.{name}", most=_COMPARED)
        hidden = frozenset(spec.bad_sections if spec.hide_bad_sections else ())
        writer = BlockWriter.open(run_dir, grid, affinities=spec.affinities)
        return cls(raw, writer, mask, hidden)

    @property
    def grid(self) -> BlockGrid:
        """The blocks of the whole volume."""
        return self.writer.grid

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.writer.folder

    def read(self, number: int) -> npt.NDArray[Any]:
        """Read the raw voxels of a block as the predictor sees them; see `RawBlocks.read`."""
        return self.raw.read(number)

    def tissue(self, number: int) -> Tissue | None:
        """Read what the mask shows of a block; None if it hides nothing."""
        if self.mask is None and not self.hidden:
            return None
        return Tissue.read(self.mask, self.grid, number, self.hidden)

    def write(
        self, number: int, prediction: Prediction, tissue: Tissue | None = None
    ) -> dict[str, str]:
        """Write the outputs of a block durably; return a checksum of each.

        The prediction is over the `read_shape` of the grid; of it is kept what the mask shows.

        Raises
        ------
        BlockError
            If the prediction has a wrong shape or type.
        """
        labels, affinities = self._checked(number, prediction)
        origin, mask = None, ""
        if tissue is not None:
            labels, affinities, origin = tissue.hide(labels, affinities)
            mask = tissue.checksum()
        memberships = getattr(prediction, "memberships", None)
        try:
            agreement = None
            if memberships is not None:
                weight = float(getattr(prediction, "mask_weight", 0))
                agreement = MaskAgreement(np.asarray(memberships), weight)
                if origin is not None:
                    agreement = agreement.of_pieces(origin)
            return self.writer.write(number, labels, affinities, agreement=agreement, mask=mask)
        except InputError as error:
            raise BlockError(f"the predictor's answer cannot be used: {error}") from None

    def _checked(
        self, number: int, prediction: Prediction
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
        """Return labels and affinities over the read box, without padding."""
        labels, affinities = np.asarray(prediction.labels), np.asarray(prediction.affinities)
        shape = self.grid.read_shape
        if labels.shape != shape or affinities.shape != (3, *shape):
            raise BlockError(
                f"the predictor returned labels {labels.shape} and affinities {affinities.shape} "
                f"for a block of {shape}"
            )
        if labels.dtype not in (np.uint16, np.uint32) or affinities.dtype != np.uint8:
            raise BlockError(
                f"the predictor returned labels of {labels.dtype} and affinities of "
                f"{affinities.dtype}; uint16 or uint32, and uint8, are expected"
            )
        start, stop = self.grid.read_box(number)
        z, y, x = (slice(0, hi - lo) for lo, hi in zip(start, stop, strict=True))
        return labels[z, y, x], affinities[:, z, y, x]


@dataclass
class _Slot:
    """One place in the queue for the main thread; only the first release gives it back."""

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
    """A block that has been read, and prepared, and waits for the main thread."""

    block: Any
    slot: _Slot
    result: "Future[tuple[Any, float]]" = field(default_factory=Future)


@dataclass(eq=False)
class BlockLoop:
    """The block threads and the compute loop of one worker process.

    Attributes
    ----------
    spec
        The prediction.
    files
        Its input and outputs.
    predictor
        Used by the thread that calls `run` only, but for the first and last stage of a staged one.
    journal
        Of this process.
    stop_run
        Called, from any thread, with a message when no block can succeed any more (full disk);
        it must end the process.
    drained
        Whether this process has found that it cannot compute what was computed before.
    """

    spec: PredictSpec
    files: BlockFiles
    predictor: Predictor
    journal: JournalWriter
    stop_run: Callable[[str], object]
    drained: bool = field(default=False, init=False)
    _ready: "queue.SimpleQueue[_Ready]" = field(default_factory=queue.SimpleQueue, init=False)
    _leave_by: float = field(default=math.inf, init=False)
    _failed_in_a_row: int = field(default=0, init=False)
    _tested_at: int = field(default=0, init=False)
    _last_done: int | None = field(default=None, init=False)

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
        self.journal.revision = session.revision
        batch_size = 1 if session.alone else int(self.predictor.batch_size)
        # With fewer blocks waiting than a batch takes, no batch would ever be full.
        prefetch = 1 if session.alone else max(self.spec.prefetch, batch_size)
        # One thread more than blocks waiting and computing: it writes meanwhile.
        n_threads = 1 if session.alone else prefetch + batch_size + 1
        places = threading.Semaphore(prefetch)
        over = threading.Event()
        threads = [
            start_vital(f"block-{i}", self._take_blocks, session, places, over)
            for i in range(n_threads)
        ]
        while any(thread.is_alive() for thread in threads) or not self._ready.empty():
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
        predictor = self.predictor
        compute = predictor.begin if isinstance(predictor, StagedPredictor) else predictor.predict
        try:
            predictions = compute([item.block for item in batch])
            if len(predictions) != len(batch):
                raise ValueError(
                    f"the predictor returned {len(predictions)} predictions for {len(batch)} blocks"
                )
        except OWN_END:
            raise
        except BaseException as error:
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
        block = self._last_done
        if block is None:
            done = Journal(journal_folder(self.files.run_dir)).done(self.files.grid.n_blocks)
            if not done.any():
                return
            block = int(done.argmax())
        _logger.warning("%d failures in a row: trying block %d", self.spec.drain_after, block)
        try:
            self.predictor.predict([self.files.read(block)])
            require_writable(self.files.run_dir)
        except OWN_END:
            raise
        except BaseException:
            _logger.exception("block %d was computed before and fails now: leaving", block)
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

    def _take_blocks(
        self, session: Session, places: threading.Semaphore, over: threading.Event
    ) -> None:
        """Take blocks until the dispatcher is gone: the life of a block thread."""
        blocks = Blocks(session, self.files.grid)
        idle_s = _IDLE_S
        while not (over.is_set() or self.leaving):
            self._pause()
            if not places.acquire(timeout=_IDLE_S):
                continue
            slot = _Slot(places)
            took = False
            try:
                with blocks.take() as block:
                    if block is not None:
                        took = True
                        if not self._process(block, slot):
                            block.fail()
            except Exception as error:
                # Blocks' own errors end in _process: the dispatcher has ended or was killed.
                _logger.info("the dispatcher has gone: %s", error)
                over.set()
            finally:
                slot.release()
            if took:
                idle_s = _IDLE_S
            else:
                # Ever more slowly: at the end of a run, a thousand threads wait for few blocks.
                self._idle(idle_s * random.uniform(0.75, 1.25), over)  # noqa: S311
                idle_s = min(1.5 * idle_s, _MAX_IDLE_S)

    def _idle(self, seconds: float, over: threading.Event) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.leaving:
            if over.wait(min(left, _IDLE_S)):
                return

    def _process(self, block: TakenBlock, slot: _Slot) -> bool:
        """Take one block through all its steps; False if it failed."""
        number, attempt, started = -1, 1, time.time()
        try:
            number = block.number
            attempt = 1 + self._failures(number)
            self.journal.begin(number, attempt)
            record = self._predict(number, attempt, started, slot)
            self.journal.finish(record)
            if record.state == "done":
                self._last_done, self._failed_in_a_row, self._tested_at = number, 0, 0
        # What the predictor raised, `SystemExit` perhaps; signals reach the main thread only.
        except BaseException as error:
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
        tissue = self.files.tissue(number)
        hidden = (
            tissue is not None and not tissue.shown[self.files.grid.write_in_read(number)].any()
        )
        if hidden or raw.min() == raw.max():
            slot.release()
            reason = "mask" if hidden else "constant"
            return BlockRecord(state="skipped", reason=reason, finished=time.time(), **common)
        staged = self.predictor if isinstance(self.predictor, StagedPredictor) else None
        item = _Ready(raw if staged is None else staged.prepare(raw), slot)
        self._ready.put(item)
        prediction, compute_s = item.result.result()
        begun = time.perf_counter()
        if staged is not None:
            prediction = staged.finish(prediction)
            compute_s += time.perf_counter() - begun
            begun = time.perf_counter()
        self.journal.require_place()
        sums = self.files.write(number, prediction, tissue)
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

    def _record_failure(
        self, number: int, attempt: int, started: float, error: BaseException
    ) -> None:
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
        except (RunGoneError, NotAFileError) as wrong:
            self.stop_run(str(wrong))
        if fatal is not None:
            self.stop_run(f"block {number} cannot be written: {fatal}")

    def _failures(self, number: int) -> int:
        """Return how often a block has failed in this run, in any worker."""
        try:
            return retry_path(self.files.run_dir, number).stat().st_size
        except FileNotFoundError:
            return 0

    def _count_failure(self, number: int) -> None:
        path = retry_path(self.files.run_dir, number)
        for folder in (path.parents[1], path.parent):
            folder.mkdir(exist_ok=True)
        with os.fdopen(descriptor_of(path, os.O_WRONLY | os.O_APPEND), "ab") as file:
            file.write(b".")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that caused it."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
