"""Image stacks of common formats as a sequence of sections, read one after the other.

Understood are tif files of many pages, folders and globs of tif or png sections, HDF5 datasets,
and the npy and npz files of `agq.pipeline.data.packed_sections`.
"""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import imagecodecs
import numpy as np
import tifffile

from agq.errors import InputError
from agq.paths import expanded
from agq.pipeline.data.packed_sections import open_npy, open_npz
from agq.pipeline.data.section_stack import (
    Section,
    Sections,
    choose,
    native,
    stack_shape,
    unreadable,
)

_TIF = (".tif", ".tiff")
_HDF5 = (".h5", ".hdf5", ".hdf")
_IMAGES = (*_TIF, ".png")
_CONTAINER_FILES = ("zarr.json", ".zgroup", ".zarray", ".zattrs", "attributes.json")

# HDF5 decodes whole chunks: sections that share one are read together, up to this many bytes.
_READ_BYTES = 2**28


def is_importable(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is an image stack to import, rather than a zarr or N5 container.

    Parameters
    ----------
    path
        A file, a folder or a glob pattern; addresses with :// are never importable.
    """
    text = os.fspath(path)
    if "://" in text:
        return False
    place = expanded(text)
    if place.is_dir():
        if any((place / name).exists() for name in _CONTAINER_FILES):
            return False
        return any(entry.suffix.lower() in _IMAGES for entry in place.iterdir())
    if place.suffix.lower() in (*_IMAGES, *_HDF5, ".npy", ".npz"):
        return True
    return not place.exists() and glob.has_magic(text) and bool(_matches(place))


def open_sections(source: str | os.PathLike[str], key: str | None = None) -> Sections:
    """Open an image stack; only headers, and at most the first section, are read.

    Parameters
    ----------
    source
        Tif, HDF5, npy or npz file; folder or glob of tif or png files, one section each, taken in
        natural order (2 before 10).
    key
        Dataset of an HDF5 file or array of an npz file; may be left out where only one is 3-D.

    Returns
    -------
    Sections
        The stack.

    Raises
    ------
    InputError
        One line that names the file that cannot be used, and what is in it.
    """
    text = os.fspath(source)
    place = expanded(text)
    if not place.exists() and glob.has_magic(text):
        return _files(_matches(place), text)
    if not place.exists():
        raise InputError(f"{place}: no such file or folder; correct the path")
    if place.is_dir():
        found = (p for p in place.iterdir() if not p.name.startswith("."))
        return _files([p for p in found if p.suffix.lower() in _IMAGES], text)
    suffix = place.suffix.lower()
    opener = (
        {".npy": open_npy, ".npz": open_npz}
        | dict.fromkeys(_TIF, _tif)
        | dict.fromkeys(_HDF5, _hdf5)
    )
    if suffix not in opener:
        known = ", ".join(sorted(opener))
        raise InputError(f"{place}: files of this kind cannot be imported; use one of {known}")
    try:
        return opener[suffix](place, key)
    except InputError:
        raise
    except Exception as error:
        raise unreadable(place, error) from error


def natural_key(text: str) -> list[tuple[int, int | str]]:
    """Return a sort key that puts ``s2.tif`` before ``s10.tif``."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part]


def _matches(pattern: Path) -> list[Path]:
    root = Path(pattern.anchor)
    return [file for file in root.glob(str(pattern.relative_to(root))) if file.is_file()]


# ------------------------------------------------------------------ one file per section


def _image(file: Path) -> Section:
    try:
        if file.suffix.lower() == ".png":
            image = np.asarray(imagecodecs.png_decode(file.read_bytes()))
        else:
            image = np.asarray(tifffile.imread(file))
    except Exception as error:
        raise unreadable(file, error) from error
    if image.ndim != 2:
        raise InputError(
            f"{file} holds {image.ndim}-D data of shape {image.shape}; a section must be one 2-D "
            "grey-value image"
        )
    return image


def _files(files: list[Path], name: str) -> Sections:
    if not files:
        raise InputError(f"{name}: no tif or png sections found; correct the path")
    ordered = sorted(files, key=lambda file: natural_key(file.name))
    kinds = {"tif" if file.suffix.lower() in _TIF else file.suffix.lower() for file in ordered}
    if len(kinds) > 1:
        raise InputError(f"{name} mixes {' and '.join(sorted(kinds))} files; keep one kind")
    first = _image(ordered[0])

    def read(start: int) -> Iterator[Section]:
        for file in ordered[start:]:
            image = _image(file)
            if image.shape != first.shape or image.dtype != first.dtype:
                raise InputError(
                    f"{file} is {image.shape} {image.dtype}, but {ordered[0].name} is "
                    f"{first.shape} {first.dtype}; all sections must be alike"
                )
            yield image

    shape = (len(ordered), first.shape[0], first.shape[1])
    return Sections(name, tuple(ordered), shape, native(first.dtype), read)


# ------------------------------------------------------------------ tif


def _tif(file: Path, key: str | None) -> Sections:
    del key
    with tifffile.TiffFile(file) as tif:
        series = tif.series[0]
        if {(s.shape, str(s.dtype)) for s in tif.series} != {(series.shape, str(series.dtype))}:
            shapes = ", ".join(str(series.shape) for series in tif.series[:5])
            raise InputError(f"{file} holds images that are not alike: {shapes}; split it")
        apart = len(tif.series) > 1  # pages written one by one, each a series of its own
        if series.axes.endswith("S"):
            raise InputError(f"{file} is a colour image {series.shape}; convert it to grey values")
        squeezed = [n for n in (len(tif.series), *series.shape[:-2]) if n != 1]
        shape = stack_shape((*(squeezed or [1]), *series.shape[-2:]), str(file))
        dtype = native(series.dtype)
        paged = apart or len(series.pages) == shape[0]
        if not paged and series.dataoffset is None:
            raise InputError(f"{file}: its sections are packed in one page; save it page by page")

    def read(start: int) -> Iterator[Section]:
        with tifffile.TiffFile(file) as tif:
            series = tif.series[0]
            packed = None if paged else tifffile.memmap(file, mode="r").reshape(shape)
            for number in range(start, shape[0]):
                try:
                    if packed is not None:
                        yield packed[number]
                        continue
                    page = tif.series[number].pages[0] if apart else series.pages[number]
                    if page is None:
                        raise ValueError("the page is missing")
                    image = page.asarray()
                except Exception as error:
                    raise unreadable(file, error, number) from error
                yield image

    return Sections(str(file), (file,), shape, dtype, read)


# ------------------------------------------------------------------ HDF5


def _hdf5(file: Path, key: str | None) -> Sections:
    choices: dict[str, str] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and (item.ndim == 3 or name == (key or "").strip("/")):
            choices[name] = f"{item.shape} {item.dtype}"

    with h5py.File(file, "r") as store:
        store.visititems(visit)
        chosen = choose(key, choices, str(file))
        dataset = store[chosen]
        shape = stack_shape(dataset.shape, f"{file}:{chosen}")
        dtype = native(dataset.dtype)
        together = (dataset.chunks or (1,))[0]
    step = max(1, min(together, _READ_BYTES // (shape[1] * shape[2] * dtype.itemsize)))

    def read(start: int) -> Iterator[Section]:
        with h5py.File(file, "r") as store:
            for low in range(start, shape[0], step):
                try:
                    group = store[chosen][low : min(low + step, shape[0])]
                except Exception as error:
                    raise unreadable(f"{file}:{chosen}", error, low) from error
                yield from group

    return Sections(f"{file}:{chosen}", (file,), shape, dtype, read)
