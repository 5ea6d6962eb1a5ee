"""Image stacks of common formats as a sequence of sections, read one after the other.

Understood are tif files of many pages, folders and globs of tif or png sections, HDF5 datasets,
and the npy and npz files of `agq.pipeline.data.packed_sections`.
"""

import glob
import os
from pathlib import Path

from agq.errors import InputError
from agq.paths import expanded
from agq.pipeline.data.packed_sections import open_npy, open_npz
from agq.pipeline.data.section_files import IMAGES, OTHER_IMAGES, TIF, is_stack, open_files
from agq.pipeline.data.section_stack import Sections, unreadable
from agq.pipeline.data.tif import open_tif
from agq.reading import require_file

_HDF5 = (".h5", ".hdf5", ".hdf", ".he5", ".ims")
_CONTAINER_FILES = ("zarr.json", ".zgroup", ".zarray", ".zattrs", "attributes.json")


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
    elif place.suffix.lower() in (*IMAGES, *OTHER_IMAGES, *_HDF5, ".npy", ".npz"):
        return True
    return is_stack(text)


def exists(path: str | os.PathLike[str]) -> bool:
    """Tell whether the files of an image stack are there."""
    text = os.fspath(path)
    return expanded(text).exists() or is_stack(text)


def open_sections(
    source: str | os.PathLike[str], key: str | None = None, *, gap_value: float | None = None
) -> Sections:
    """Open an image stack; only headers, and at most the first section, are read.

    Parameters
    ----------
    source
        Tif, HDF5, npy or npz file; folder or glob of tif or png files, one section each, in the
        order of the numbers in their names (`agq.pipeline.data.numbering`).
    key
        Dataset of an HDF5 file or array of an npz file; may be left out where only one is 3-D.
    gap_value
        Fills sections of a folder or glob whose number no file has; None: they are an error.

    Raises
    ------
    InputError
        One line that names the file that cannot be used, and what is in it.
    """
    text = os.fspath(source)
    place = expanded(text)
    if place.is_dir() or (glob.has_magic(text) and not place.exists()):
        return open_files(text, gap_value)
    if not place.exists():
        raise InputError(f"{place}: no such file or folder; correct the path")
    suffix = place.suffix.lower()
    opener = (
        {".npy": open_npy, ".npz": open_npz}
        | dict.fromkeys(TIF, open_tif)
        | dict.fromkeys(_HDF5, _open_hdf5)
    )
    if suffix not in opener:
        known = ", ".join(sorted(opener))
        raise InputError(f"{place}: files of this kind cannot be imported; use one of {known}")
    require_file(place)  # what reads them would wait at a FIFO
    try:
        return opener[suffix](place, key)
    except InputError:
        raise
    except Exception as error:
        raise unreadable(place, error) from error


def _open_hdf5(place: Path, key: str | None) -> Sections:
    from agq.pipeline.data.hdf5 import open_hdf5  # loads h5py

    return open_hdf5(place, key)
