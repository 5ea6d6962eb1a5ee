"""Fragments and affinities of a finished run in shards, and back in a file a block.

While blocks are written each is a file of its own: a shard has one writer. Afterwards shards are
written beside these files, by other names (zarr's ``v2`` keys, ``0/0/0`` for ``c/0/0/0``),
from the same encoded bytes. Each is read back and compared; then the metadata of the array are
replaced, which is the moment where the array is packed; then the files of blocks go. Cut off
anywhere, the array is whole in one form or the other, and the next call does the rest.
"""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import zarr
from zarr.core.array import AsyncArray
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from agq.blockwise.storage.files import fsync_path, write_atomic
from agq.blockwise.storage.shards import ChunkFiles
from agq.blockwise.volumes.boxes import unordered
from agq.blockwise.volumes.create import open_array
from agq.errors import DamagedError, InputError

ARRAYS = ("fragments", "affinities")

_CONTAINER = "data.zarr"
_FILES = {False: "default", True: "v2"}
"""Names of chunk keys, by whether the array is packed."""


def is_packed(folder: Path) -> bool:
    """Whether the fragments of a run are in shards."""
    try:
        return open_array(folder / _CONTAINER, "fragments", "r").shards is not None
    except InputError:
        return False


def require_unpacked(folder: Path) -> None:
    """Refuse to write blocks into shards: two writers of one would lose blocks.

    Raises
    ------
    InputError
        If the fragments are packed.
    """
    if is_packed(folder):
        raise InputError(
            f"{folder}: its fragments are packed, and blocks cannot be added to them; unpack them"
            f" first: agq pack {folder} --undo"
        )


def pack_array(
    folder: Path,
    name: str,
    box: Sequence[int],
    *,
    undo: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Pack an array of a run, or unpack it; no one may write to it.

    Parameters
    ----------
    folder, name
        Run folder, and one of `ARRAYS`.
    box
        Blocks of a shard on each axis.
    undo
        Unpack.
    on_progress
        Called with boxes done, and boxes in all.

    Raises
    ------
    DamagedError
        If what was written cannot be read back.
    OSError
        If the disk is full or cannot be written.
    """
    array = open_array(folder / _CONTAINER, name)
    place = folder / _CONTAINER / name
    if (array.shards is not None) == undo:
        source = ChunkFiles(array)
        shard = source.shard if undo else (1,) * (array.ndim - 3) + tuple(box)
        document, target = _in_form(array, shard, packed=not undo)
        grid = [-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)]
        boxes = list(product(*(range(-(-n // s)) for n, s in zip(grid, shard, strict=True))))
        copy = partial(_copy_box, source, target, shard, grid)
        tell = on_progress or (lambda done, total: None)
        tell(0, len(boxes))
        for done, _ in enumerate(unordered(copy, boxes), 1):
            tell(done, len(boxes))
        write_atomic(place / "zarr.json", document)
    # The other form's files, of which some may be left by a call that was cut off.
    for entry in place.iterdir():
        if entry.is_dir() and (entry.name == "c") != undo:
            shutil.rmtree(entry)
    fsync_path(place)


def _in_form(
    array: "zarr.Array[Any]", shard: Sequence[int], *, packed: bool
) -> tuple[bytes, ChunkFiles]:
    """Return the metadata of an array in the other form, and that form at the array's place."""
    memory = MemoryStore()
    made: Any = zarr.create_array(
        store=memory,
        shape=array.shape,
        chunks=array.chunks,
        shards=tuple(s * c for s, c in zip(shard, array.chunks, strict=True)) if packed else None,
        dtype=array.dtype,
        filters=None,
        compressors=array.compressors,
        fill_value=array.fill_value,
        attributes=dict(array.attrs),
        dimension_names=getattr(array.metadata, "dimension_names", None),
        chunk_key_encoding={"name": _FILES[packed], "separator": "/"},
        zarr_format=3,
    )
    buffer = sync(memory.get("zarr.json", default_buffer_prototype()))
    assert buffer is not None
    document = buffer.to_bytes()
    there: Any = zarr.Array(AsyncArray(metadata=made.metadata, store_path=array.store_path))
    return document, ChunkFiles(there)


def _copy_box(
    source: ChunkFiles,
    target: ChunkFiles,
    shard: Sequence[int],
    grid: Sequence[int],
    place: tuple[int, ...],
) -> None:
    """Write the chunks of a box in the other form, read them back and compare."""
    chunks = product(
        *(range(p * s, min((p + 1) * s, n)) for p, s, n in zip(place, shard, grid, strict=True))
    )
    encoded = {}
    for index in chunks:
        try:
            data = source.encoded(index)
        except DamagedError:
            if target.sharded:
                raise
            continue  # unpacking: a block in a shard that is lost is predicted again
        if data is not None:
            encoded[index] = data
    if target.sharded:
        target.write_shard(place, encoded)
    else:
        for index, data in encoded.items():
            write_atomic(target.file(index), data)
    for index, data in encoded.items():
        if target.encoded(index) != data:
            raise DamagedError(f"{target.file(index)}: what was written is not what is read")
