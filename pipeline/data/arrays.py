"""Arrays of a program: volumes handed out as `funlib.persistence.Array`, arrays taken in."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import Volume
from agq.errors import InputError
from agq.pipeline.data.importer import default_chunks

if TYPE_CHECKING:
    from funlib.persistence import Array

_MOST_CHUNKS = 4096
"""Every read of a `funlib.persistence.Array` looks at all chunks of it: 0.6 s for a million."""


def array_of(volume: Volume) -> Array:
    """Return a volume as the array that scripts of this field take; read-only, nothing is read."""
    with warnings.catch_warnings():
        # It takes two seconds to import, and speaks of its own use of pydantic.
        warnings.simplefilter("ignore", DeprecationWarning)
        from funlib.persistence import Array
    return Array(
        _Voxels(volume),
        offset=volume.offset,
        voxel_size=volume.voxel_size,
        axis_names=["z", "y", "x"],
        units=[volume.unit] * 3,
        types=["space"] * 3,
        chunks=_chunks(volume),
    )


class _Voxels:
    """A volume under numpy's names, as dask reads arrays."""

    ndim = 3

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.shape = volume.shape
        self.dtype = volume.dtype

    def __getitem__(self, key: tuple[Any, ...]) -> npt.NDArray[Any]:
        places = [np.arange(n)[k] for k, n in zip(key, self.shape, strict=True)]
        if not all(place.size for place in places):
            return np.empty([n for p in places for n in p.shape], self.dtype)
        start = [int(place.min()) for place in places]
        data = self._volume.read(start, [int(place.max()) + 1 for place in places])
        # From the last axis: a single number takes its axis away.
        for axis in (2, 1, 0):
            data = data.take(places[axis] - start[axis], axis)
        return data


def _chunks(volume: Volume) -> tuple[int, ...]:
    """Return the chunks of storage, several in one where there are many."""
    chunks = list(volume.chunks)
    while prod(counts := [-(-n // c) for n, c in zip(volume.shape, chunks, strict=True)]) > (
        _MOST_CHUNKS
    ):
        chunks[counts.index(max(counts))] *= 2
    return tuple(min(c, n) for c, n in zip(chunks, volume.shape, strict=True))


def store_array(
    run_dir: Path, name: str, data: Any, voxel_size: Sequence[int], unit: str = "nm"
) -> Path:
    """Write an array into a run folder, once; the same content is found again.

    Parameters
    ----------
    data
        (z, y, x) or (channels, z, y, x); bool becomes uint8.
    voxel_size
        (z, y, x), in world units.

    Returns
    -------
    Path
        The zarr container.

    Raises
    ------
    InputError
        If the array has another number of axes.
    """
    data = np.asarray(data)
    if data.dtype == bool:
        data = data.view(np.uint8)
    if data.ndim not in (3, 4):
        raise InputError(f"{name}: an array of shape {data.shape}; it must be 3-D (z, y, x)")
    about = repr((data.shape, data.dtype.str, [*voxel_size], unit)).encode()
    digest = hashlib.blake2b(about)
    for part in data:
        digest.update(np.ascontiguousarray(part).data)
    target = run_dir / "imported" / f"{name}-{digest.hexdigest()[:12]}.zarr"
    if target.exists():
        return target
    hidden = target.with_name(f".{target.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.parent.mkdir(parents=True, exist_ok=True)
    channels = data.shape[:-3]
    array = create_array(
        hidden,
        name,
        shape=data.shape,
        chunks=(*channels, *default_chunks(data.shape[-3:], data.itemsize * prod(channels))),
        dtype=data.dtype,
        voxel_size=voxel_size,
        unit=unit,
    )
    array[:] = data
    os.sync()  # an array that a power cut has torn must not be found again
    hidden.rename(target)
    return target
