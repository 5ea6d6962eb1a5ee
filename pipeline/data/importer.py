"""Turn image stacks (tif, png, HDF5, npy, npz) into zarr volumes, section by section.

The array is written under a hidden name beside its final place and renamed when it is complete
and durable, so that a half-finished import is never taken for a volume. How far it got is stored
with it: starting the same import again goes on from there. One process imports at a time, others
wait for it. An import is known again by its voxels: sections whose files have another size or time
are compared with it.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from agq.blockwise.storage.files import (
    checksum,
    format_bytes,
    fsync_path,
    make_folder,
    write_atomic,
)
from agq.blockwise.storage.locks import hold
from agq.blockwise.volumes.create import chunk_box, create_array, open_array, write_chunk
from agq.blockwise.volumes.open import DTYPES, Kind, Volume, open_volume
from agq.blockwise.volumes.placement import Place, place
from agq.blockwise.volumes.triples import Triple, checked_triple, triple
from agq.errors import InputError
from agq.pipeline.data.numbering import listed
from agq.pipeline.data.section_stack import Sections
from agq.pipeline.data.sections import is_importable, open_sections
from agq.reading import read_json

__all__ = ["default_chunks", "import_volume", "is_importable"]

SLAB_BYTES = 2**30
"""Most bytes of sections held in memory at once with the default chunks."""

_RECORD = "imported"
_STATES = "files.json"
_WRITERS = 4

_logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def import_volume(
    source: str | os.PathLike[str] | Sections,
    out_container: str | os.PathLike[str],
    dataset: str,
    voxel_size: Sequence[int] | None,
    *,
    key: str | None = None,
    offset: Sequence[int] | None = None,
    chunks: Sequence[int] | None = None,
    kind: Kind | None = None,
    unit: str | None = "nm",
    gap_value: float | None = None,
    on_progress: Progress | None = None,
) -> Volume:
    """Import an image stack into a zarr container.

    Parameters
    ----------
    source
        File, folder or glob, see `agq.pipeline.data.sections.open_sections`, or what it returns.
    out_container
        Local zarr container; made if missing.
    dataset
        Array to create in it.
    voxel_size, offset
        (z, y, x) in whole world units; needed if the file does not say the voxel size, compared
        if it does.
    key
        Dataset of an HDF5 file, or array of an npz file.
    chunks
        Chunk shape in voxels, (z, y, x); default `default_chunks`.
    kind
        What the data are, which decides the types accepted; None: anything that can be raw,
        labels or a mask. Signed integers are stored unsigned: -1, which means unlabelled, becomes
        the highest value, other negative ones are refused. Bool is stored as uint8.
    unit
        World unit; None: the coarsest in which all is whole, and given numbers are nanometres.
    gap_value
        Fills the sections whose number no file has; None: they are an error.
    on_progress
        Called with (sections done, sections in all).

    Returns
    -------
    Volume
        The imported volume. If the same voxels were imported to this place before, nothing is
        written.

    Raises
    ------
    InputError
        One line naming the file that cannot be read or does not fit the others, or that something
        else is already there.
    """
    container = Path(out_container)
    stack = source
    if not isinstance(stack, Sections):
        stack = open_sections(stack, key, gap_value=gap_value)
    dtype = _stored_dtype(stack, kind)
    if chunks is None:
        chunks = default_chunks(stack.shape, dtype.itemsize)
    lies = settle(stack, voxel_size, offset, unit)
    # Their order is part of the digest, by which an import of an earlier release goes on.
    array: dict[str, Any] = {
        "dtype": dtype,
        "voxel_size": triple(lies.voxel_size),
        "offset": triple(lies.offset),
        "chunks": list(map(min, checked_triple("chunks", chunks, 1), stack.shape)),
        "unit": lies.unit,
    }
    settings = array.values() if not stack.filled else (*array.values(), stack.fill_value)
    identity = _identity(stack, kind, *settings)
    final = container / dataset
    if not final.exists():
        made = not container.exists()
        make_folder(final.parent)
        try:
            with hold(final.parent / f".{final.name}.lock", wait=True):
                if not final.exists():
                    _import(stack, final, container, identity, array, lies.notes, on_progress)
        except InputError:
            if made:
                _remove_empty(container)
            raise
    _require_same(final, stack, identity, array)
    kind = kind or ("raw" if dtype.name in DTYPES["raw"] else "labels")
    return open_volume(container, dataset, kind=kind, unit=lies.unit)


def is_import_of(folder: Path, stack: Sections) -> bool:
    """Tell whether a volume was imported from files of the same names and sizes."""
    try:
        states = read_json(folder / _STATES)
        known = [(name, size) for name, size, _ in states]
    except (OSError, ValueError, TypeError, InputError):
        return False
    return known == [file_state(file)[:2] for file in stack.files]


def settle(
    stack: Sections,
    voxel_size: Sequence[int] | None,
    offset: Sequence[int] | None,
    unit: str | None,
) -> Place:
    """Settle where a stack lies, from what its file says and what the user gives."""
    if voxel_size is not None:
        voxel_size = checked_triple("voxel_size", voxel_size, 1)
    if offset is not None:
        offset = checked_triple("offset", offset)
    sources = []
    for source in stack.sources:
        if isinstance(source.voxel_size, tuple) and source.voxel_size[0] is None:
            # A pixel size alone is compared with that of the user, who gives the distance in z.
            if voxel_size is None:
                continue
            units = [source.units] * 3 if isinstance(source.units, str) else source.units
            sizes = [voxel_size[0], *source.voxel_size[1:]]
            source = replace(source, voxel_size=sizes, units=[unit, *units[1:]])
        sources.append(source)
    return place(
        sources,
        stack.array_shape or stack.shape,
        voxel_size=voxel_size,
        offset=offset,
        unit=unit,
        where=stack.name,
    )


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
    if stack.inverted and kind == "labels":
        raise InputError(
            f"{stack.name}: 0 is white in it (photometric MINISWHITE), which labels have not; save "
            "it as MINISBLACK"
        )
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
    states = [file_state(file) for file in stack.files]
    identity: dict[str, Any] = {
        "source": stack.name,
        "files": len(states),
        "digest": checksum(json.dumps([states, [str(item) for item in settings]]).encode()),
    }
    if stack.filled:
        identity["filled"] = {"sections": list(stack.filled), "value": stack.fill_value}
    if stack.inverted:
        identity["inverted"] = True
    return identity


def file_state(file: Path) -> tuple[str, int, int]:
    """Return the name of a file, its bytes and its time, which tell whether it was touched."""
    status = file.stat()
    return file.name, status.st_size, status.st_mtime_ns


def _require_same(
    final: Path, stack: Sections, identity: dict[str, Any], array: dict[str, Any]
) -> None:
    """Refuse to take a volume for the import of a stack if it holds other voxels."""
    try:
        stored = zarr.open_array(final, mode="r")
        attributes: Any = stored.attrs
        record = attributes[_RECORD]
        if record["digest"] == identity["digest"]:
            return
        source = record["source"]
    except Exception:
        raise InputError(
            f"{final} already exists (in the way) and is no import; remove it or choose another "
            "dataset name"
        ) from None
    differences = [
        f"{name} {old} -> {new}"
        for name, old, new in (
            ("shape", stored.shape, stack.shape),
            ("type", str(stored.dtype), str(array["dtype"])),
            ("voxel size", tuple(attributes["voxel_size"]), array["voxel_size"]),
            ("offset", tuple(attributes["offset"]), array["offset"]),
            ("unit", attributes["units"][0], array["unit"]),
            ("filled sections", record.get("filled"), identity.get("filled")),
        )
        if old != new
    ]
    different = ", ".join(differences) or _changed(stored, stack, final / _STATES)
    if different:
        raise InputError(
            f"{final} already exists (imported from {source}) and holds another import "
            f"({different}): restore the files, choose another dataset or run_dir, or remove it to "
            "import again"
        )
    with suppress(OSError):  # somebody else's import: it is compared again next time
        _write_states(stack, final)


def _write_states(stack: Sections, folder: Path) -> None:
    states = [file_state(file) for file in stack.files]
    write_atomic(folder / _STATES, json.dumps(states).encode())


def _changed(stored: "zarr.Array[Any]", stack: Sections, states: Path) -> str | None:
    """Compare a stack with its import; name a section that differs, if one does."""
    touched = set(stack.files)
    with suppress(OSError, ValueError, TypeError, InputError):
        known = {tuple(state) for state in read_json(states)}
        touched = {file for file in stack.files if file_state(file) not in known}
    depth, total = stored.chunks[0], stack.shape[0]
    following = stack.read(0) if stack.places is None and touched else None
    for low in range(0, total, depth):
        numbers = [
            n
            for n in range(low, min(low + depth, total))
            if following is not None or (stack.places and stack.places[n] in touched)
        ]
        if not numbers:
            continue
        slab: Any = stored[low : low + depth]
        for n in numbers:
            section = next(stack.read(n) if following is None else following)
            section = _as_stored(section, stack, slab.dtype)
            if not np.array_equal(section, slab[n - low], equal_nan=slab.dtype.kind == "f"):
                file = f" ({stack.places[n]})" if stack.places else ""
                return f"section {n}{file} has changed"
    return None


def _import(
    stack: Sections,
    final: Path,
    container: Path,
    identity: dict[str, Any],
    array: dict[str, Any],
    notes: Sequence[str],
    on_progress: Progress | None,
) -> None:
    """Write the whole volume, or what an interrupted import of the same stack has left to do."""
    if stack.inverted:
        _logger.warning("%s: 0 is white in it (MINISWHITE); its values are inverted", stack.name)
    if stack.filled:
        _logger.warning(
            "%s: no file for the sections %s; filled with %g",
            stack.name,
            listed(stack.filled),
            stack.fill_value,
        )
    for note in notes:
        _logger.warning("%s", note)
    hidden = final.parent / f".{final.name}.importing"
    try:
        unfinished = _begin(container, hidden, identity, shape=stack.shape, **array)
        _write_states(stack, hidden)
        try:
            _copy(stack, unfinished, identity, on_progress)
        except InputError as error:
            raise _with_rest(error, unfinished, hidden) from None
        _publish(hidden, final)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        needed = format_bytes(int(np.prod(stack.shape)) * array["dtype"].itemsize)
        raise InputError(
            f"{final}: cannot be written ({error.strerror}); up to {needed} are needed: free "
            "some space or choose another folder, then import again to go on"
        ) from error


def _with_rest(error: InputError, unfinished: "zarr.Array[Any]", hidden: Path) -> InputError:
    """Return an error that says what is left of an import; without a section, nothing is."""
    record: Any = unfinished.attrs[_RECORD]
    if not record["sections"]:
        shutil.rmtree(hidden, ignore_errors=True)
        return error
    return InputError(
        f"{error}; {record['sections']} sections are kept in {hidden}, and the same import goes on "
        "there"
    )


def _remove_empty(container: Path) -> None:
    """Remove a container that was made for an import of which nothing is left."""
    empty = all(
        path.name == "zarr.json" or path.name.endswith(".lock")
        for path in container.rglob("*")
        if path.is_file()
    )
    # An import that goes on next time has files of its own, and so has another dataset.
    if empty and next(container.rglob("*.importing"), None) is None:
        shutil.rmtree(container, ignore_errors=True)


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
        slab[z] = _as_stored(next(sections), stack, dtype)
    return slab


def _as_stored(
    section: npt.NDArray[Any], stack: Sections, dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """Return a section in the type of the volume; -1 becomes its highest value."""
    if stack.dtype.kind == "i" and int(section.min()) < -1:
        raise InputError(
            f"{stack.name} holds negative values other than -1 (unlabelled), which labels cannot "
            "have"
        )
    return section.astype(dtype)
