"""What a volume holds, as a short record: checksums of voxels read at chosen places.

Two volumes with the same record hold the same data as far as it was read, wherever they lie and
however they are stored: the voxels are decoded first, so a path, a file time, a compression and a
chunk shape do not count. A volume of up to `BOXES` chunks and `BUDGET` bytes is read whole. Of a
larger one, as many chunks are read as these two allow, spread evenly over all three axes: a volume
of 10^6 chunks costs no more than one of 10^3, and a change of a few of its chunks may be missed.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from agq.blockwise.storage.files import checksum
from agq.blockwise.volumes.triples import Box, Triple, triple
from agq.errors import InputError

BUDGET = 2**27
"""Bytes of voxels that one record reads at most, unless single chunks are larger."""

BOXES = 1024
"""Most boxes of a record."""

_LEAST_BOXES = 8
_MOST_BOX_BYTES = 2**25
_THREADS = 16
_UNREADABLE = "-"
# The plastic number of three dimensions: steps of its powers fill a cube evenly.
_STEPS = tuple(1.2207440846057596**-power for power in (1, 2, 3))


class Voxels(Protocol):
    """What is read of a volume: `agq.blockwise.volumes.open.Volume`, or affinities."""

    @property
    def name(self) -> str:
        """Container and array for messages."""

    @property
    def shape(self) -> Triple:
        """Voxels (z, y, x)."""

    @property
    def chunks(self) -> Triple:
        """Voxels (z, y, x) of the unit that storage reads."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a voxel."""

    def read(self, start: Triple, stop: Triple, /) -> npt.NDArray[Any]:
        """Return the voxels of a box, with any leading axes."""


class Content(BaseModel):
    """The checksums of a volume's voxels at some places."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[int, int, int]
    """Voxels (z, y, x) of the volume."""

    box: tuple[int, int, int]
    """Voxels (z, y, x) of a box; those at the end of an axis are smaller."""

    count: int
    """Boxes asked for: with `shape` and `box` it says which they are."""

    sums: str
    """Checksums of the boxes, with spaces between; ``-`` where a box could not be read."""


def read_content(volume: Voxels) -> Content:
    """Read the record of a volume.

    Parameters
    ----------
    volume
        The volume. What of it cannot be read is left out: the blocks that need it say so.
    """
    box = _box(volume)
    count = max(_LEAST_BOXES, min(BOXES, BUDGET // (prod(box) * volume.dtype.itemsize)))
    sums = _sums(volume, _places(volume.shape, box, count))
    return Content(shape=volume.shape, box=box, count=count, sums=" ".join(sums))


def difference(volume: Voxels, recorded: Content, most: int | None = None) -> str | None:
    """Say in what a volume differs from its record.

    Parameters
    ----------
    volume
        The volume.
    recorded
        The record; it says where to read.
    most
        Compare about so many boxes, evenly chosen; None: all.

    Returns
    -------
    text
        For a message, such as ``its voxels (0, 0, 0) to (32, 128, 128) are others``; None if
        nothing differs. A box that could not be read, then or now, does not differ.
    """
    if volume.shape != recorded.shape:
        return f"its shape is {volume.shape}, not {recorded.shape}"
    sums = recorded.sums.split()
    step = 1 if most is None else -(-len(sums) // most)
    places = _places(volume.shape, recorded.box, recorded.count)[::step]
    for place, old, new in zip(places, sums[::step], _sums(volume, places), strict=True):
        if old != new and _UNREADABLE not in (old, new):
            return f"its voxels {place[0]} to {place[1]} are others"
    return None


def require_content(volume: Voxels, recorded: Content, field: str, most: int | None = None) -> None:
    """Refuse a volume that differs from its record.

    Parameters
    ----------
    volume, recorded, most
        As for `difference`.
    field
        What the configuration calls the volume.

    Raises
    ------
    InputError
        Naming the field, the file and what differs.
    """
    if found := difference(volume, recorded, most):
        raise InputError(
            f"{field}: {volume.name} has changed since the run began: {found}; blocks made of both "
            "cannot be mixed: put the former volume back, choose another run_dir, or start over "
            "with --overwrite"
        )


def _box(volume: Voxels) -> Triple:
    """Return the chunk of a volume, cut along z where it is large."""
    z, y, x = map(min, volume.chunks, volume.shape)
    section = y * x * volume.dtype.itemsize
    return max(1, min(z, _MOST_BOX_BYTES // section)), y, x


def _places(shape: Triple, box: Triple, count: int) -> list[Box]:
    """Return boxes of a volume, `count` at most; the same for the same arguments."""
    counts = triple(-(-n // b) for n, b in zip(shape, box, strict=True))
    if prod(counts) <= count:
        indices: Iterable[Triple] = (
            (z, y, x) for z in range(counts[0]) for y in range(counts[1]) for x in range(counts[2])
        )
    else:
        # As a mapping: a place that comes again counts once.
        indices = dict.fromkeys(
            triple(int(n * ((0.5 + i * step) % 1)) for n, step in zip(counts, _STEPS, strict=True))
            for i in range(count)
        )
    return [_box_at(index, shape, box) for index in indices]


def _box_at(index: Triple, shape: Triple, box: Triple) -> Box:
    start = triple(i * b for i, b in zip(index, box, strict=True))
    return start, triple(min(s + b, n) for s, b, n in zip(start, box, shape, strict=True))


def _sums(volume: Voxels, places: list[Box]) -> list[str]:
    def read(place: Box) -> str:
        try:
            return checksum(volume.read(*place))
        except InputError:  # a missing server, a damaged chunk
            return _UNREADABLE

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(read, places))
