"""The snapshot beside the journal files: what all lines up to some byte of each file mean.

It is an uncompressed npz: a column for each field of the table, sorted by block; how many blocks
were done in each second; and one JSON member with the rest, sums included. It can be deleted at any
time, and a damaged or newer one is passed over: the lines say it all again.

A status of 10^7 blocks reads the sums and what newer lines change of them. Reading all of it takes
seconds and 770 MB.
"""

import contextlib
import json
import math
import os
import struct
import time
import weakref
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, FiniteFloat, field_validator

from agq.blockwise.journal.records import BlockRecord, BlockState
from agq.blockwise.journal.table import ROW, BlockTable
from agq.blockwise.journal.tail import WorkerState
from agq.blockwise.storage.arrays import UNREADABLE, open_npz, parsed
from agq.blockwise.storage.files import atomic_file
from agq.errors import InputError
from agq.reading import NotAFileError, open_file

SNAPSHOT: Final = "compact.npz"
_VERSION: Final = 1
_STALE_S: Final = 3600.0
#: Blocks done in one second of the clock.
_SECOND: Final = np.dtype([("second", np.float64), ("blocks", np.uint32), ("voxels", np.uint64)])
_OTHER: Final = {"meta": np.dtype(np.uint8), "seconds": _SECOND}
#: A member's header in a zip: the sizes of its name and of its extra fields.
_ZIP_HEADER: Final = struct.Struct("<26xHH")
_UNREADABLE: Final = (OSError, *UNREADABLE, NotAFileError)


class SnapshotError(InputError):
    """A snapshot cannot be read any more; a journal read anew says all of it."""


_Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Counts(BaseModel):
    failed: _Count
    skipped: _Count
    done: _Count


class _Sums(BaseModel):
    voxels: _Count
    labels: _Count
    components: _Count
    dropped: _Count
    read_s: FiniteFloat
    compute_s: FiniteFloat
    write_s: FiniteFloat


class _Summary(BaseModel):
    rows: _Count
    counts: _Counts
    sums: _Sums


class Meta(BaseModel):
    """The JSON member of a snapshot.

    Attributes
    ----------
    files, ended, garbage
        Of the `JournalTail`: bytes read of each file, files that have an end, bad lines.
    sources, reasons
        What columns of numbers stand for.
    failed, workers
        Records of failed blocks, and processes.
    rivals
        Blocks that were done more than once: token and digest of each.
    span
        First start and last end of a block; a snapshot of an older release lacks it.
    summary
        Sums of all rows; likewise.
    """

    version: Literal[1]
    files: dict[str, _Count]
    ended: set[str]
    garbage: _Count
    sources: list[tuple[str, str]]
    reasons: list[str]
    failed: list[BlockRecord]
    rivals: list[tuple[int, set[tuple[str, int]]]]
    workers: list[WorkerState]
    span: tuple[FiniteFloat, FiniteFloat] | None = None
    summary: _Summary | None = None

    @field_validator("workers", mode="before")
    @classmethod
    def _by_block(cls, workers: Any) -> Any:
        """Take the blocks that a worker has begun: lists, for JSON has no numbers as keys."""
        return [w | {"current": {block: begun for block, *begun in w["current"]}} for w in workers]


def write_snapshot(folder: Path, table: BlockTable, meta: dict[str, Any]) -> Path:
    """Replace the snapshot of a journal folder.

    Raises
    ------
    OSError
        If it cannot be written; the old one then stays.
    """
    _remove_stale(folder)
    rows = table.rows
    order = np.argsort(rows["block"], kind="stable")
    summary = {"rows": len(rows), "counts": table.counts(), "sums": table.sums()}
    meta = {**meta, "version": _VERSION, "summary": summary}
    text = json.dumps(meta, separators=(",", ":")).encode("ascii")
    # Member by member: np.savez would hold a copy of every column at once.
    with atomic_file(folder / SNAPSHOT) as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, "meta", np.frombuffer(text, np.uint8))
        _add(archive, "seconds", _seconds(rows))
        for name in ROW.names or ():
            _add(archive, name, rows[name][order])
    return folder / SNAPSHOT


def open_snapshot(folder: Path) -> "Snapshot | None":
    """Open the snapshot of a journal folder; None if it has no usable one."""
    try:
        return Snapshot(folder / SNAPSHOT)
    except (*_UNREADABLE, SnapshotError):
        return None


class Snapshot:
    """A snapshot whose columns are read and checked when they are first asked for.

    Parameters
    ----------
    path : Path
        The file; it stays open, so that a newer one does not mix with it.

    Attributes
    ----------
    close : callable
        Closes the file; otherwise it is closed when this object is collected.

    Raises
    ------
    SnapshotError, OSError, ValueError, zipfile.BadZipFile
        If it is missing, damaged or of a newer release.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        opened = ExitStack()
        self._file = opened.enter_context(open_file(path))
        self.close = weakref.finalize(self, opened.close)
        self._columns: dict[str, NDArray[Any]] = {}
        self._starts: dict[str, int] = {}
        self._names: tuple[str, ...] = ()
        try:
            self._archive = parsed(lambda: open_npz(self._file))
            self.meta = Meta.model_validate(json.loads(self.column("meta").tobytes()))
            # One of an older release has fewer columns; what they say is 0 there.
            self._names = tuple(n for n in ROW.names or () if n in self._archive.files)
        except BaseException:
            self.close()
            raise

    @property
    def has_seconds(self) -> bool:
        """Whether sums can be told without reading all rows; not in one of an older release."""
        return self.meta.summary is not None and "seconds" in self._archive.files

    def column(self, name: str) -> NDArray[Any]:
        """Return a column, which is checked as a whole.

        Raises
        ------
        SnapshotError
            If it is damaged, or its file is gone on a network file system.
        """
        if name not in self._columns:
            try:
                column = parsed(lambda: self._archive[name])
                dtype = _OTHER.get(name) or ROW[name]
                if column.dtype != dtype or column.ndim != 1:
                    raise ValueError(f"{name} is {column.dtype} {column.shape}")
            except _UNREADABLE as error:
                raise self._error(error) from None
            self._columns[name] = column
        return self._columns[name]

    def row(self, row: int) -> np.void:
        """Return one row without the columns around it, dtype ROW; not checked.

        Raises
        ------
        SnapshotError
            If its file is gone on a network file system.
        """
        values = np.zeros(1, ROW)
        try:
            for name in self._names:
                # Not mapped into memory: a file that goes away would end the process by a signal.
                size = ROW[name].itemsize
                data = os.pread(self._file.fileno(), size, self._start(name) + row * size)
                values[name] = np.frombuffer(data, ROW[name])
            for name, end in _bounded(self.meta).items():
                if values[name][0] >= max(1, end):
                    raise ValueError(f"{name} is out of range")
        except _UNREADABLE as error:
            raise self._error(error) from None
        return values[0]

    def rows(self) -> NDArray[np.void]:
        """Return all rows, dtype ROW, ascending by block."""
        rows = np.zeros(len(self.column("block")), ROW)
        for name in self._names:
            column = self.column(name)
            if len(column) != len(rows):
                raise self._error(f"{name} has {len(column)} of {len(rows)} rows")
            rows[name] = column
            del self._columns[name]
        blocks = rows["block"]
        if len(rows) and (blocks[0] < 0 or not (blocks[1:] > blocks[:-1]).all()):
            raise self._error("its blocks are not in order")
        for name, values in _bounded(self.meta).items():
            if rows[name].max(initial=0) >= max(1, values):
                raise self._error(f"{name} is out of range")
        for name in ("started", "finished", "read_s", "compute_s", "write_s"):
            if not np.isfinite(rows[name]).all():
                raise self._error(f"{name} is not finite")
        return rows

    def _start(self, name: str) -> int:
        """Byte of the file at which the values of a column start."""
        if name not in self._starts:
            assert self._archive.zip is not None
            info = self._archive.zip.getinfo(f"{name}.npy")
            head = os.pread(self._file.fileno(), _ZIP_HEADER.size, info.header_offset)
            before = info.header_offset + _ZIP_HEADER.size + sum(_ZIP_HEADER.unpack(head))
            assert self.meta.summary is not None
            values = self.meta.summary.rows * ROW[name].itemsize
            self._starts[name] = before + info.file_size - values
        return self._starts[name]

    def _error(self, error: object) -> SnapshotError:
        return SnapshotError(f"{self._path} cannot be read: {error}")


class SnapshotTable:
    """As `BlockTable`, but begins with a snapshot and reads no more of it than is needed.

    Parameters
    ----------
    snapshot : Snapshot
        One that has seconds.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        assert snapshot.meta.summary is not None
        self._summary = snapshot.meta.summary
        self._size = self._summary.rows
        self._seconds = snapshot.column("seconds")
        # Records of newer lines, and the rows of the snapshot that they replace.
        self._newer = BlockTable()
        self._replaced = BlockTable()

    @property
    def version(self) -> int:
        """A number that grows with every change."""
        return self._newer.version

    def find(self, block: int) -> int:
        """Row of a block, or -1."""
        newer = self._newer.find(block)
        if newer >= 0:
            return self._size + newer
        blocks = self._snapshot.column("block")
        row = int(np.searchsorted(blocks, block))
        return row if row < len(blocks) and blocks[row] == block else -1

    def row(self, row: int) -> np.void:
        """Values of a row by name."""
        newer = row - self._size
        return self._newer.row(newer) if newer >= 0 else self._snapshot.row(row)

    def put(self, row: int, values: tuple[Any, ...]) -> None:
        """Set a row (-1: add one); ``values`` in the order of ROW."""
        if 0 <= row < self._size:
            self._replaced.put(-1, self._snapshot.row(row))
        self._newer.put(max(row - self._size, -1), values)

    def values(self, name: str, blocks: NDArray[np.int64]) -> NDArray[Any]:
        """Value of a column for each block number, any order; 0 for a block without a row."""
        values = self._newer.values(name, blocks)
        if self._size:
            old = self._snapshot.column("block")
            row = np.minimum(np.searchsorted(old, blocks), len(old) - 1)
            # A newer row may say open.
            known = (old[row] == blocks) & (self._newer.find_all(blocks) < 0)
            values[known] = self._snapshot.column(name)[row[known]]
        return values

    def last(self) -> int:
        """Largest number of a block that is done or skipped, -1 for none."""
        blocks, ranks = self._snapshot.column("block"), self._snapshot.column("rank")
        old = blocks[(ranks >= BlockState.SKIPPED) & (self._newer.find_all(blocks) < 0)]
        return max(int(old.max(initial=-1)), self._newer.last())

    def counts(self) -> dict[str, int]:
        """Count the blocks by state."""
        return _changed(self._summary.counts, self._newer.counts(), self._replaced.counts())

    def sums(self) -> dict[str, float]:
        """Add up the done blocks."""
        return _changed(self._summary.sums, self._newer.sums(), self._replaced.sums())

    def recent(self, since: float) -> tuple[int, int]:
        """Count the blocks done in the second of a time or later, and their voxels."""
        late = self._seconds[self._seconds["second"] >= math.floor(since)]
        newer, replaced = self._newer.recent(since), self._replaced.recent(since)
        return (
            int(late["blocks"].sum(dtype=np.int64)) + newer[0] - replaced[0],
            int(late["voxels"].sum(dtype=np.int64)) + newer[1] - replaced[1],
        )

    def whole(self) -> BlockTable:
        """Return a table of all rows in memory."""
        rows, newer = self._snapshot.rows(), self._newer.rows
        kept = rows[self._newer.find_all(rows["block"]) < 0]
        rows = np.concatenate([kept, newer])
        table = BlockTable(rows[np.argsort(rows["block"], kind="stable")])
        table.version = self.version
        return table


def _changed(sums: BaseModel, newer: dict[str, Any], replaced: dict[str, Any]) -> dict[str, Any]:
    return {key: getattr(sums, key) + newer[key] - replaced[key] for key in newer}


def _bounded(meta: Meta) -> dict[str, int]:
    """Return the columns whose numbers have an end, and that end."""
    ends = {"rank": len(BlockState), "source": len(meta.sources), "reason": len(meta.reasons)}
    return ends | {"offset": 2**63}


def _seconds(rows: NDArray[np.void]) -> NDArray[np.void]:
    """Count the done blocks and their voxels by the second in which they were done."""
    done = rows["rank"] == BlockState.DONE
    ends = np.floor(rows["finished"][done])
    order = np.argsort(ends, kind="stable")
    second, starts = np.unique(ends[order], return_index=True)
    seconds = np.zeros(len(second), _SECOND)
    seconds["second"] = second
    seconds["blocks"] = np.diff(np.append(starts, len(ends)))
    if len(second):
        voxels = rows["voxels"][done][order]
        seconds["voxels"] = np.add.reduceat(voxels, starts, dtype=np.uint64)
    return seconds


def _add(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def _remove_stale(folder: Path) -> None:
    """Remove what a killed compaction has left."""
    for path in folder.glob(".compact*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()
