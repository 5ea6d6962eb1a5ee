"""The table of a journal over a snapshot whose columns are read when they are asked for.

A status of 10^7 blocks needs sums, which the snapshot has, and what the lines since then change.
Reading all of it takes seconds and 770 MB.
"""

import os
import struct
import weakref
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.journal.pages import PAGE_ROWS, by_page, groups
from agq.blockwise.journal.records import STATE_RANK
from agq.blockwise.journal.table import COUNTED, ROW, TIMED, BlockTable, add_totals
from agq.blockwise.storage.npz import parsed
from agq.errors import InputError

_DONE: Final = STATE_RANK["done"]
#: What the sums of rows are made from.
_SUMMED: Final = ("rank", "started", "finished", *COUNTED, *TIMED)
#: A member's header in a zip: the sizes of its name and of its extra fields.
_ZIP_HEADER: Final = struct.Struct("<26xHH")
_UNREADABLE: Final = (OSError, ValueError, KeyError, EOFError, struct.error, zipfile.BadZipFile)


class SnapshotError(InputError):
    """A snapshot cannot be read any more; a journal read anew says all of it."""


class SnapshotColumns:
    """The columns of a snapshot, or pages of them, read and checked when they are first asked for.

    Parameters
    ----------
    path : Path
        The snapshot; it stays open, so that a newer one does not mix with it.

    Attributes
    ----------
    close : callable
        Closes the file, which otherwise happens when nobody uses this any more.

    Raises
    ------
    OSError, ValueError, zipfile.BadZipFile
        If it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self.close = weakref.finalize(self, self._file.close)
        try:
            self._archive = np.load(self._file, allow_pickle=False)
        except BaseException:
            self.close()
            raise
        self._columns: dict[str, NDArray[Any]] = {}
        self._pages: dict[tuple[str, int], NDArray[Any]] = {}
        self._starts: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._archive.files

    def __getitem__(self, name: str) -> NDArray[Any]:
        column = self._columns.get(name)
        if column is None:
            try:
                column = self._columns[name] = parsed(lambda: self._archive[name])
            except _UNREADABLE as error:
                raise self._error(error) from None
        return column

    @property
    def index(self) -> NDArray[np.void]:
        """One row per page, dtype `agq.blockwise.journal.pages.PAGE`."""
        return self["pages"]

    def page(self, name: str, number: int) -> NDArray[Any]:
        """Return one page of a column."""
        page = self._pages.get((name, number))
        if page is None:
            try:
                page = self._pages[name, number] = self._read_page(name, number)
            except _UNREADABLE as error:
                raise self._error(error) from None
        return page

    def _read_page(self, name: str, number: int) -> NDArray[Any]:
        # Not mapped into memory: a file that a network file system takes away would be a signal.
        entry = self.index[number]
        size = ROW[name].itemsize
        data = os.pread(
            self._file.fileno(),
            int(entry["rows"]) * size,
            self._start(name) + number * PAGE_ROWS * size,
        )
        if zlib.crc32(data) != entry["sums"][(ROW.names or ()).index(name)]:
            raise ValueError(f"checksum of {name} differs")
        return np.frombuffer(data, ROW[name])

    def _start(self, name: str) -> int:
        """Byte of the file at which the values of a column start."""
        start = self._starts.get(name)
        if start is None:
            info = self._archive.zip.getinfo(f"{name}.npy")
            head = os.pread(self._file.fileno(), _ZIP_HEADER.size, info.header_offset)
            before = info.header_offset + _ZIP_HEADER.size + sum(_ZIP_HEADER.unpack(head))
            values = int(self.index["rows"].sum(dtype=np.int64)) * ROW[name].itemsize
            start = self._starts[name] = before + info.file_size - values
        return start

    def _error(self, error: Exception) -> SnapshotError:
        return SnapshotError(f"{self._path} cannot be read: {error}")


class _Row(Mapping[str, Any]):
    """One row of the snapshot, whose columns are read when they are asked for."""

    def __init__(self, columns: SnapshotColumns, row: int) -> None:
        self._columns = columns
        self._page, self._place = divmod(row, PAGE_ROWS)

    def __getitem__(self, name: str) -> Any:
        return self._columns.page(name, self._page)[self._place]

    def __iter__(self) -> Any:
        return iter(ROW.names or ())

    def __len__(self) -> int:
        return len(ROW.names or ())


class LazyBlockTable:
    """As `BlockTable`, but begins with a snapshot and reads no more of it than is needed.

    Parameters
    ----------
    columns : SnapshotColumns
        Columns of the snapshot, sorted by block.
    summary : dict
        What `BlockTable.summary` said of them when they were written.
    """

    def __init__(self, columns: SnapshotColumns, summary: dict[str, Any]) -> None:
        # Of blocks that have ended since.
        self._fresh = BlockTable()
        self._columns = columns
        self._base = summary
        # Rows of the snapshot that a newer record replaces, and a table of them.
        self._hidden: list[int] = []
        self._old = BlockTable()
        self._whole: BlockTable | None = None

    def __len__(self) -> int:
        if self._whole is not None:
            return len(self._whole)
        return int(self._base["rows"]) - len(self._hidden) + len(self._fresh)

    @property
    def version(self) -> int:
        """A number that grows with every change."""
        return (self._fresh if self._whole is None else self._whole).version

    @property
    def rows(self) -> NDArray[np.void]:
        """All rows, dtype ROW; reads the whole snapshot the first time."""
        if self._whole is None:
            fresh = self._fresh.rows
            kept = np.ones(self._base["rows"], bool)
            kept[self._hidden] = False
            rows = np.empty(int(kept.sum()) + len(fresh), ROW)
            for name in ROW.names or ():
                rows[name] = np.concatenate([self._columns[name][kept], fresh[name]])
            whole = BlockTable(rows[np.argsort(rows["block"], kind="stable")])
            whole.version = self._fresh.version
            self._whole = whole
            self._columns.close()
        return self._whole.rows

    def find(self, block: int) -> int:
        """Row of a block, or -1."""
        if self._whole is not None:
            return self._whole.find(block)
        fresh = self._fresh.find(block)
        if fresh >= 0:
            return int(self._base["rows"]) + fresh
        page = int(np.searchsorted(self._columns.index["first"], block, "right")) - 1
        if page < 0:
            return -1
        blocks = self._columns.page("block", page)
        place = int(np.searchsorted(blocks, block))
        there = place < len(blocks) and blocks[place] == block
        return page * PAGE_ROWS + place if there else -1

    def row(self, row: int) -> Any:
        """Values of a row by name."""
        if self._whole is not None:
            return self._whole.row(row)
        n = int(self._base["rows"])
        return self._fresh.row(row - n) if row >= n else _Row(self._columns, row)

    def put(self, row: int, values: tuple[Any, ...]) -> None:
        """Set a row (-1: add one); ``values`` in the order of ROW."""
        if self._whole is not None:
            self._whole.put(row, values)
            return
        n = int(self._base["rows"])
        if 0 <= row < n:
            self._hidden.append(row)
        self._fresh.put(row - n if row >= n else -1, values)

    def ranks(self, blocks: NDArray[np.int64]) -> NDArray[np.uint8]:
        """State ranks (0 none, 1 failed, 2 skipped, 3 done) of block numbers, any order."""
        if self._whole is not None:
            return self._whole.ranks(blocks)
        found = self._fresh.ranks(blocks)
        missing = np.flatnonzero(found == 0)
        pages = np.searchsorted(self._columns.index["first"], blocks[missing], "right") - 1
        for page, chosen in groups(pages):
            if page >= 0:
                asked = missing[chosen]
                known = self._columns.page("block", page)
                place = np.minimum(np.searchsorted(known, blocks[asked]), len(known) - 1)
                there = known[place] == blocks[asked]
                found[asked[there]] = self._columns.page("rank", page)[place[there]]
        return found

    def counts(self) -> dict[str, int]:
        """Count the blocks by state."""
        if self._whole is not None:
            return self._whole.counts()
        fresh, hidden = self._fresh.counts(), self._replaced().counts()
        return {s: self._base["counts"][s] - hidden[s] + fresh[s] for s in fresh}

    def totals(self) -> dict[str, float]:
        """Add up the done blocks; first start and last end of any block."""
        if self._whole is not None:
            return self._whole.totals()
        fresh = self._fresh.totals()
        if not self._hidden:
            return add_totals(self._base["totals"], fresh)
        base = dict(self._base["totals"])
        for name, value in self._replaced().totals().items():
            base[name] -= value
        # A first start or a last end may have been that of a block done again since.
        hidden = np.array(self._hidden, np.int64)
        first, last = (self._columns.index[name].copy() for name in ("started", "finished"))
        for page, chosen in by_page(hidden):
            started, finished = (self._columns.page(n, page) for n in ("started", "finished"))
            kept = np.ones(len(started), bool)
            kept[hidden[chosen] % PAGE_ROWS] = False
            first[page] = started[kept & (started > 0)].min(initial=np.inf)
            last[page] = finished[kept].max(initial=0.0)
        begun = float(first.min(initial=np.inf))
        base["started"] = begun if np.isfinite(begun) else 0.0
        base["finished"] = float(last.max(initial=0.0))
        return add_totals(base, fresh)

    def recent(self, since: float) -> tuple[int, int]:
        """Count the blocks done at or after a time, and their voxels."""
        if self._whole is not None:
            return self._whole.recent(since)
        fresh, hidden = self._fresh.recent(since), self._replaced().recent(since)
        base = self._base_recent(since)
        return base[0] - hidden[0] + fresh[0], base[1] - hidden[1] + fresh[1]

    def _base_recent(self, since: float) -> tuple[int, int]:
        index = self._columns.index
        whole = index["first_done"] >= since
        blocks = int(index["done"].sum(where=whole, dtype=np.int64))
        voxels = int(index["voxels"].sum(where=whole, dtype=np.int64))
        # What ended before and after lies in one page.
        for page in np.flatnonzero(~whole & ~(index["last_done"] < since)).tolist():
            ends, rank, sizes = (
                self._columns.page(name, page) for name in ("finished", "rank", "voxels")
            )
            late = (ends >= since) & (rank == _DONE)
            blocks += int(late.sum())
            voxels += int(sizes.sum(where=late, dtype=np.int64))
        return blocks, voxels

    def summary(self) -> dict[str, Any]:
        """Return what a snapshot keeps beside the rows."""
        _ = self.rows
        assert self._whole is not None
        return self._whole.summary()

    def _replaced(self) -> BlockTable:
        """Return the rows of the snapshot that no longer count, as far as they are summed up."""
        if len(self._old) < len(self._hidden):
            hidden = np.array(self._hidden, np.int64)
            rows = np.zeros(len(hidden), ROW)
            for page, chosen in by_page(hidden):
                for name in _SUMMED:
                    rows[name][chosen] = self._columns.page(name, page)[hidden[chosen] % PAGE_ROWS]
            self._old = BlockTable(rows)
        return self._old
