"""Affinities of another model: an array with a channel axis in front, of zarr or N5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.volumes.location import locate
from agq.blockwise.volumes.metadata import join, read_metadata
from agq.blockwise.volumes.open import Volume, open_stored
from agq.blockwise.volumes.placement import from_attributes, to_world
from agq.blockwise.volumes.triples import Triple, triple
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
    """

    name: str
    channels: Triple
    _array: Any
    _is_n5: bool

    @classmethod
    def open(cls, path: str, like: Volume, channels: Sequence[int] = (0, 1, 2)) -> Affinities:
        """Open an array and check that it belongs to a volume of fragments.

        Parameters
        ----------
        path
            The array: a path, or ``path::dataset``.
        like
            The fragments.
        channels
            Which channels are the affinities on z, y and x.

        Raises
        ------
        InputError
            If there is no such array, or it does not fit the fragments.
        """
        container, _, dataset = path.partition("::")
        location = locate(container)
        metadata = read_metadata(location, join(dataset))
        where = f"affinities {path}"
        if metadata is None or metadata.shape is None:
            raise InputError(
                f"{where}: no zarr or N5 array there; name it as path or path::dataset"
            )
        array, _, dtype = open_stored(location, metadata, where)
        is_n5 = metadata.format == "n5"
        shape = tuple(int(n) for n in metadata.shape)
        shape = shape[::-1] if is_n5 else shape
        _check_shape(where, shape, like, channels)
        if dtype != np.uint8 and dtype.kind != "f":
            raise InputError(
                f"{where}: {dtype} is neither uint8 (255 is 1.0) nor float (0 to 1); convert them"
            )
        placement = from_attributes(
            metadata.attributes, len(shape), reversed_axes=is_n5, where=where
        )
        if placement.voxel_size is not None:
            size, offset = to_world(placement, None, None, like.unit, where)
            if size != like.voxel_size or (placement.offset is not None and offset != like.offset):
                raise InputError(
                    f"{where}: voxel size {tuple(size)} and offset {tuple(offset)} are not those of"
                    f" the fragments, {tuple(like.voxel_size)} and {tuple(like.offset)}"
                )
        return cls(path, triple(channels), array, is_n5)

    def read(self, start: Sequence[int], stop: Sequence[int]) -> NDArray[Any]:
        """Return (3, z, y, x) of a voxel box, as stored."""
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        # In one piece: a stored chunk often holds all channels, and would be read for each.
        first = min(self.channels)
        some = slice(first, max(self.channels) + 1)
        if self._is_n5:
            data = self._array[(*box[::-1], some)].read().result().transpose()
        else:
            data = self._array[(some, *box)]
        return np.asarray(data)[[channel - first for channel in self.channels]]


def _check_shape(where: str, shape: tuple[int, ...], like: Volume, channels: Sequence[int]) -> None:
    if len(shape) == 4 and shape[1:] == like.shape:
        if len(set(channels)) != 3 or not all(0 <= c < shape[0] for c in channels):
            raise InputError(
                f"{where}: channels {tuple(channels)} are not three of its {shape[0]} (--channels)"
            )
        return
    hint = ""
    if len(shape) == 4 and shape[:3] == like.shape:
        hint = "; its channels come last: move them to the front"
    raise InputError(
        f"{where}: shape {shape} is not (3, z, y, x) of the fragments, {(3, *like.shape)}{hint}"
    )
