"""Arrays of a program: volumes handed out as `funlib.persistence.Array`, arrays taken in."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from agq.blockwise.volumes.conventions import attribute_sources
from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import Volume
from agq.blockwise.volumes.placement import place
from agq.errors import InputError
from agq.pipeline.data.importer import default_chunks

if TYPE_CHECKING:
    from funlib.persistence import Array

_MOST_CHUNKS = 4096
"""Every read of a `funlib.persistence.Array` looks at all chunks of it: 0.6 s for a million."""

_PLACE = ("voxel_size", "offset", "units")


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
    run_dir: Path,
    name: str,
    data: Any,
    voxel_size: Sequence[int] | None,
    unit: str = "nm",
    like: Volume | None = None,
) -> Path:
    """Write an array into a run folder, once; the same content is found again.

    What an array of xarray, funlib.persistence or zarr says of its axes and its place counts as in
    a file.

    Parameters
    ----------
    data
        (z, y, x) or (channels, z, y, x), or axes with names; bool becomes uint8.
    voxel_size
        (z, y, x), in world units; None where the array says it.
    like
        Volume whose voxel size and offset an array has that says none.

    Returns
    -------
    Path
        The zarr container.

    Raises
    ------
    InputError
        If the array has another number of axes, or says something else of its place.
    """
    if voxel_size is not None:
        voxel_size = whole_size(voxel_size)
    sources = attribute_sources(_said(data), np.ndim(data), name)
    values = np.asarray(data if hasattr(data, "__array__") else data[:])
    if values.dtype == bool:
        values = values.view(np.uint8)
    if values.ndim not in (3, 4):
        raise InputError(f"{name}: an array of shape {values.shape}; it must be 3-D (z, y, x)")
    if voxel_size is None and not any(s.voxel_size for s in sources):
        voxel_size = whole_size(None if like is None else like.voxel_size)
    at = place(sources, values.shape, voxel_size=voxel_size, unit=unit, where=name)
    offset = tuple(at.offset if like is None or any(s.offset for s in sources) else like.offset)
    others = [axis for axis in range(values.ndim) if axis not in at.axes]
    values = values.transpose(*others, *at.axes)
    about = repr((values.shape, values.dtype.str, [*at.voxel_size], unit))
    if any(offset):
        about += repr(offset)
    digest = hashlib.blake2b(about.encode())
    for part in values:
        digest.update(np.ascontiguousarray(part).data)
    target = run_dir / "imported" / f"{name}-{digest.hexdigest()[:12]}.zarr"
    if target.exists():
        return target
    hidden = target.with_name(f".{target.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.parent.mkdir(parents=True, exist_ok=True)
    channels = values.shape[:-3]
    array = create_array(
        hidden,
        name,
        shape=values.shape,
        chunks=(*channels, *default_chunks(values.shape[-3:], values.itemsize * prod(channels))),
        dtype=values.dtype,
        voxel_size=at.voxel_size,
        offset=offset,
        unit=unit,
    )
    array[:] = values
    os.sync()  # an array that a power cut has torn must not be found again
    hidden.rename(target)
    return target


def whole_size(voxel_size: Sequence[int] | None) -> tuple[int, int, int]:
    """Check the voxel size given for an array.

    Raises
    ------
    InputError
        If it is not three positive whole numbers.
    """
    sizes = tuple(voxel_size or ())
    if len(sizes) != 3 or any(size != int(size) or size < 1 for size in sizes):
        raise InputError(
            f"voxel_size {voxel_size}: an array needs three positive whole numbers (z, y, x); a"
            " voxel of 4.2 nm is 42 with unit='angstrom'"
        )
    z, y, x = (int(size) for size in sizes)
    return z, y, x


def _said(data: Any) -> dict[str, Any]:
    """Return what an array says of itself, under the names that attributes of files have."""
    attributes = getattr(data, "attrs", None)
    said = dict(attributes) if isinstance(attributes, Mapping) else {}
    metadata = getattr(data, "metadata", None)  # of zarr
    with warnings.catch_warnings():
        # funlib.persistence speaks of arrays that do not say which axes are channels.
        warnings.simplefilter("ignore", DeprecationWarning)
        own = {key: getattr(data, key, None) for key in ("axis_names", *_PLACE)}
    own["_ARRAY_DIMENSIONS"] = getattr(metadata, "dimension_names", getattr(data, "dims", None))
    said |= {key: list(value) for key, value in own.items() if isinstance(value, Sequence)}
    return {
        key: value.tolist() if hasattr(value, "tolist") else value for key, value in said.items()
    }
