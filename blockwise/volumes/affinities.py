"""Affinities of another model: an array with a channel axis, of zarr or N5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.volumes.find import find_array, sources_of
from agq.blockwise.volumes.open import Volume, in_order, open_stored, read_stored
from agq.blockwise.volumes.placement import place
from agq.blockwise.volumes.triples import Triple, triple
from agq.credentials import hide_address
from agq.errors import InputError


@dataclass(frozen=True)
class Affinities:
    """Affinities to the voxel before on z, y and x; picklable, nothing has been read yet.

    Attributes
    ----------
    name
        For messages.
    channels
        Channels of the array that hold the affinities on z, y and x.
    shape, chunks
        Voxels of the volume, and of the unit that storage reads, (z, y, x).
    dtype
        Type of a voxel.
    """

    name: str
    channels: Triple
    shape: Triple
    chunks: Triple
    dtype: np.dtype[Any]
    _array: Any = field(repr=False)
    _axes: tuple[int, ...]
    _ndim: int

    @classmethod
    def open(cls, path: str, like: Volume, channels: Sequence[int] = (0, 1, 2)) -> Affinities:
        """Open an array and check that it belongs to a volume of fragments.

        Parameters
        ----------
        path
            The array: a path, or ``path::dataset``.
        channels
            Which channels are the affinities on z, y and x.

        Raises
        ------
        InputError
            If there is no such array, or it does not fit the fragments.
        """
        container, _, dataset = path.partition("::")
        location, metadata = find_array(container, dataset or None)
        path = hide_address(container) + (dataset and f"::{dataset}")
        where = f"affinities {path}"
        shape = metadata.shape or ()
        is_n5 = metadata.format == "n5"
        if len(shape) < 4:
            raise _misfit(where, shape, like)
        placed = place(
            sources_of(location, metadata),
            shape,
            voxel_size=like.voxel_size,
            offset=like.offset,
            given_by="the fragments",
            unit=like.unit,
            x_first=is_n5,
            where=where,
        )
        others = [axis for axis in range(len(shape)) if axis not in placed.axes]
        axes = (max(others, key=lambda axis: shape[axis]), *placed.axes)
        count, *volume = (shape[axis] for axis in axes)
        if tuple(volume) != like.shape or prod(shape[axis] for axis in others) != count:
            raise _misfit(where, shape[::-1] if is_n5 else shape, like)
        if len(set(channels)) != 3 or not all(0 <= c < count for c in channels):
            raise InputError(
                f"{where}: channels {tuple(channels)} are not three of its {count} (--channels)"
            )
        array, chunks, dtype = open_stored(location, metadata, where)
        if dtype != np.uint8 and dtype.kind != "f":
            raise InputError(
                f"{where}: {dtype} is neither uint8 (255 is 1.0) nor float (0 to 1); convert them"
            )
        stored = triple(chunks[axis] for axis in placed.axes)
        return cls(path, triple(channels), like.shape, stored, dtype, array, axes, len(shape))

    def read(self, start: Sequence[int], stop: Sequence[int]) -> NDArray[Any]:
        """Return (3, z, y, x) of a voxel box, as stored.

        Raises
        ------
        InputError
            If the storage cannot read it.
        """
        # In one piece: a stored chunk often holds all channels, and would be read for each.
        first = min(self.channels)
        ranges = [range(1)] * self._ndim
        begin, end = (first, *start), (max(self.channels) + 1, *stop)
        for axis, a, b in zip(self._axes, begin, end, strict=True):
            ranges[axis] = range(a, b)
        data = in_order(read_stored(self._array, ranges, self.name), self._axes)
        return data[[channel - first for channel in self.channels]]


def _misfit(where: str, shape: Sequence[int], like: Volume) -> InputError:
    hint = ""
    if len(shape) == 4 and tuple(shape[:3]) == like.shape:
        hint = "; its channels come last: move them to the front, or name the axes"
    return InputError(
        f"{where}: shape {tuple(shape)} is not (3, z, y, x) of the fragments, "
        f"{(3, *like.shape)}{hint}"
    )
