"""The index of a snapshot: what every page of its rows adds up to, and a checksum of each column.

With it a reader finds a block, or counts the blocks done since some time, from a few pages of 10^7
rows. Blocks end roughly in the order of their numbers, so a time divides few pages.
"""

import zlib
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.journal.records import STATE_RANK
from agq.blockwise.journal.table import ROW

#: Rows of a page: 32 KiB of a column of 8 bytes.
PAGE_ROWS: Final = 4096

#: One row per page.
PAGE: Final = np.dtype(
    [
        ("rows", np.uint32),
        ("first", np.int64),  # block number
        ("done", np.uint32),
        ("voxels", np.uint64),  # of the done blocks, as all that follows but the next two
        ("started", np.float64),  # first start of any block, inf for none
        ("finished", np.float64),  # last end of any block
        ("first_done", np.float64),  # inf for none
        ("last_done", np.float64),  # -inf for none
        ("sums", np.uint32, (len(ROW.names or ()),)),  # crc32 by column
    ]
)


def page_index(rows: NDArray[np.void], order: NDArray[np.intp]) -> NDArray[np.void]:
    """Return the index, but for the checksums, of rows in an order; dtype PAGE."""
    starts = np.arange(0, len(rows), PAGE_ROWS)
    index = np.zeros(len(starts), PAGE)
    if not len(starts):
        return index
    index["rows"] = np.diff(np.append(starts, len(rows)))
    index["first"] = rows["block"][order[starts]]
    done = (rows["rank"] == STATE_RANK["done"])[order]
    index["done"] = np.add.reduceat(done, starts, dtype=np.uint32)
    voxels = np.where(done, rows["voxels"][order], np.uint32(0))
    index["voxels"] = np.add.reduceat(voxels, starts, dtype=np.uint64)
    begun = rows["started"][order]
    index["started"] = np.minimum.reduceat(np.where(begun > 0, begun, np.inf), starts)
    ends = rows["finished"][order]
    index["finished"] = np.maximum.reduceat(ends, starts)
    index["first_done"] = np.minimum.reduceat(np.where(done, ends, np.inf), starts)
    index["last_done"] = np.maximum.reduceat(np.where(done, ends, -np.inf), starts)
    return index


def page_sums(column: NDArray[Any]) -> list[int]:
    """Return the checksum of every page of a column, C-contiguous."""
    return [zlib.crc32(column[i : i + PAGE_ROWS].data) for i in range(0, len(column), PAGE_ROWS)]


def by_page(rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Yield (page, which of the row numbers lie in it) for every page that has some."""
    yield from groups(rows // PAGE_ROWS)


def groups(keys: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Yield every key with the places where it stands."""
    order = np.argsort(keys, kind="stable")
    found, starts = np.unique(keys[order], return_index=True)
    if len(found):
        yield from zip(found.tolist(), np.split(order, starts[1:]), strict=True)
