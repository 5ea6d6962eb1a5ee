"""What is done: append-only JSON lines in the run folder, one file per process.

The journal alone decides which blocks a resumed run leaves out. Its contract:

1. A ``block`` line is written after the block's data are durable, in one write, and is durable
   itself when :meth:`JournalWriter.finish` returns.
2. One file has one writer, so no lock is needed and a network file system will do.
3. What a set of lines means does not depend on the order in which they are read: of two records of
   a block the one with the larger :attr:`BlockRecord.order` is kept (done beats skipped beats
   failed; then the later one). Reading a line twice changes nothing.
4. A last line without its newline, or a damaged line, is counted and otherwise ignored.

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

from agq.blockwise.journal.records import (
    FORMAT_VERSION,
    BlockRecord,
    WorkerInfo,
    encode,
    safe_name,
    this_worker,
)
from agq.blockwise.storage.files import FATAL_ERRNOS, Unsynced, fsync_path, make_folder

_BATCH_BYTES = 1 << 20
_FLUSH_SECONDS = 0.5


class JournalWriter:
    """Appends the events of one process to a file of its own; safe to use from several threads.

    Parameters
    ----------
    folder : Path
        ``<run>/journal/<stage>``; made if missing.

    Attributes
    ----------
    token : str
        16 random hex digits. It tells two processes apart even if a scheduler runs one job twice
        under one id.

    Raises
    ------
    OSError
        If the folder or file cannot be made.
    """

    def __init__(self, folder: Path, worker: WorkerInfo) -> None:
        self.worker = worker
        self.token = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._torn = False
        folder = make_folder(folder)
        self.path = folder / f"{safe_name(worker.host)}-{worker.pid}-{self.token}.jsonl"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o644)
        self._append("worker", {"version": FORMAT_VERSION, "worker": asdict(worker)})
        self._sync()
        fsync_path(folder)

    def begin(self, block: int, attempt: int = 1) -> None:
        """Say that a block is being worked on; for watching only, so neither synced nor needed."""
        # A full disk must show up where it matters, in the block's own write, not here.
        with contextlib.suppress(OSError):
            self._append("begin", {"block": int(block), "attempt": int(attempt)})

    def alive(self) -> None:
        """Say that the process lives; for watching only, as `begin`."""
        with contextlib.suppress(OSError):
            self._append("alive", {})

    def finish(self, record: BlockRecord) -> None:
        """Write the end of a block, signed with token and worker; durable on return.

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
        """
        lines = bytearray()
        wrote = False
        for record in records:
            signed = replace(record, token=self.token, worker=self.worker.name)
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
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            self._torn = False

    def _sync(self) -> None:
        os.fdatasync(self._fd)


def run_journalled(
    folder: Path, numbers: Iterable[int], work: Callable[[int, Unsynced], int]
) -> int:
    """Call ``work(number, unsynced) -> voxels`` for each number and record how it ended.

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
    with JournalWriter(folder, this_worker(f"stitch-{os.getpid()}")) as journal:
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
            record = BlockRecord(int(number), "done", started=time.time())
            try:
                voxels = work(record.block, unsynced)
                waiting.append(replace(record, finished=time.time(), voxels=voxels))
            except Exception as error:
                if isinstance(error, OSError) and error.errno in FATAL_ERRNOS:
                    raise
                failed += 1
                waiting.append(_failed(record, error))
            if time.monotonic() - flushed > _FLUSH_SECONDS:
                failed += flush()
                flushed = time.monotonic()
        failed += flush()
    return failed


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
