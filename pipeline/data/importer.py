"""Turn image stacks (tif, png, HDF5, npy, npz) into zarr volumes, section by section.

The array is written under a hidden name beside its final place and renamed when it is complete
and durable, so that a half-finished import is never taken for a volume. How far it got is stored
with it: starting the same import again goes on from there.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from agq.blockwise.storage.files import checksum, format_bytes, fsync_path
from agq.blockwise.volumes.create import chunk_box, create_array, open_array, write_chunk
from agq.blockwise.volumes.open import DTYPES, Kind, Volume, open_volume
from agq.blockwise.volumes.triples import Triple, checked_triple
from agq.errors import InputError
from agq.pipeline.data.section_stack import Sections
from agq.pipeline.data.sections import is_importable, open_sections

__all__ = ["default_chunks", "import_volume", "is_importable"]

SLAB_BYTES = 2**30
"""Most bytes of sections held in memory at once with the default chunks."""

_RECORD = "imported"
_WRITERS = 4

Progress = Callable[[int, int], None]


def import_volume(
    source: str | os.PathLike[str],
    out_container: str | os.PathLike[str],
    dataset: str,
    voxel_size: Sequence[int],
    *,
    key: str | None = None,
    offset: Sequence[int] = (0, 0, 0),
    chunks: Sequence[int] | None = None,
    kind: Kind | None = None,
    unit: str = "nm",
    on_progress: Progress | None = None,
) -> Volume:
    """Import an image stack into a zarr container.

    Parameters
    ----------
    source
        File, folder or glob, see `agq.pipeline.data.sections.open_sections`.
    out_container
        Local zarr container; made if missing.
    dataset
        Array to create in it.
    voxel_size, offset
        (z, y, x) in whole world units.
    key
        Dataset of an HDF5 file, or array of an npz file.
    chunks
        Chunk shape in voxels, (z, y, x); default `default_chunks`.
    kind
        What the data are, which decides the types accepted; None: anything that can be raw,
        labels or a mask. Signed integers are stored unsigned and may not be negative; bool is
        stored as uint8.
    unit
        World unit of voxel size and offset.
    on_progress
        Called with (sections done, sections in all).

    Returns
    -------
    Volume
        The imported volume. If the same source was imported to this place before, it is returned
        at once.

    Raises
    ------
    InputError
        One line naming the file that cannot be read or does not fit the others, or that something
        else is already there.
    """
    container = Path(out_container)
    stack = open_sections(source, key)
    dtype = _stored_dtype(stack, kind)
    if chunks is None:
        chunks = default_chunks(stack.shape, dtype.itemsize)
    # Their order is part of the digest, by which an import of an earlier release goes on.
    array: dict[str, Any] = {
        "dtype": dtype,
        "voxel_size": checked_triple("voxel_size", voxel_size, 1),
        "offset": checked_triple("offset", offset),
        "chunks": list(map(min, checked_triple("chunks", chunks, 1), stack.shape)),
        "unit": unit,
    }
    identity = _identity(stack, kind, *array.values())
    final = container / dataset
    if final.exists():
        _require_same(final, identity)
    else:
        hidden = final.parent / f".{final.name}.importing"
        try:
            unfinished = _begin(container, hidden, identity, shape=stack.shape, **array)
            _copy(stack, unfinished, identity, on_progress)
            _publish(hidden, final)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            needed = format_bytes(int(np.prod(stack.shape)) * dtype.itemsize)
            raise InputError(
                f"{final}: cannot be written ({error.strerror}); up to {needed} are needed: free "
                "some space or choose another folder, then import again to go on"
            ) from error
    kind = kind or ("raw" if dtype.name in DTYPES["raw"] else "labels")
    return open_volume(container, dataset, kind=kind, unit=unit)


def default_chunks(shape: Sequence[int], itemsize: int) -> Triple:
    """Return a chunk shape of about half a million voxels that keeps an import's memory bounded.

    32x128x128 reads fast in windows of 17x257x257; where 32 sections are more than `SLAB_BYTES`,
    chunks become flatter and wider.

    Parameters
    ----------
    shape
        (z, y, x) in voxels.
    itemsize
        Bytes per voxel.
    """
    depth, side_y, side_x = 32, 128, 128
    while depth > 1 and depth * shape[1] * shape[2] * itemsize > SLAB_BYTES:
        depth //= 2
        if side_y == side_x:
            side_x *= 2
        else:
            side_y *= 2
    return min(depth, shape[0]), min(side_y, shape[1]), min(side_x, shape[2])


def _stored_dtype(stack: Sections, kind: Kind | None) -> np.dtype[Any]:
    allowed = DTYPES[kind] if kind else (*DTYPES["mask"], "float32")
    if stack.dtype.name not in allowed:
        raise InputError(
            f"{stack.name}: {kind or 'data'} of type {stack.dtype.name} cannot be used; convert it "
            f"to one of {', '.join(allowed)}"
        )
    if stack.dtype.kind == "b":
        return np.dtype("uint8")
    return np.dtype(f"u{stack.dtype.name}") if stack.dtype.kind == "i" else stack.dtype


def _identity(stack: Sections, *settings: Any) -> dict[str, Any]:
    """Return what must be equal for an import to be the same one."""
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in stack.files]
    return {
        "source": stack.name,
        "files": len(states),
        "digest": checksum(json.dumps([states, [str(item) for item in settings]]).encode()),
    }


def _require_same(final: Path, identity: dict[str, Any]) -> None:
    try:
        record: Any = zarr.open_array(final, mode="r").attrs.get(_RECORD)
    except Exception:
        record = None
    if not isinstance(record, dict) or record.get("digest") != identity["digest"]:
        origin = f"imported from {record['source']}" if isinstance(record, dict) else "in the way"
        raise InputError(
            f"{final} already exists ({origin}) and holds another import; remove it or choose "
            "another dataset name"
        )


def _begin(
    container: Path, hidden: Path, identity: dict[str, Any], **array: Any
) -> "zarr.Array[Any]":
    """Reopen the unfinished array of the same import, or start a new one."""
    name = hidden.relative_to(container).as_posix()
    try:
        unfinished = open_array(container, name)
        record: Any = unfinished.attrs.get(_RECORD)
        if record["digest"] == identity["digest"]:
            return unfinished
    except Exception:
        # Whatever an interrupted import left, in whatever state, is only worth keeping if whole.
        record = None
    shutil.rmtree(hidden, ignore_errors=True)
    attributes = {_RECORD: {**identity, "sections": 0}}
    return create_array(container, name, **array, attributes=attributes)


def _publish(hidden: Path, final: Path) -> None:
    """Give a complete array its name; both survive a crash of the machine."""
    fsync_path(hidden / "zarr.json")
    fsync_path(hidden)
    hidden.rename(final)
    fsync_path(final.parent)


def _copy(
    stack: Sections,
    array: "zarr.Array[Any]",
    identity: dict[str, Any],
    on_progress: Progress | None,
) -> None:
    record: Any = array.attrs[_RECORD]
    depth, total = array.chunks[0], stack.shape[0]
    done = int(record["sections"])
    if on_progress is not None:
        on_progress(done, total)
    sections = stack.read(done)
    with ThreadPoolExecutor(_WRITERS) as pool:
        while done < total:
            count = min(depth, total - done)
            slab = _slab(sections, count, stack, array.dtype)

            def write(index: Triple, slab: Any = slab) -> None:
                start, stop = chunk_box(array, index)
                write_chunk(array, index, slab[:, start[1] : stop[1], start[2] : stop[2]])

            list(pool.map(write, _slab_chunks(array, done // depth)))
            done += count
            array.attrs[_RECORD] = {**identity, "sections": done}
            if on_progress is not None:
                on_progress(done, total)


def _slab_chunks(array: "zarr.Array[Any]", z: int) -> Iterator[Triple]:
    rows, columns = (-(-array.shape[axis] // array.chunks[axis]) for axis in (1, 2))
    return ((z, y, x) for y in range(rows) for x in range(columns))


def _slab(
    sections: Iterator[npt.NDArray[Any]], count: int, stack: Sections, dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    slab = np.empty((count, *stack.shape[1:]), dtype)
    for z in range(count):
        section = next(sections)
        if stack.dtype.kind == "i" and int(section.min()) < 0:
            raise InputError(f"{stack.name} holds negative values, which labels cannot have")
        slab[z] = section
    return slab
