"""Writes a part as TIFF, HDF5 or OME-Zarr, with its voxel size where other programs look for it.

Files are written under a temporary name and renamed when they are whole. Memory is bounded by a
section (TIFF) or a few stored chunks.
"""

from __future__ import annotations

import csv
import glob
import io
import math
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import h5py
import numpy as np
import tifffile
import zarr

from agq.blockwise.storage.files import atomic_file, fsync_path, make_folder, write_atomic
from agq.blockwise.storage.leftovers import remove_temporaries
from agq.blockwise.volumes.create import create_array, ome_attributes, write_chunk
from agq.blockwise.volumes.placement import PER_NANOMETRE
from agq.errors import InputError
from agq.pipeline.export.part import Part, Step

TIFF_BITS: Final = 32
BITS: Final = 64
"""Most bits of a label, in TIFF and in the other formats."""

EXACT_IN_FLOATS: Final = 2**24
"""Above it, 32-bit labels are not exact where a program shows them as floats, as ImageJ does."""

_CLASSIC_BYTES: Final = 2**32 - 2**25
_HDF5_CHUNK: Final = 64
_MOST_VOXELS: Final = 2**22
"""Of a chunk of zarr."""


def require_new(out: Path) -> None:
    """Refuse to write over what is there, and remove what a killed export has left.

    Raises
    ------
    InputError
        If something has this name, or its folder is missing.
    """
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists already; remove it, or choose another name")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: the folder {out.parent} does not exist")
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
    remove_temporaries([out])


def write_tiff(part: Part, out: Path, on_progress: Step) -> None:
    """Write a stack of sections with the voxel size as ImageJ writes it; BigTIFF above 4 GB.

    Labels are compressed (deflate).
    """
    depth, per = part.volume.shape[0], PER_NANOMETRE[part.volume.unit]
    _, height, width = (int(v) for v in part.volume.voxel_size)
    size, place = _nanometres(part)
    # What ImageJ writes; its own reader and Bio-Formats take it whatever the type of the voxels.
    lines = [
        "ImageJ=1.54f",
        f"images={depth}",
        f"slices={depth}",
        "unit=nm",
        f"spacing={size[0]:.12g}",
        *(
            f"{axis}origin={-o / s:.12g}"
            for axis, o, s in zip("xyz", place[::-1], size[::-1], strict=True)
        ),
        "loop=false",
    ]
    if part.labels:
        lines += ["min=0.0", f"max={float(part.largest)}"]
    voxels = math.prod(part.volume.shape) * part.dtype.itemsize
    with (
        atomic_file(out) as file,
        tifffile.TiffWriter(file, bigtiff=voxels > _CLASSIC_BYTES) as writer,
    ):

        def sections() -> Iterator[np.ndarray]:
            for done, section in enumerate(part.sections()):
                on_progress(done, depth)
                yield section

        writer.write(
            sections(),
            shape=part.volume.shape,
            dtype=part.dtype,
            photometric="minisblack",
            compression="zlib" if part.labels else None,
            # Pixels per nanometre, exactly.
            resolution=((per, width), (per, height)),
            resolutionunit="NONE",
            description="\n".join(lines) + "\n",
            metadata=None,
            software="agq",
        )
        on_progress(depth, depth)


def write_hdf5(part: Part, out: Path, on_progress: Step) -> None:
    """Write one dataset, chunked and compressed, named like the layer.

    Its attributes say the voxel size as Fiji's plugins (``element_size_um``) and the tools of the
    field (``resolution`` and ``offset``, with ``units``) read it.
    """
    shape, places = part.volume.shape, part.boxes()
    size, _ = _nanometres(part)
    with atomic_file(out) as file, h5py.File(file, "w") as container:
        array = container.create_dataset(
            part.name,
            shape,
            part.dtype,
            chunks=tuple(np.minimum(np.minimum(part.volume.chunks, shape), _HDF5_CHUNK).tolist()),
            compression="gzip",
            compression_opts=1,
            shuffle=not part.labels,
        )
        array.attrs["element_size_um"] = [s / 1000 for s in size]
        array.attrs["resolution"] = [int(v) for v in part.volume.voxel_size]
        array.attrs["offset"] = [int(o) for o in part.volume.offset]
        array.attrs["units"] = [part.volume.unit] * 3
        on_progress(0, len(places))
        for done, (start, stop) in enumerate(places, start=1):
            box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            array[box] = part.read(start, stop)
            on_progress(done, len(places))


def write_zarr(part: Part, out: Path, on_progress: Step) -> None:
    """Write an OME-NGFF 0.5 image (zarr v3) of one resolution, ``s0``."""
    volume = part.volume
    chunks = [min(c, n) for c, n in zip(volume.chunks, volume.shape, strict=True)]
    if math.prod(chunks) > _MOST_VOXELS:
        chunks = [min(c, 128) for c in chunks]
    with _whole_folder(out) as folder:
        array = create_array(
            folder,
            "s0",
            shape=volume.shape,
            chunks=chunks,
            dtype=part.dtype,
            voxel_size=volume.voxel_size,
            offset=volume.offset,
            unit=volume.unit,
        )
        # OME places centres: a coarse level lies so that it covers the finest one.
        place = [
            o + (v - f) / 2
            for o, v, f in zip(volume.offset, volume.voxel_size, part.finest, strict=True)
        ]
        described = ome_attributes(part.name, volume.unit, [("s0", volume.voxel_size, place)])
        if part.labels:
            described["image-label"] = {}
        zarr.open_group(store=str(folder), mode="a", zarr_format=3).attrs["ome"] = described
        grid = [-(-n // c) for n, c in zip(volume.shape, chunks, strict=True)]
        total = math.prod(grid)
        on_progress(0, total)
        for done, index in enumerate(np.ndindex(*grid), start=1):
            start = [i * c for i, c in zip(index, chunks, strict=True)]
            stop = [min(a + c, n) for a, c, n in zip(start, chunks, volume.shape, strict=True)]
            write_chunk(array, index, part.read(start, stop))
            on_progress(done, total)


def write_ids(part: Part, table: Path) -> None:
    """Write which label stands for which, as CSV: ``label`` in the file, ``segment`` before."""
    assert part.ids is not None
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("label", "segment"))
    writer.writerows(enumerate(part.ids.tolist()))
    write_atomic(table, text.getvalue().encode())


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that gets its name when the block ends well, and is removed otherwise."""
    folder = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    make_folder(folder)
    try:
        yield folder
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    fsync_path(out.parent)


def _nanometres(part: Part) -> tuple[list[float], list[float]]:
    """Return voxel size and place of the first voxel's corner, (z, y, x)."""
    per = PER_NANOMETRE[part.volume.unit]
    return [v / per for v in part.volume.voxel_size], [o / per for o in part.volume.offset]
