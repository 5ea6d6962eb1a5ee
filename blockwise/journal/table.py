"""The present record of every block as columns: bounded memory at 10^7 blocks."""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.journal.records import BlockState

#: One row per block with a terminal line: 79 bytes.
ROW: Final = np.dtype(
    [
        ("block", np.int64),
        ("rank", np.uint8),
        ("attempt", np.uint16),
        ("source", np.uint32),
        ("offset", np.uint64),
        ("started", np.float64),
        ("finished", np.float64),
        ("read_s", np.float32),
        ("compute_s", np.float32),
        ("write_s", np.float32),
        ("labels", np.uint32),
        ("components", np.uint32),
        ("dropped", np.uint32),
        ("voxels", np.uint32),
        ("digest", np.uint64),
        ("reason", np.uint16),
        ("revision", np.uint16),
    ]
)

_COUNTED: Final = ("voxels", "labels", "components", "dropped")
_TIMED: Final = ("read_s", "compute_s", "write_s")

# Block numbers come in runs along the last axis of the volume: small pages waste little on a
# sparse selection and cost one dict entry per 1024 blocks on a full one.
_PAGE_BITS: Final = 10
_PAGE: Final = 1 << _PAGE_BITS


class BlockTable:
    """Rows by block number, in arrival order, with room to grow.

    A Python dict of 10^7 numbers takes more than a gigabyte; the paged index here takes 4 bytes per
    block number in use.

    Parameters
    ----------
    rows : ndarray, optional
        Rows to begin with, dtype ROW, ascending by block.
    """

    def __init__(self, rows: NDArray[np.void] | None = None) -> None:
        self._rows = np.zeros(1024, ROW) if rows is None else rows
        self._size = 0 if rows is None else len(rows)
        self._pages: dict[int, NDArray[np.int32]] = {}
        self.version = 0
        if rows is not None:
            self._index_all()

    @property
    def rows(self) -> NDArray[np.void]:
        """View of all rows, dtype ROW."""
        return self._rows[: self._size]

    def find(self, block: int) -> int:
        """Row of a block, or -1."""
        page = self._pages.get(block >> _PAGE_BITS)
        return -1 if page is None else int(page[block & (_PAGE - 1)]) - 1

    def row(self, row: int) -> np.void:
        """Values of a row by name."""
        return self._rows[row]

    def put(self, row: int, values: tuple[Any, ...] | np.void) -> None:
        """Set a row (-1: add one); ``values`` in the order of ROW."""
        if row < 0:
            if self._size == len(self._rows):
                grown = np.zeros(max(1024, self._size * 3 // 2), ROW)
                grown[: self._size] = self._rows
                self._rows = grown
            row = self._size
            block = int(values[0])
            page = self._pages.get(block >> _PAGE_BITS)
            if page is None:
                page = self._pages[block >> _PAGE_BITS] = np.zeros(_PAGE, np.int32)
            self._rows[row] = values
            page[block & (_PAGE - 1)] = row + 1
            self._size += 1
        else:
            self._rows[row] = values
        self.version += 1

    def values(self, name: str, blocks: NDArray[np.int64]) -> NDArray[Any]:
        """Value of a column for each block number, any order; 0 for a block without a row."""
        out = np.zeros(len(blocks), ROW[name])
        row = self.find_all(blocks)
        out[row >= 0] = self.rows[name][row[row >= 0]]
        return out

    def last(self) -> int:
        """Largest number of a block that is done or skipped, -1 for none."""
        rows = self.rows
        return int(rows["block"].max(where=rows["rank"] >= BlockState.SKIPPED, initial=-1))

    def find_all(self, blocks: NDArray[np.int64]) -> NDArray[np.int32]:
        """Row of each block number, any order; -1 for a block without one."""
        out = np.full(len(blocks), -1, np.int32)
        if not self._size or not len(blocks):
            return out
        keys = blocks >> _PAGE_BITS
        order = np.argsort(keys, kind="stable")
        pages, starts = np.unique(keys[order], return_index=True)
        for key, picked in zip(pages.tolist(), np.split(order, starts[1:]), strict=True):
            page = self._pages.get(key)
            if page is not None:
                out[picked] = page[blocks[picked] & (_PAGE - 1)] - 1
        return out

    def counts(self) -> dict[str, int]:
        """Count the blocks by state."""
        counts = np.bincount(self.rows["rank"], minlength=len(BlockState))
        return {state.word: int(counts[state]) for state in BlockState if state}

    def sums(self) -> dict[str, float]:
        """Add up the done blocks."""
        rows = self.rows
        done = rows["rank"] == BlockState.DONE
        counted = {n: int(rows[n].sum(where=done, dtype=np.int64)) for n in _COUNTED}
        seconds = {n: float(rows[n].sum(where=done, dtype=np.float64)) for n in _TIMED}
        return {**counted, **seconds}

    def recent(self, since: float) -> tuple[int, int]:
        """Count the blocks done in the second of a time or later, and their voxels."""
        rows = self.rows
        late = (rows["finished"] >= math.floor(since)) & (rows["rank"] == BlockState.DONE)
        return int(late.sum()), int(rows["voxels"].sum(where=late, dtype=np.int64))

    def _index_all(self) -> None:
        blocks = self.rows["block"]
        if not len(blocks):
            return
        keys = blocks >> _PAGE_BITS
        # The rows are sorted by block, so a page is one run of rows.
        pages, starts = np.unique(keys, return_index=True)
        stops = np.append(starts[1:], len(blocks))
        low = (blocks & (_PAGE - 1)).astype(np.int32)
        for key, start, stop in zip(pages.tolist(), starts.tolist(), stops.tolist(), strict=True):
            page = self._pages[key] = np.zeros(_PAGE, np.int32)
            page[low[start:stop]] = np.arange(start + 1, stop + 1, dtype=np.int32)
