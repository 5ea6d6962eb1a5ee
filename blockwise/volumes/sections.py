"""Grey values of a volume section by section, from a sample: contrast, and sections that stand out.

Of a slab of sections, as deep as a storage chunk, whole chunks at up to `WINDOWS` evenly spread
places are read, and every few voxels of them are looked at. So the cost follows the number of
chunks that are read, and the same volume always gives the same numbers.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agq.blockwise.volumes.open import Volume
from agq.blockwise.volumes.triples import Box

WINDOWS: Final = 16
"""Most places in a section that are looked at."""

PERCENTILES: Final = (1.0, 99.0)
"""Of the grey values of a section, without those that are blank: its dark and its bright end."""

_FEWEST_WINDOWS: Final = 4
_SIDE: Final = 128
_THREADS: Final = 16
_BYTES: Final = 2**30
_LEAST_SHARE: Final = 0.02
# What a section may differ by from the sections around it, as a share of the range of greys.
_AROUND: Final = 5
_SHADE: Final = 0.15
_NOISE: Final = 6 * 1.4826
_FAINT: Final = 0.5
_BLANK: Final = 0.2

Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Sections:
    """Grey values of sections that were looked at, ascending.

    0 and the largest value of an integer type count as blank: fill outside tissue, or saturated.

    Attributes
    ----------
    z
        int64 (n,): indices in the volume.
    low, high
        (n,): `PERCENTILES` of what is not blank; NaN in a section that is blank.
    mean
        (n,): of what is not blank; NaN likewise.
    blank
        (n,): share of blank voxels.
    least, most
        Smallest and largest value seen.
    span
        Range of the grey values that a predictor takes as black to white: that of an integer
        type, 1 for floats.
    """

    z: npt.NDArray[np.int64]
    low: Floats
    high: Floats
    mean: Floats
    blank: Floats
    least: float
    most: float
    span: float

    def usual(self) -> tuple[float, float] | None:
        """Return the medians of `low` and `high`; None if all that was looked at is blank."""
        if np.isnan(self.low).all():
            return None
        return float(np.nanmedian(self.low)), float(np.nanmedian(self.high))

    def ends(self) -> Floats:
        """Return low and high of each section, (n, 2); the usual ones of a section without any."""
        low, high = self.usual() or (0.0, 0.0)
        ends = np.stack([self.low, self.high], axis=1)
        ends[~(ends[:, 1] > ends[:, 0])] = (low, high if high > low else low + self.span)
        return ends

    def outstanding(self) -> dict[int, str]:
        """Return the sections that differ from those around them, and in what."""
        if self.usual() is None:
            return {}
        width = self.high - self.low
        shade = self.mean / self.span
        apart = shade - _around(shade)
        limit = max(_SHADE, _NOISE * float(np.nanmedian(np.abs(apart))))
        empty = self.blank - _around(self.blank) > _BLANK
        found = {}
        for i, z in enumerate(self.z.tolist()):
            if empty[i] or np.isnan(self.mean[i]):
                found[z] = "blank"
            elif width[i] < _FAINT * _around(width)[i]:
                found[z] = "low contrast"
            elif abs(apart[i]) > limit:
                found[z] = "dark" if apart[i] < 0 else "bright"
        return found


def read_sections(
    volume: Volume,
    *,
    within: Box | None = None,
    most_reads: int | None = None,
    on_progress: Progress | None = None,
) -> Sections:
    """Look at the sections of a volume.

    Parameters
    ----------
    volume
        The volume.
    within
        Only what is in this box of voxels (start, stop).
    most_reads
        Read about so many chunks at most, and so look at slabs evenly spread along z only; None:
        look at every section.
    on_progress
        Called with slabs done and slabs in all.

    Raises
    ------
    InputError
        If a section cannot be read.
    """
    start, stop = within or ((0, 0, 0), volume.shape)
    depth = volume.chunks[0]
    slabs = [
        (max(z, start[0]), min(z + depth, stop[0]))
        for z in range(start[0] // depth * depth, stop[0], depth)
    ]
    windows = WINDOWS
    if most_reads is not None:
        windows = min(WINDOWS, max(_FEWEST_WINDOWS, most_reads // len(slabs)))
        slabs = _spread(slabs, max(1, most_reads // windows))
    a_side = math.isqrt(windows)
    y, x = (_spans(start[i], stop[i], volume.chunks[i], a_side) for i in (1, 2))
    threads = _BYTES // (math.prod(volume.chunks) * volume.dtype.itemsize)

    def look(slab: tuple[int, int]) -> list[tuple[float, ...]]:
        parts = []
        for (top, bottom), (left, right) in product(y, x):
            part = volume.read((slab[0], top, left), (slab[1], bottom, right))
            steps = (-(-n // _SIDE) for n in part.shape[1:])
            part = part[(slice(None), *(slice(None, None, step) for step in steps))]
            parts.append(part.reshape(len(part), -1))
        return [_looked_at(section) for section in np.concatenate(parts, axis=1)]

    rows: list[tuple[float, ...]] = []
    with ThreadPoolExecutor(max(1, min(_THREADS, threads))) as pool:
        for done, found in enumerate(pool.map(look, slabs), start=1):
            rows += found
            if on_progress is not None:
                on_progress(done, len(slabs))
    low, high, mean, blank, least, most = np.array(rows, np.float64).T
    return Sections(
        z=np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in slabs]),
        low=low,
        high=high,
        mean=mean,
        blank=blank,
        least=float(np.fmin.reduce(least)),
        most=float(np.fmax.reduce(most)),
        span=1.0 if volume.dtype.kind == "f" else float(np.iinfo(volume.dtype).max),
    )


def _looked_at(values: npt.NDArray[Any]) -> tuple[float, ...]:
    """Return low, high, mean, share of blank, least and most of some voxels of one section."""
    finite = np.isfinite(values)
    seen = finite & (values != 0)
    if values.dtype.kind == "u":
        seen &= values != np.iinfo(values.dtype).max
    blank = 1 - float(seen.mean())
    ends = (
        (float(values[finite].min()), float(values[finite].max()))
        if finite.any()
        else (
            math.nan,
            math.nan,
        )
    )
    if seen.mean() < _LEAST_SHARE:
        return (math.nan, math.nan, math.nan, blank, *ends)
    low, high = np.percentile(values[seen], PERCENTILES)
    return (float(low), float(high), float(values[seen].mean(dtype=np.float64)), blank, *ends)


def _spread(items: list[Any], count: int) -> list[Any]:
    """Return so many of some items at most, evenly spread."""
    n = len(items)
    return items if n <= count else [items[(2 * i + 1) * n // (2 * count)] for i in range(count)]


def _spans(start: int, stop: int, chunk: int, count: int) -> list[tuple[int, int]]:
    """Return spans of whole chunks of an axis, so many at most."""
    step = chunk * -(-_SIDE // chunk)
    firsts = _spread(list(range(start // chunk * chunk, stop, step)), count)
    return [(max(first, start), min(first + step, stop)) for first in firsts]


def _around(values: Floats) -> Floats:
    """Return, for each section, the median of it and the sections before and after it."""
    padded = np.pad(values, _AROUND, constant_values=np.nan)
    rows = np.lib.stride_tricks.sliding_window_view(padded, 2 * _AROUND + 1)
    some = ~np.isnan(rows).all(axis=1)
    medians = np.full(values.size, np.nan)
    medians[some] = np.nanmedian(rows[some], axis=1)
    return medians
