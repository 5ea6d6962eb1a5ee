"""What is done: append-only JSON lines in the run folder, one file per process.

The journal alone decides which blocks a resumed run leaves out. Its contract:

1. A ``block`` line is written after the block's data are durable, in one write, and is durable
   itself when :meth:`JournalWriter.finish` returns.
2. One file has one writer, so no lock is needed and a network file system will do.
3. What a set of lines means does not depend on the order in which they are read: of two records of
   a block the one with the larger :attr:`BlockRecord.order` is kept (a later revision beats an
   earlier one; then done beats skipped beats failed; then the later one). Reading a line twice
   changes nothing.
4. A last line without its newline, or a damaged line, is counted and otherwise ignored.
5. A block is taken back by a line too (`take_back`): ``open``, of a new revision.

:func:`compact` writes the meaning of all lines read so far as columns beside them. It is a cache:
deleting it costs time only.
"""

import contextlib
import os
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import (
    FORMAT_VERSION,
    BlockRecord,
    BlockState,
    WorkerInfo,
    encode,
    safe_name,
    this_worker,
)
from agq.blockwise.storage.files import (
    FATAL_ERRNOS,
    Unsynced,
    fsync_path,
    make_folder,
    naming,
    require_folder,
)
from agq.credentials import hidden
from agq.errors import RunGoneError

_BATCH_BYTES = 1 << 20
_FLUSH_SECONDS = 0.5

# What `process_journal` has opened, by folder and revision.
_open_journals: dict[tuple[Path, int], "JournalWriter"] = {}
_open_lock = threading.Lock()


class JournalWriter:
    """Appends the events of one process to a file of its own; safe to use from several threads.

    Parameters
    ----------
    folder : Path
        ``<run>/journal/<stage>``; made if missing, but not the run folder.

    Attributes
    ----------
    token : str
        16 random hex digits. It tells two processes apart even if a scheduler runs one job twice
        under one id.
    revision : int
        Revision of the journal that this process works for, see `BlockRecord.revision`.

    Raises
    ------
    OSError
        If the folder or file cannot be made.
    """

    def __init__(self, folder: Path, worker: WorkerInfo) -> None:
        self.worker = worker
        self.revision = 0
        self.token = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._torn = False
        require_folder(folder.parents[1])
        folder = make_folder(folder)
        self.path = folder / f"{safe_name(worker.host)}-{worker.pid}-{self.token}.jsonl"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o644)
        self._append("worker", {"version": FORMAT_VERSION, "worker": asdict(worker)})
        self._sync()
        fsync_path(folder)

    def require_place(self) -> None:
        """Check that the run folder is the one that this journal was opened in.

        An open file goes with a folder that is renamed; the files of a block would not.

        Raises
        ------
        RunGoneError
            If the file of this journal is not at its path any more.
        """
        if not self.path.exists():
            raise RunGoneError.at(self.path.parents[2])

    def begin(self, block: int, attempt: int = 1) -> None:
        """Say that a block is being worked on; for watching only, so neither synced nor needed."""
        # A full disk must show up where it matters, in the block's own write, not here.
        with contextlib.suppress(OSError):
            revision = {"revision": self.revision} if self.revision else {}
            self._append("begin", {"block": int(block), "attempt": int(attempt), **revision})

    def alive(self) -> None:
        """Say that the process lives; for watching only, as `begin`."""
        with contextlib.suppress(OSError):
            self._append("alive", {})

    def finish(self, record: BlockRecord) -> None:
        """Write the end of a block, signed with token, worker and revision; durable on return.

        Raises
        ------
        OSError
            If the line could not be made durable: the block is then not done. Calling again with
            the same record is right.
        """
        self.finish_many([record])

    def finish_many(self, records: Iterable[BlockRecord]) -> None:
        """Write many ends of blocks with one sync at the end (10^6 skipped blocks take seconds).

        Raises
        ------
        OSError
            As in :meth:`finish`; any prefix of the records may be durable.
        RunGoneError
            As in :meth:`require_place`.
        """
        self.require_place()
        lines = bytearray()
        wrote = False
        for record in records:
            signed = replace(
                record, token=self.token, worker=self.worker.name, revision=self.revision
            )
            if record.state == "failed":
                # A library's error may quote a whole address.
                signed = replace(signed, reason=hidden(signed.reason), error=hidden(signed.error))
            lines += encode("block", time.time(), self.token, signed.to_dict())
            wrote = True
            if len(lines) >= _BATCH_BYTES:
                self._write(lines)
                lines.clear()
        if lines:
            self._write(lines)
        if wrote:
            self._sync()

    def close(self, reason: str = "end") -> None:
        """Write the ``exit`` line and close the file; a second call does nothing."""
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            self._append("exit", {"reason": reason})
            self._sync()
        with self._lock:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("end" if kind is None else kind.__name__)

    def _append(self, event: str, data: dict[str, Any]) -> None:
        self._write(encode(event, time.time(), self.token, data))

    def _write(self, data: bytes | bytearray) -> None:
        with self._lock:
            if self._fd < 0:
                raise OSError(f"journal {self.path} is closed")
            # After a write cut short (full disk), the next line must not grow on the torn one.
            rest = memoryview(b"\n" + data if self._torn else data)
            self._torn = True
            with naming(self.path):
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
            self._torn = False

    def _sync(self) -> None:
        with naming(self.path):
            os.fdatasync(self._fd)


def run_journalled(
    folder: Path,
    numbers: Iterable[int],
    work: Callable[[int, Unsynced], tuple[int, dict[str, str]]],
    revision: int = 0,
) -> int:
    """Call ``work(number, unsynced)`` for each number and record how it ended.

    The work returns how many voxels it wrote, and a checksum of each thing that it wrote. All calls
    of one process for a folder write one file, until `end_journal` closes it.

    What the work adds to ``unsynced`` is made durable before its line is written. Files and lines
    are synced together about twice a second: after a crash a little work is done again, with the
    same result.

    Returns
    -------
    int
        Numbers that failed.

    Raises
    ------
    OSError
        If a disk is full or cannot be written: all numbers would fail alike.
    """
    failed = 0
    unsynced = Unsynced()
    journal = process_journal(folder, revision)
    waiting: list[BlockRecord] = []
    flushed = time.monotonic()

    def flush() -> int:
        records, lost = waiting, 0
        try:
            unsynced.sync()
        except OSError as error:
            if error.errno in FATAL_ERRNOS:
                raise
            records = [_failed(record, error) for record in waiting]
            lost = sum(record.state == "done" for record in waiting)
        journal.finish_many(records)
        waiting.clear()
        return lost

    for number in numbers:
        journal.require_place()
        record = BlockRecord(int(number), "done", started=time.time())
        try:
            voxels, sums = work(record.block, unsynced)
            ended = time.time()
            waiting.append(replace(record, finished=ended, voxels=voxels, sums=sums))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FATAL_ERRNOS:
                raise
            failed += 1
            waiting.append(_failed(record, error))
        if time.monotonic() - flushed > _FLUSH_SECONDS:
            failed += flush()
            flushed = time.monotonic()
    return failed + flush()


def end_journal(folder: Path) -> None:
    """Close what `process_journal` has opened in this process for a folder or folders in it."""
    with _open_lock:
        keys = [key for key in _open_journals if key[0].is_relative_to(folder)]
        journals = [_open_journals.pop(key) for key in keys]
    for journal in journals:
        journal.close()


def process_journal(folder: Path, revision: int) -> JournalWriter:
    """Return the open journal of this process in a folder, for all of its tasks to write to.

    Parameters
    ----------
    folder : Path
        As of `JournalWriter`; `end_journal` closes its journals.
    revision : int
        What the records are signed with.

    Raises
    ------
    OSError
        If the folder or file cannot be made.
    """
    with _open_lock:
        # A folder that a stitch has emptied, or a run that was deleted or moved.
        gone = [key for key, journal in _open_journals.items() if not journal.path.exists()]
        for key in gone:
            _open_journals.pop(key).close()
        journal = _open_journals.get((folder, revision))
        if journal is None or journal.worker.pid != os.getpid():
            journal = JournalWriter(folder, this_worker(f"stitch-{os.getpid()}"))
            journal.revision = revision
            _open_journals[folder, revision] = journal
        return journal


def take_back(folder: Path, numbers: npt.ArrayLike, reason: str) -> int:
    """Say that blocks are not done, skipped or failed any more, whatever the journal says of them.

    No other process may work on the stage meanwhile.

    Parameters
    ----------
    folder : Path
        Journal folder of the stage.
    numbers : array_like
        Block numbers, any order.
    reason : str
        Why, in one word or line.

    Returns
    -------
    int
        How many of them had ended before.

    Raises
    ------
    OSError
        If the lines could not be made durable.
    """
    journal = Journal(folder)
    wanted = np.unique(np.asarray(numbers, np.int64))
    ended = wanted[journal.ranks(wanted) > BlockState.OPEN].tolist()
    if ended:
        with JournalWriter(folder, this_worker("repair")) as writer:
            writer.revision = journal.revision + 1
            now = time.time()
            writer.finish_many(
                BlockRecord(number, "open", started=now, finished=now, reason=reason)
                for number in ended
            )
    return len(ended)


def _failed(record: BlockRecord, error: Exception) -> BlockRecord:
    if record.state == "failed":
        return record
    return BlockRecord(
        record.block,
        "failed",
        started=record.started,
        finished=time.time(),
        reason=str(error),
        error="".join(traceback.format_exception(error)),
    )
