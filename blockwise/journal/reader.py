"""The meaning of a folder of journal files: done and failed blocks, and workers."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.journal.progress import RECENT_S
from agq.blockwise.journal.records import (
    BadLineError,
    BlockRecord,
    BlockState,
    Event,
    Order,
    decode,
)
from agq.blockwise.journal.snapshot import (
    Snapshot,
    SnapshotError,
    SnapshotTable,
    open_snapshot,
    write_snapshot,
)
from agq.blockwise.journal.table import BlockTable
from agq.blockwise.journal.tail import LONGEST_LINE, JournalTail, WorkerState, follow_worker
from agq.errors import InputError
from agq.reading import NotAFileError, open_file

_KEPT = (
    *("attempt", "labels", "components", "dropped", "voxels"),
    *("started", "finished", "read_s", "compute_s", "write_s"),
)
_U16 = 2**16 - 1
_U32 = 2**32 - 1


class Journal:
    """All journal files of one stage, read up to now.

    Parameters
    ----------
    folder : Path
        ``<run>/journal/<stage>``; a missing one is an empty journal.
    use_snapshot : bool
        Start from the snapshot that `compact` wrote, if there is one.
    lazy : bool
        Read no more of it than a status needs: totals of 10^7 blocks in a moment. Any method may
        then raise `journal.snapshot.SnapshotError`, if the snapshot is damaged, or was replaced on
        a network file system; a journal read anew, or not lazily, goes on.

    Raises
    ------
    OSError
        If a journal file may not be read.
    """

    def __init__(self, folder: Path, *, use_snapshot: bool = True, lazy: bool = False) -> None:
        self.folder = Path(folder)
        self.workers: dict[str, WorkerState] = {}
        self.tail = JournalTail(self.folder)
        self._table: BlockTable | SnapshotTable = BlockTable()
        # First start and last end of any attempt.
        self._started, self._finished = math.inf, 0.0
        self._sources: list[tuple[str, str]] = []
        self._source_index: dict[tuple[str, str], int] = {}
        self._reasons: list[str] = [""]
        self._reason_index: dict[str, int] = {"": 0}
        self._failed: dict[int, BlockRecord] = {}
        self._rivals: dict[int, set[tuple[str, int]]] = {}
        self._bad_events = 0
        snapshot = open_snapshot(self.folder) if use_snapshot else None
        if snapshot is not None:
            # A damaged snapshot is passed over if all of it is read.
            with contextlib.nullcontext() if lazy else contextlib.suppress(SnapshotError):
                self._restore(snapshot, lazy=lazy and snapshot.has_seconds)
        self.catch_up()

    def refresh(self) -> list[Event]:
        """Read what is new and return it, in the order written within a file.

        Raises
        ------
        OSError
            If a journal file may not be read.
        """
        new: list[Event] = []
        while events := self.tail.poll():
            self._apply(events)
            new += events
        return new

    def catch_up(self) -> None:
        """Read what is new without returning it, in bounded memory."""
        while events := self.tail.poll():
            self._apply(events)

    # What is done

    def done(self, n_blocks: int) -> NDArray[np.bool_]:
        """Mask over all block numbers of the volume: done or skipped.

        Raises
        ------
        InputError
            As in `require_grid`.
        """
        self.require_grid(n_blocks)
        rows = self.rows
        mask = np.zeros(n_blocks, bool)
        mask[rows["block"][rows["rank"] >= BlockState.SKIPPED]] = True
        return mask

    def require_grid(self, n_blocks: int) -> None:
        """Check that the blocks are those of a volume of ``n_blocks``.

        Raises
        ------
        InputError
            If a block that is done or skipped lies beyond the last: it belongs to another grid.
        """
        if (last := self._table.last()) >= n_blocks:
            raise InputError(
                f"journal {self.folder} has block {last}, but the volume has {n_blocks} blocks: it "
                "belongs to another grid; use another run folder or start over with --overwrite"
            )

    def ranks(self, blocks: NDArray[np.int64]) -> NDArray[np.uint8]:
        """State of each of some blocks; see `BlockState`."""
        return self._table.values("rank", np.asarray(blocks, np.int64))

    def digests(self, blocks: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Digest of the checksums of each of some blocks; 0 where none is recorded."""
        return self._table.values("digest", np.asarray(blocks, np.int64))

    def counts(self) -> dict[str, int]:
        """Count the blocks ``failed``, ``skipped`` and ``done``."""
        return self._table.counts()

    def totals(self) -> dict[str, float]:
        """Add up the done blocks: voxels, labels, components, dropped and seconds of each part.

        ``started`` and ``finished`` are the first start and last end of any attempt, 0 for none.
        """
        started = self._started if self._started < math.inf else 0.0
        return self._table.sums() | {"started": started, "finished": self._finished}

    def recent(self, since: float) -> tuple[int, int]:
        """Count the blocks, and their voxels, done in the second of a time or later."""
        return self._table.recent(since)

    def progress(self, since: float | None, now: float) -> dict[str, Any]:
        """Say how far the stage is, in the form in which the ledger keeps totals.

        The stage was started last at `since`, in seconds since the epoch; None: at its first block.
        """
        totals = self.totals()
        session = self.recent(since or totals["started"])
        recent = self.recent(now - RECENT_S)
        return {
            **self.counts(),
            **totals,
            "running": len(self.running(now)),
            "duplicates": len(self.duplicates),
            "conflicts": len(self.conflicts),
            "session": {"blocks": session[0], "voxels": session[1]},
            "recent": {"seconds": RECENT_S, "blocks": recent[0], "voxels": recent[1]},
        }

    def replaced(self) -> bool:
        """Tell whether files that were read are gone: a stage was started over.

        Files that the snapshot stands for may be missing. A stage that was started over may have a
        snapshot too, of other files.
        """
        gone = set(self.tail.positions).difference(self.tail.files())
        # A run folder that was moved away was not started over.
        if not gone or not self.folder.is_dir():
            return False
        snapshot = open_snapshot(self.folder)
        return snapshot is None or not gone <= snapshot.meta.files.keys()

    @property
    def rows(self) -> NDArray[np.void]:
        """One row per block that has ended, dtype `agq.blockwise.journal.table.ROW`, any order."""
        if isinstance(self._table, SnapshotTable):
            self._table = self._table.whole()
        return self._table.rows

    @property
    def version(self) -> int:
        """A number that grows whenever a block's record changes."""
        return self._table.version

    @property
    def revision(self) -> int:
        """How often blocks have been taken back: what new records must say."""
        return int(self.rows["revision"].max(initial=0))

    def record(self, block: int) -> BlockRecord | None:
        """Return the whole record of a block, read again from its file.

        It is None if the block has not ended, or was taken back. Where the file is gone (a
        snapshot outlives it), checksums and ROI are missing.
        """
        if block in self._failed:
            return self._failed[block]
        row = self._table.find(block)
        if row < 0:
            return None
        values = self._table.row(row)
        if values["rank"] == BlockState.OPEN:
            return None
        file, token = self._sources[int(values["source"])]
        try:
            with open_file(self.folder / file, within=self.folder) as handle:
                handle.seek(int(values["offset"]))
                record = decode(handle.readline(LONGEST_LINE)).record
            if record.block == block and record.token == token:
                return record
        except (OSError, OverflowError, BadLineError, NotAFileError):
            pass
        worker = self.workers.get(token)
        data = {name: values[name].item() for name in _KEPT} | {
            "block": block,
            "state": BlockState(values["rank"]).word,
            "token": token,
            "revision": int(values["revision"]),
            "worker": worker.info.name if worker else "",
            "reason": self._reasons[int(values["reason"])] or None,
        }
        return BlockRecord.from_dict(data)

    def records(self) -> Iterator[BlockRecord]:
        """Whole records of all blocks that have ended, one at a time; see `record`."""
        yield from filter(None, map(self.record, np.sort(self.rows["block"]).tolist()))

    def failed(self, limit: int | None = None) -> list[BlockRecord]:
        """Return the records of the blocks that are failed now, or of the first, by number."""
        return [self._failed[block] for block in sorted(self._failed)[:limit]]

    def reasons(self) -> Iterator[tuple[str, int, int]]:
        """Yield the error of each failed block, 1, and its number; see `StageProgress`."""
        for record in self.failed():
            yield record.summary, 1, record.block

    # What looks wrong

    @property
    def duplicates(self) -> list[int]:
        """Blocks done by two processes (a scheduler ran a job twice, or a worker came late)."""
        return sorted(b for b, r in self._rivals.items() if len({token for token, _ in r}) > 1)

    @property
    def conflicts(self) -> list[int]:
        """Blocks done twice with different checksums: the output is not deterministic."""
        return sorted(b for b, r in self._rivals.items() if len({digest for _, digest in r}) > 1)

    @property
    def garbage(self) -> int:
        """Complete lines that could not be understood."""
        return self.tail.garbage + self._bad_events

    # Workers

    def running(self, now: float | None = None) -> dict[int, tuple[str, int, float]]:
        """Blocks begun and not ended: token, attempt and begin time of the latest attempt.

        At a time, what a silent worker had in hand (`WorkerState.is_silent`) is not worked on.
        """
        latest: dict[int, tuple[str, int, float]] = {}
        for token, worker in self.workers.items():
            if now is not None and worker.is_silent(now):
                continue
            for block, (attempt, begun) in worker.current.items():
                if block not in latest or latest[block][2] < begun:
                    latest[block] = (token, attempt, begun)
        blocks = np.fromiter(latest, np.int64, len(latest))
        for block in blocks[self.ranks(blocks) >= BlockState.SKIPPED].tolist():
            del latest[block]
        return latest

    # Reading

    def _apply(self, events: list[Event]) -> None:
        for event in events:
            try:
                if event.kind == "block":
                    self._end_block(event)
                follow_worker(self.workers, event)
            except BadLineError:
                self._bad_events += 1

    def _end_block(self, event: Event) -> None:
        record = event.record
        block, order = record.block, record.order
        self._started = min(self._started, record.started if record.started > 0 else math.inf)
        self._finished = max(self._finished, record.finished)
        row = self._table.find(block)
        if row >= 0:
            old = self._table.row(row)
            token = self._sources[int(old["source"])][1]
            rank, revision = int(old["rank"]), int(old["revision"])
            if order[:2] == (revision, rank) and rank == BlockState.DONE:
                keys = {(token, int(old["digest"])), (record.token, record.digest)}
                if len(keys) > 1:
                    self._rivals.setdefault(block, set()).update(keys)
            if order <= Order(revision, rank, old["finished"], old["attempt"], token):
                return
            if order.revision > revision:
                self._rivals.pop(block, None)
        failed = order.state == BlockState.FAILED
        if failed:
            self._failed[block] = record
        else:
            self._failed.pop(block, None)
        self._table.put(
            row,
            (
                block,
                order.state,
                min(max(record.attempt, 0), _U16),
                self._source(event.file, record.token),
                event.offset,
                record.started,
                record.finished,
                record.read_s,
                record.compute_s,
                record.write_s,
                min(max(record.labels, 0), _U32),
                min(max(record.components, 0), _U32),
                min(max(record.dropped, 0), _U32),
                min(max(record.voxels, 0), _U32),
                record.digest,
                self._reason(None if failed else record.reason),
                record.revision,
            ),
        )

    def _source(self, file: str, token: str) -> int:
        key = (file, token)
        index = self._source_index.get(key)
        if index is None:
            index = self._source_index[key] = len(self._sources)
            self._sources.append(key)
        return index

    def _reason(self, reason: str | None) -> int:
        """Give a reason its number; reasons are few words, and get lost beyond 65 535 of them."""
        text = reason or ""
        index = self._reason_index.get(text)
        if index is None:
            if len(self._reasons) > _U16:
                return 0
            index = self._reason_index[text] = len(self._reasons)
            self._reasons.append(text)
        return index

    # Snapshot

    def save(self) -> Path:
        """Write the snapshot of what has been read; see `compact`."""
        meta = {
            "files": self.tail.positions,
            "ended": sorted(self.tail.ended),
            "garbage": self.garbage,
            "sources": self._sources,
            "reasons": self._reasons,
            "span": [self._started if self._started < math.inf else 0.0, self._finished],
            "failed": [record.to_dict() for record in self.failed()],
            "rivals": [[block, sorted(keys)] for block, keys in self._rivals.items()],
            "workers": [
                asdict(w) | {"current": [[b, *c] for b, c in w.current.items()]}
                for w in self.workers.values()
            ],
        }
        _ = self.rows
        assert isinstance(self._table, BlockTable)
        return write_snapshot(self.folder, self._table, meta)

    def _restore(self, snapshot: Snapshot, *, lazy: bool) -> None:
        meta = snapshot.meta
        self._table = SnapshotTable(snapshot) if lazy else BlockTable(snapshot.rows())
        self.tail = JournalTail(self.folder, meta.files, meta.ended)
        self.tail.garbage = meta.garbage
        started, self._finished = meta.span or _span(self.rows)
        self._started = started or math.inf
        for file, token in meta.sources:
            self._source(file, token)
        for reason in meta.reasons:
            self._reason(reason)
        self._failed = {record.block: record for record in meta.failed}
        self._rivals = dict(meta.rivals)
        self.workers = {worker.token: worker for worker in meta.workers}


def _span(rows: NDArray[np.void]) -> tuple[float, float]:
    """First start and last end of rows: what a snapshot of an older release does not say."""
    started = rows["started"]
    first = started.min(where=started > 0, initial=math.inf)
    return float(first) if first < math.inf else 0.0, float(rows["finished"].max(initial=0.0))


def compact(folder: Path) -> Path | None:
    """Write the meaning of all lines of a journal folder as columns; None without the folder.

    They replace the last snapshot. Writers may go on meanwhile; the lines stay where they are.

    Raises
    ------
    OSError
        If a file cannot be read or the snapshot cannot be written.
    """
    if not Path(folder).is_dir():
        return None
    return Journal(folder).save()
