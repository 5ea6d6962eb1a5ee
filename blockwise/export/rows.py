"""Rows about segments, made box by box and read segment by segment, in bounded memory.

Each batch of boxes writes one part: its rows, sorted by segment. A range of segments that has
about `ROWS` rows is then read from all parts, so what is put together of it fits into memory
however many segments there are. Both are the same for any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agq.blockwise.storage.arrays import map_array, save_array

ROWS = 2**20
"""About as many rows are put together at once."""

_SAMPLES = 2**20

Rows = npt.NDArray[np.void]
"""Structured array with a field ``segment`` (uint64)."""

Span = tuple[int, int]
"""First segment and one past the last."""


def part(folder: Path, number: int) -> Path:
    """Return the file of a batch."""
    return folder / f"{number:08d}.npy"


def write_part(folder: Path, number: int, rows: Rows) -> None:
    """Write the rows of a batch; they keep their order within a segment."""
    save_array(part(folder, number), rows[np.argsort(rows["segment"], kind="stable")])


def spans_of(folder: Path, count: int) -> list[Span]:
    """Return ranges of segments of about `ROWS` rows each, which together hold all.

    Parameters
    ----------
    folder
        Of the parts.
    count
        Number of parts.
    """
    parts = [map_array(part(folder, number))["segment"] for number in range(count)]
    total = sum(map(len, parts))
    step = max(1, total // _SAMPLES)
    sampled = np.sort(np.concatenate([np.zeros(0, np.uint64), *(p[::step] for p in parts)]))
    firsts = [0, *np.unique(sampled[:: max(1, ROWS // step)])[1:].tolist(), 2**64]
    return list(pairwise(firsts))


def read_span(folder: Path, count: int, span: Span) -> Rows:
    """Return the rows of a range, by segment, then batch, then place in it."""
    found = [_within(map_array(part(folder, number)), span) for number in range(count)]
    rows: Any = np.concatenate(found)
    return np.asarray(rows[np.argsort(rows["segment"], kind="stable")])


def _within(rows: Rows, span: Span) -> Rows:
    first, end = span
    segments = rows["segment"]
    start = np.searchsorted(segments, np.uint64(first))
    stop = len(rows) if end >= 2**64 else np.searchsorted(segments, np.uint64(end))
    return np.asarray(rows[start:stop])


def starts_of(rows: Rows) -> npt.NDArray[np.int64]:
    """Return where each segment begins in sorted rows."""
    segments = rows["segment"]
    return np.flatnonzero(np.concatenate([[len(rows) > 0], segments[1:] != segments[:-1]]))


def batches_of(boxes: int, most: int = 64) -> Sequence[range]:
    """Return the boxes of each batch; the same for any number of workers."""
    size = max(1, min(most, boxes // 32))
    return [range(at, min(at + size, boxes)) for at in range(0, boxes, size)]
