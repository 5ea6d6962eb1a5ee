"""Volumes to read: 3-D arrays of any supported container, opened lazily, in (z, y, x) and nm.

`open_volume` reads only metadata. `Volume.read` slices the array itself; funlib.persistence's
``Array[roi]`` is not used because it costs time in proportion to all chunks of the array.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from funlib.geometry import Coordinate, Roi
from zarr.storage import LocalStore

from agq.blockwise.storage.shards import ChunkFiles
from agq.blockwise.volumes.find import find_array, sources_of
from agq.blockwise.volumes.location import Location, locate, shown_cause
from agq.blockwise.volumes.metadata import (
    Metadata,
    join,
    multiscales,
    name_of,
    read_metadata,
    scales_of,
)
from agq.blockwise.volumes.placement import Numbers, numbers_of, place
from agq.blockwise.volumes.precomputed import open_scale
from agq.blockwise.volumes.triples import Triple, triple
from agq.credentials import hide
from agq.errors import DamagedError, InputError
from agq.reading import require_file
from agq.stores import STORED_BYTES

Kind = Literal["raw", "labels", "mask"]

_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("u", "") for bits in (8, 16, 32, 64))

_N5_KEYS = ("dimensions", "blockSize", "dataType", "compression")

DTYPES: dict[str, tuple[str, ...]] = {
    "raw": ("uint8", "uint16", "float32"),
    "labels": _INTEGERS,
    "mask": (*_INTEGERS, "bool"),
}
"""Data types accepted for each kind of volume."""


@dataclass(frozen=True)
class Volume:
    """A 3-D array somewhere, with its place in the world; nothing of it has been read yet.

    May be shared by threads and pickled to other processes.

    Attributes
    ----------
    path, dataset
        Resolved container, without passwords or signatures in it, and array inside it.
    address
        The container with them, to open it again.
    format
        "zarr3", "zarr2", "n5" or "precomputed".
    shape
        Voxels, (z, y, x).
    chunks
        Voxels of the unit that storage reads and decodes, (z, y, x).
    dtype
        Data type in native byte order.
    voxel_size, offset
        Whole world units, (z, y, x).
    unit
        World unit: "nm" unless asked otherwise.
    notes
        Lines for the user, on what was rounded or decided of its place.
    """

    path: str
    dataset: str
    format: str
    shape: Triple
    chunks: Triple
    dtype: np.dtype[Any]
    voxel_size: Coordinate
    offset: Coordinate
    unit: str
    digest: str
    _array: Any = field(repr=False)
    _axes: Triple
    _ndim: int
    _origin: Triple = (0, 0, 0)
    notes: tuple[str, ...] = ()
    address: str = field(default="", repr=False)
    _files: ChunkFiles | None = field(default=None, repr=False, compare=False)

    @property
    def roi(self) -> Roi:
        """Place in the world, in world units."""
        return Roi(self.offset, Coordinate(self.shape) * self.voxel_size)

    @property
    def is_stored_zyx(self) -> bool:
        """Whether the axes of the array itself are z, y and x."""
        return self._ndim == 3 and tuple(self._axes) == (0, 1, 2)

    @property
    def name(self) -> str:
        """Container and array for messages."""
        return f"{self.path}:{self.dataset}" if self.dataset else self.path

    def read(self, start: Sequence[int], stop: Sequence[int]) -> npt.NDArray[Any]:
        """Read a voxel box.

        Parameters
        ----------
        start, stop
            First voxel and one past the last voxel, (z, y, x).

        Returns
        -------
        ndarray
            (z, y, x), C-contiguous, of the volume's dtype; the caller owns it.

        Raises
        ------
        ValueError
            If the box is empty or leaves the volume.
        InputError
            If the storage cannot read it: a damaged chunk, a missing server.
        """
        begin, end = tuple(map(int, start)), tuple(map(int, stop))
        if len(begin) != 3 or any(
            not 0 <= b < e <= s for b, e, s in zip(begin, end, self.shape, strict=True)
        ):
            raise ValueError(f"box {begin} to {end} is not inside {self.name} {self.shape}")
        ranges = [range(1)] * self._ndim
        for axis, first, b, e in zip(self._axes, self._origin, begin, end, strict=True):
            ranges[axis] = range(first + b, first + e)
        stored = read_stored(self._array, ranges, self.name, self._files)
        data = in_order(stored, self._axes)
        return np.require(data, self.dtype, ["C", "W", "O"])

    def keeping(self, most: int) -> "Volume":
        """Return this volume, which keeps so many bytes of decoded chunks for the next reads.

        Boxes that do not follow the chunks decode each chunk many times otherwise. Only chunks of
        zarr arrays of this machine are kept; such a volume cannot be pickled.
        """
        if not _is_local_zarr(self._array):
            return self
        return replace(self, _files=ChunkFiles(self._array, most))

    def crop(self, roi: Roi) -> "Volume":
        """Return the part of the volume inside a ROI, with its own shape and offset.

        Parameters
        ----------
        roi
            World units; may reach beyond the volume.

        Raises
        ------
        InputError
            If nothing is inside, or the ROI is not on the voxel grid.
        """
        common = self.roi.intersect(roi)
        if common.empty:
            raise InputError(f"{self.name} ({self.roi}) has no voxel inside {roi}; correct offsets")
        start, size = common.offset - self.offset, self.voxel_size
        if any(s % v or n % v for s, n, v in zip(start, common.shape, size, strict=True)):
            raise InputError(
                f"{self.name}: offset {tuple(self.offset)} and {roi} are not a whole number of"
                f" voxels of {tuple(size)} apart; correct one offset"
            )
        first, shape = start / size, common.shape / size
        origin = triple(o + f for o, f in zip(self._origin, first, strict=True))
        return replace(self, shape=triple(shape), offset=common.offset, _origin=origin)

    def describe(self) -> dict[str, Any]:
        """Return what identifies the volume, for comparing runs; JSON types only.

        The checksum covers the array's metadata, not its voxels or file times.
        """
        return {
            "path": self.path,
            "dataset": self.dataset,
            "format": self.format,
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "voxel_size": [int(v) for v in self.voxel_size],
            "offset": [int(v) for v in self.offset],
            "unit": self.unit,
            "metadata": self.digest,
        }


def open_volume(
    path: str | os.PathLike[str],
    dataset: str | None = None,
    *,
    voxel_size: Sequence[float] | None = None,
    offset: Sequence[float] | None = None,
    level: int | None = None,
    kind: Kind = "raw",
    unit: str | None = "nm",
) -> Volume:
    """Open a volume of zarr v2 or v3, OME-Zarr, N5 or neuroglancer's precomputed.

    Parameters
    ----------
    path
        Container: a local folder, or an s3://, gs://, http:// or https:// address;
        ``precomputed://`` may stand before it.
    dataset
        Array, or group of resolution levels, inside the container. None: `path` is the array or
        the multiscale group itself, or a container that holds exactly one array.
    voxel_size
        (z, y, x) in `unit`; needed if the metadata do not hold it, compared if they do.
    offset
        (z, y, x) in `unit` of the first voxel's corner; likewise, but 0 if it is said nowhere.
    level
        Resolution level of a multiscale group; default 0, the finest.
    kind
        What it is used for, which decides the data types accepted (`DTYPES`).
    unit
        World unit: "nm", "angstrom" or "pm"; None: the first in which the place is whole.

    Returns
    -------
    Volume
        Axes (z, y, x) whatever the order in the file; other axes must have size 1.

    Raises
    ------
    InputError
        One line that names the file and the fix: nothing there, no such array (with what is
        there), not 3-D, unsupported type, voxel size absent, different or not whole
        (`placement.place` has the rule).
    """
    location, metadata = find_array(path, dataset, level)
    where = name_of(location, metadata)
    shape = metadata.shape or ()
    placed = place(
        sources_of(location, metadata),
        shape,
        voxel_size=voxel_size,
        offset=offset,
        unit=unit,
        x_first=metadata.format == "n5",
        where=where,
    )
    axes = placed.axes
    _require_one_channel(shape, axes, where)
    array, chunks, dtype = open_stored(location, metadata, where)
    if dtype.name not in DTYPES[kind]:
        raise InputError(
            f"{where}: {kind} of type {dtype.name} cannot be used; convert it to one of "
            + ", ".join(DTYPES[kind])
        )
    return Volume(
        path=location.text,
        dataset=metadata.path,
        format=metadata.format,
        shape=triple(shape[axis] for axis in axes),
        chunks=triple(chunks[axis] for axis in axes),
        dtype=dtype,
        voxel_size=placed.voxel_size,
        offset=placed.offset,
        unit=placed.unit,
        digest=metadata.digest,
        _array=array,
        _axes=axes,
        _ndim=len(shape),
        notes=placed.notes,
        address=location.address,
    )


def open_levels(
    path: str | os.PathLike[str], dataset: str | None = None, **options: Any
) -> list[Volume]:
    """Open all resolution levels of a multiscale group, finest first, or the one array named.

    Arguments and errors are those of `open_volume`; a voxel size is that of the finest level.
    """
    location = locate(path)
    metadata = read_metadata(location, join(dataset or ""))
    if metadata is None or metadata.shape is not None:
        return [open_volume(path, dataset, **options)]
    groups = multiscales(metadata)
    if metadata.format == "precomputed":
        count = scales_of(metadata)
    elif groups:
        count = len(groups[0]["datasets"])
    else:
        return [open_volume(path, dataset, **options)]
    levels = [open_volume(path, dataset, level=0, **options)]
    size = options.pop("voxel_size", None)
    first = _ome_scale(path, dataset, 0)
    for level in range(1, count):
        scale = _ome_scale(path, dataset, level)
        if size is not None and first and scale:
            # What is given is the voxel size of the finest level.
            options["voxel_size"] = [
                Decimal(str(number)) * scale[axis] / first[axis]
                for number, axis in zip(size, levels[0]._axes, strict=True)
            ]
        options["unit"] = levels[0].unit
        levels.append(open_volume(path, dataset, level=level, **options))
    return levels


def _ome_scale(path: str | os.PathLike[str], dataset: str | None, level: int) -> Numbers | None:
    """Return the scale of a level, one number per axis, that counts as a ratio at least."""
    for source in sources_of(*find_array(path, dataset, level)):
        if source.needs_unit and source.voxel_size is not None:
            return numbers_of(source.voxel_size, source.name)
    return None


def _require_one_channel(shape: Sequence[int], axes: Triple, where: str) -> None:
    if any(size != 1 for axis, size in enumerate(shape) if axis not in axes):
        raise InputError(
            f"{where} is {len(shape)}-D with shape {tuple(shape)}; it must be 3-D (z, y, x), with "
            "only channel or time axes of size 1 besides: pick one channel first"
        )
    if min(shape) < 1:
        raise InputError(f"{where} is empty, with shape {tuple(shape)}")


MOST_CHUNK_BYTES = 2**30
"""Largest chunk that is read: every voxel of it costs the memory of all of them."""


def open_stored(
    location: Location, metadata: Metadata, where: str
) -> tuple[Any, tuple[int, ...], np.dtype[Any]]:
    """Open an array as stored: zarr by zarr-python, N5 and precomputed (x first) by tensorstore.

    Returns
    -------
    tuple
        The array, what its storage reads at once in the order of its axes, and its native type.

    Raises
    ------
    InputError
        If it cannot be opened, or its chunks are too large; `where` names it.
    """
    try:
        array, chunks, dtype, index = _opened(location, metadata)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{where}: the array cannot be opened ({_reason(error)})"
        ) from shown_cause(error)
    for what, size in (
        (f"chunks of {chunks} {dtype}", prod(chunks) * dtype.itemsize),
        ("shards with an index", index),
    ):
        if size > MOST_CHUNK_BYTES:
            raise InputError(
                f"{where}: it has {what} of {size} bytes, and {MOST_CHUNK_BYTES} can be read at "
                "once; store it in smaller ones"
            )
    return array, chunks, dtype


def _opened(
    location: Location, metadata: Metadata
) -> tuple[Any, tuple[int, ...], np.dtype[Any], int]:
    """Return what `open_stored` returns, and the bytes of the index of a shard."""
    if metadata.format == "precomputed":
        scale = open_scale(location, metadata.attributes)
        return scale, scale.chunks, scale.dtype, 0
    if metadata.format == "n5":
        import tensorstore as ts

        # As read already: tensorstore would refuse attributes that it knows in other lengths.
        spec = {
            "driver": "n5",
            "kvstore": location.key_value_store(metadata.path),
            "metadata": {key: metadata.attributes[key] for key in _N5_KEYS},
        }
        store = ts.open(spec, open=True, read=True, assume_metadata=True).result()
        chunks = tuple(int(n or 1) for n in store.chunk_layout.read_chunk.shape or ())
        return store, chunks, store.dtype.numpy_dtype, 0
    array = zarr.open_array(
        store=location.zarr_store(),
        path=metadata.path,
        mode="r",
        zarr_format=3 if metadata.format == "zarr3" else 2,
    )
    chunks = tuple(map(int, array.chunks))
    if min(chunks, default=1) < 1:
        raise ValueError(f"chunks of {chunks}")
    shards = array.shards or chunks
    index = 16 * prod(-(-s // c) for s, c in zip(shards, chunks, strict=True))
    # A structured type has no byte order of its own; it is refused by name afterwards.
    return array, chunks, np.dtype(array.dtype).newbyteorder("="), index


def read_stored(
    array: Any, ranges: Sequence[range], where: str, files: ChunkFiles | None = None
) -> npt.NDArray[Any]:
    """Read a box of an array of `open_stored`, with all its axes, perhaps from known files of it.

    Raises
    ------
    InputError
        If the storage cannot read it; `where` names the array.
    """
    box = tuple(slice(r.start, r.stop) for r in ranges)
    try:
        if not hasattr(array, "kvstore"):
            plain = _read_plain(array, ranges, files)
            return np.asarray(array[box]) if plain is None else plain
        _require_files(array, ranges)  # of tensorstore
        return np.asarray(array[box].read().result())
    except InputError:
        raise
    except Exception as error:  # of whatever type a codec or a server raises
        shown = ", ".join(f"{r.start}:{r.stop}" for r in ranges)
        raise InputError(f"{where}: [{shown}] cannot be read ({_reason(error)})") from shown_cause(
            error
        )


def _is_local_zarr(array: Any) -> bool:
    return isinstance(array, zarr.Array) and isinstance(array.store_path.store, LocalStore)


def _read_plain(
    array: Any, ranges: Sequence[range], files: ChunkFiles | None
) -> npt.NDArray[Any] | None:
    """Read a box of zarr files of this machine without zarr; None where only zarr knows how."""
    if not _is_local_zarr(array) or 0 in map(len, ranges):
        return None
    try:
        files = files or ChunkFiles(array)
        return files.read_box([r.start for r in ranges], [r.stop for r in ranges])
    except DamagedError:
        return None  # zarr may know more of it, and says what is wrong


def in_order(data: npt.NDArray[Any], axes: Sequence[int]) -> npt.NDArray[Any]:
    """Return an array with these axes in this order, and without the others, of size 1."""
    others = [axis for axis in range(data.ndim) if axis not in axes]
    return data.transpose([*others, *axes]).reshape([data.shape[axis] for axis in axes])


def _require_files(array: Any, ranges: Sequence[range]) -> None:
    """Check that the chunks of a local N5 array are files: tensorstore would wait at a FIFO."""
    kvstore = array.kvstore.spec().to_json()
    if kvstore["driver"] != "file":
        return
    sizes = array.chunk_layout.read_chunk.shape
    spans = (range(r.start // n, -(-r.stop // n)) for r, n in zip(ranges, sizes, strict=True))
    for index in product(*spans):
        with suppress(FileNotFoundError, NotADirectoryError):
            require_file(Path(kvstore["path"], *map(str, index)), most=STORED_BYTES)


def _reason(error: Exception) -> str:
    """Return the first line of an error without what tensorstore adds to it."""
    line = (hide(error).strip().splitlines() or [""])[0].split(" [tensorstore_spec")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
