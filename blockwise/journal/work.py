"""Works through blocks and records how each ended, with few syncs."""

import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from agq.blockwise.journal.records import BlockRecord, this_worker
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.storage.files import Unsynced

_FLUSH_SECONDS = 0.5


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
