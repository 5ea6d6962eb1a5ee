"""Arrays for results: create them, and write whole chunks durably.

Outputs are zarr v3, zstd without shuffle (which hides the runs of equal labels: measured 2 to 3
times larger), never sharded while blocks are written: a chunk, and a shard, has exactly one writer
(`storage.shards` writes those).
"""

import asyncio
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
import zarr.codecs
import zarr.errors
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from agq.blockwise.storage.files import Unsynced
from agq.blockwise.storage.shards import LEVEL, ChunkFiles
from agq.errors import DamagedError, InputError, RunGoneError
from agq.stores import RegularFiles

# Without this zarr leaves chunks of zeros out, and a missing chunk could also be one never done.
_CONFIG: Any = {"write_empty_chunks": True}


class _StandingFolder(RegularFiles):
    """A folder that writers do not make anew if it is moved away or deleted meanwhile."""

    async def _open(self, *, mode: Any = None) -> None:
        if not self.root.is_dir():  # zarr makes it, and all folders above it
            raise FileNotFoundError(f"{self.root} does not exist")
        await super()._open(mode=mode)

    async def set(self, key: str, value: Buffer) -> None:
        await asyncio.to_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write a file whole, as zarr does, but make only folders below this one.

        zarr makes all that are missing: a folder that goes away between a look and the write would
        come back empty.
        """
        self._check_writable()
        file = self.root / key
        partial = file.with_suffix(f".{secrets.token_hex(16)}.partial")
        try:
            if not file.parent.is_dir():
                for folder in reversed(file.relative_to(self.root).parents[:-1]):
                    (self.root / folder).mkdir(exist_ok=True)
            with partial.open("xb") as stream:
                stream.write(value.as_buffer_like())
            partial.replace(file)
        except FileNotFoundError:
            raise RunGoneError.at(self.root.parent) from None
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def create_array(
    container: str | Path,
    name: str,
    *,
    shape: Sequence[int],
    chunks: Sequence[int],
    dtype: npt.DTypeLike,
    voxel_size: Sequence[int],
    offset: Sequence[int] = (0, 0, 0),
    unit: str = "nm",
    shards: Sequence[int] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> "zarr.Array[Any]":
    """Create a zarr v3 array that `funlib.persistence.open_ds` reads, or reopen the same one.

    Parameters
    ----------
    container
        Local zarr group; made if missing.
    name
        Array inside it, such as "fragments" or "segmentation/s0"; groups above it are made.
    shape, chunks
        (z, y, x), or with a channel axis in front.
    dtype
        Data type; stored little-endian, fill value 0.
    voxel_size, offset
        World units per voxel and place of the first voxel, (z, y, x).
    unit
        World unit of voxel size and offset.
    shards
        Voxels of a file of several chunks, a multiple of these; None: a chunk is a file.
    attributes
        More attributes to store; not compared when the array exists.

    Returns
    -------
    zarr.Array
        Open for reading and writing; chunks of zeros are really written.

    Raises
    ------
    InputError
        If an array of that name exists with another shape, chunks, shards, dtype, voxel size,
        offset or unit.
    """
    if len(shape) != len(chunks):
        raise ValueError(f"shape {shape} and chunks {chunks} differ in length")
    folder = Path(container)
    layout: dict[str, Any] = {
        "shape": tuple(int(n) for n in shape),
        "chunks": tuple(int(n) for n in chunks),
        "dtype": np.dtype(dtype),
        "shards": None if shards is None else tuple(int(n) for n in shards),
    }
    axes = ("c^", "z", "y", "x")[-len(shape) :]
    stored: dict[str, Any] = {
        "voxel_size": [int(v) for v in voxel_size],
        "offset": [int(v) for v in offset],
        "units": [unit] * len(voxel_size),
        "axis_names": list(axes),
        # funlib takes an axis whose name ends in ^ for a channel axis.
        "types": ["channel" if axis.endswith("^") else "space" for axis in axes],
    }
    _require_group(folder)
    if (folder / name / "zarr.json").exists():
        return _reopen(folder, name, layout | stored)
    array = zarr.create_array(
        store=LocalStore(folder),
        name=name,
        **layout,
        filters=None,
        compressors=zarr.codecs.ZstdCodec(level=LEVEL),
        fill_value=0,
        zarr_format=3,
        attributes={**stored, **(attributes or {})},
        dimension_names=[axis.rstrip("^") for axis in axes],
        config=_CONFIG,
    )
    _sync_metadata(folder, name)
    return array


OME_UNITS = {"nm": "nanometer", "angstrom": "angstrom", "pm": "picometer"}
"""OME-NGFF names of the world units."""


def ome_attributes(
    name: str,
    unit: str,
    levels: Iterable[tuple[str, Iterable[float], Iterable[float]]],
    **more: Any,
) -> dict[str, Any]:
    """Return the ``ome`` attribute of a multiscale group (OME-NGFF 0.5).

    Parameters
    ----------
    name
        Of the image.
    unit
        World unit.
    levels
        Array, voxel size and place of each level, (z, y, x), finest first.
    more
        Further entries of the image.
    """
    datasets = [
        {
            "path": path,
            "coordinateTransformations": [
                {"type": "scale", "scale": [float(v) for v in size]},
                {"type": "translation", "translation": [float(p) for p in place]},
            ],
        }
        for path, size, place in levels
    ]
    axes = [{"name": axis, "type": "space", "unit": OME_UNITS[unit]} for axis in "zyx"]
    image = {"name": name, **more, "axes": axes, "datasets": datasets}
    return {"version": "0.5", "multiscales": [image]}


def _require_group(folder: Path) -> None:
    """Create the group of a container if it is missing."""
    try:
        zarr.open_group(store=RegularFiles(folder), mode="a", zarr_format=3)
    except OSError:
        raise
    except Exception as error:  # of whatever type zarr raises over malformed metadata
        file = folder / "zarr.json"
        raise DamagedError(f"{file}: file is damaged ({error})") from None


def _reopen(folder: Path, name: str, wanted: Mapping[str, Any]) -> "zarr.Array[Any]":
    array = open_array(folder, name)
    existing = {
        **array.attrs,
        "shape": array.shape,
        "chunks": array.chunks,
        "shards": array.shards,
        "dtype": np.dtype(array.dtype),
    }
    for key, value in wanted.items():
        if existing.get(key) != value:
            raise InputError(
                f"{folder / name} exists with {key} {existing.get(key)}, but {value} is wanted; "
                "remove it or choose another output folder"
            )
    return array


def _sync_metadata(folder: Path, name: str) -> None:
    """Make an array, the groups above it and their names durable."""
    created = Unsynced()
    created.add(folder / name / "zarr.json", folder.parent)
    for group in Path(name).parents:
        created.add(folder / group / "zarr.json", folder)
    created.sync()


def create_affinities(
    container: str | Path,
    name: str,
    *,
    shape: Sequence[int],
    chunks: Sequence[int],
    **placement: Any,
) -> "zarr.Array[Any]":
    """Create or reopen an array of affinities to the voxels before on z, y and x.

    It is uint8, (3, z, y, x); `shape` and `chunks` are (z, y, x), and a chunk holds all three
    channels, so that a block writes one chunk. The rest is as for `create_array`.
    """
    return create_array(
        container, name, shape=(3, *shape), chunks=(3, *chunks), dtype=np.uint8, **placement
    )


def open_array(container: str | Path, name: str, mode: Any = "r+") -> "zarr.Array[Any]":
    """Open an array made by `create_array`, with mode "r+" to write chunks or "r" to read.

    Raises
    ------
    InputError
        If there is no such array.
    DamagedError
        If its metadata cannot be read.
    """
    store = _StandingFolder(Path(container), read_only=mode == "r")
    try:
        array = zarr.open_array(store=store, path=name, mode=mode, zarr_format=3)
    except (FileNotFoundError, zarr.errors.BaseZarrError):
        array = None
    except OSError:
        raise
    except Exception as error:  # of whatever type zarr raises over malformed metadata
        file = Path(container) / name / "zarr.json"
        raise DamagedError(f"{file}: file is damaged ({error})") from None
    if array is None:  # with zarr's error behind it, this one could not be sent by dask
        raise InputError(f"{Path(container) / name}: there is no such array yet")
    return array.with_config(_CONFIG)


def chunk_box(
    array: "zarr.Array[Any]", index: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the first voxel and one past the last voxel of a chunk, clipped to the array.

    `index` is the place of the chunk in the grid of chunks, one number per array axis.

    Raises
    ------
    IndexError
        If the array has no such chunk.
    """
    start = tuple(int(i) * c for i, c in zip(index, array.chunks, strict=True))
    if any(not 0 <= b < s for b, s in zip(start, array.shape, strict=True)):
        raise IndexError(f"no chunk {tuple(index)} in an array of shape {array.shape}")
    stop = (min(b + c, s) for b, c, s in zip(start, array.chunks, array.shape, strict=True))
    return start, tuple(stop)


def chunk_file(array: "zarr.Array[Any]", index: Sequence[int]) -> Path:
    """Return the file of an array in a local folder that holds a chunk, alone or in a shard."""
    return ChunkFiles(array).file(index)


def read_chunk(array: "zarr.Array[Any]", index: Sequence[int]) -> npt.NDArray[Any]:
    """Read exactly one whole chunk, which must have been written.

    Raises
    ------
    DamagedError
        If its file is missing, or cannot be decoded.
    IndexError
        If the array has no such chunk.
    """
    files = ChunkFiles(array)
    data = files.read(index)
    if data is None:
        file = files.file(index)
        what = "chunk is missing" if files.sharded and file.exists() else "file is missing"
        raise DamagedError(f"{file}: {what}")
    return data


def write_chunk(
    array: "zarr.Array[Any]",
    chunk_index: Sequence[int],
    data: npt.NDArray[Any],
    unsynced: Unsynced | None = None,
) -> None:
    """Write exactly one whole chunk, atomically and durably.

    zarr writes to a temporary file and renames it; the file and the folders above it up to the
    array are synced, so that after the return the chunk survives a power cut. `unsynced` collects
    instead what is to be synced.

    Parameters
    ----------
    array
        Array of `create_array` or `open_array`.
    chunk_index
        Place in the grid of chunks, one number per array axis.
    data
        The voxels of the chunk, clipped at the array's edge; same dtype as the array.

    Raises
    ------
    ValueError
        If shape or dtype of the data are not those of the chunk: numpy would broadcast or wrap; or
        if the array is sharded: two writers of a shard would lose chunks.
    IndexError
        If the array has no such chunk.
    """
    if array.shards is not None:
        raise ValueError(f"{array.name} is sharded: its chunks are not written one by one")
    start, stop = chunk_box(array, chunk_index)
    expected = tuple(e - b for b, e in zip(start, stop, strict=True))
    if data.shape != expected or data.dtype != array.dtype:
        raise ValueError(
            f"chunk {tuple(chunk_index)} of {array.name} takes {expected} {array.dtype}, "
            f"not {data.shape} {data.dtype}"
        )
    if not array.config.write_empty_chunks:
        array = array.with_config(_CONFIG)
    array[tuple(slice(b, e) for b, e in zip(start, stop, strict=True))] = data
    if isinstance(array.store_path.store, LocalStore):
        written = Unsynced() if unsynced is None else unsynced
        top = Path(array.store_path.store.root) / array.store_path.path
        written.add(chunk_file(array, chunk_index), top)
        if unsynced is None:
            written.sync()
