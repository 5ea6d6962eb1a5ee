"""The table of a journal over a snapshot whose columns are read when they are asked for.

A status of 10^7 blocks needs sums, which the snapshot has, and what the lines since then change.
Reading all of it takes seconds and 770 MB.
"""

import weakref
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockwise.errors import InputError
from blockwise.journal_records import STATE_RANK
from blockwise.journal_table import ROW, BlockTable, add_totals

_DONE = STATE_RANK["done"]


class SnapshotError(InputError):
    """A snapshot cannot be read any more; a journal read anew says all of it."""


class SnapshotColumns:
    """The columns of a snapshot, each read, and checked, when it is first asked for.

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
        file = path.open("rb")
        self.close = weakref.finalize(self, file.close)
        try:
            self._archive = np.load(file, allow_pickle=False)
        except BaseException:
            self.close()
            raise
        self._columns: dict[str, NDArray[Any]] = {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        column = self._columns.get(name)
        if column is None:
            try:
                column = self._columns[name] = self._archive[name]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise SnapshotError(f"{self._path} cannot be read: {error}") from None
        return column


class _Row(Mapping[str, Any]):
    """One row of the snapshot, whose columns are read when they are asked for."""

    def __init__(self, columns: SnapshotColumns, row: int) -> None:
        self._columns = columns
        self._row = row

    def __getitem__(self, name: str) -> Any:
        return self._columns[name][self._row]

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
        # Rows of the snapshot that a newer record replaces.
        self._hidden: list[int] = []
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
        blocks = self._columns["block"]
        row = int(np.searchsorted(blocks, block))
        return row if row < len(blocks) and blocks[row] == block else -1

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
        if missing.size and self._base["rows"]:
            known = self._columns["block"]
            place = np.minimum(np.searchsorted(known, blocks[missing]), len(known) - 1)
            there = known[place] == blocks[missing]
            found[missing[there]] = self._columns["rank"][place[there]]
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
        kept = np.ones(self._base["rows"], bool)
        kept[self._hidden] = False
        started = self._columns["started"][kept]
        base["started"] = float(started[started > 0].min(initial=np.inf))
        base["started"] = base["started"] if np.isfinite(base["started"]) else 0.0
        base["finished"] = float(self._columns["finished"][kept].max(initial=0.0))
        return add_totals(base, fresh)

    def recent(self, since: float) -> tuple[int, int]:
        """Count the blocks done at or after a time, and their voxels."""
        if self._whole is not None:
            return self._whole.recent(since)
        fresh, hidden = self._fresh.recent(since), self._replaced().recent(since)
        base = self._base_recent(since)
        return base[0] - hidden[0] + fresh[0], base[1] - hidden[1] + fresh[1]

    def _base_recent(self, since: float) -> tuple[int, int]:
        if since > self._base["last_done"]:
            return 0, 0
        if since <= self._base["first_done"]:
            return self._base["counts"]["done"], int(self._base["totals"]["voxels"])
        late = (self._columns["finished"] >= since) & (self._columns["rank"] == _DONE)
        return int(late.sum()), int(self._columns["voxels"].sum(where=late, dtype=np.int64))

    def summary(self) -> dict[str, Any]:
        """Return what a snapshot keeps beside the rows."""
        _ = self.rows
        assert self._whole is not None
        return self._whole.summary()

    def _replaced(self) -> BlockTable:
        """Return the rows of the snapshot that no longer count."""
        rows = np.zeros(len(self._hidden), ROW)
        if self._hidden:
            for name in ROW.names or ():
                rows[name] = self._columns[name][self._hidden]
        return BlockTable(rows)
