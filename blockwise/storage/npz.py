"""Files of plain arrays (npy, npz): no pickle, bytes that depend on the arrays alone."""

import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.storage.files import atomic_file, write_atomic
from agq.errors import InputError

Table = TypeVar("Table")
Result = TypeVar("Result")


def parsed(read: Callable[[], Result]) -> Result:
    """Call a function that reads headers of npy files, again if Python fails for no reason.

    numpy parses a header as a Python literal, and in CPython before 3.11.8 and 3.12.2 threads that
    parse at the same time share one counter: now and then one ends with a SystemError
    (python/cpython#106905).
    """
    while True:
        try:
            return read()
        except SystemError as error:
            if "recursion depth mismatch" not in str(error):
                raise


def map_array(path: Path) -> NDArray:
    """Map the file of :func:`save_array` into memory, read-only."""
    return parsed(lambda: np.load(path, mmap_mode="r", allow_pickle=False))


def save_array(path: Path, array: NDArray) -> None:
    """Write an npy file atomically; :func:`map_array` reads it."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(path, buffer.getbuffer())


def save_arrays(path: Path, arrays: Mapping[str, NDArray]) -> None:
    """Write an npz of plain arrays atomically, without holding a copy of it in memory."""
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            # A ZipInfo of its own carries the fixed date 1980-01-01.
            info = zipfile.ZipInfo(f"{name}.npy")
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)


def load_arrays(path: Path, *prefixes: str) -> dict[str, NDArray]:
    """Read :func:`save_arrays`: members whose name begins with one of ``prefixes``, or all.

    Raises
    ------
    InputError
        If the file is not a readable npz.
    """

    def read() -> dict[str, NDArray]:
        with np.load(path, allow_pickle=False) as archive:
            wanted = [name for name in archive.files if not prefixes or name.startswith(prefixes)]
            return {name: archive[name] for name in wanted}

    try:
        return parsed(read)
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: file is damaged ({error})") from None


def table_arrays(prefix: str, table: Any) -> dict[str, NDArray]:
    """Return the columns of a table (a dataclass of arrays), named ``prefix.column``."""
    return {f"{prefix}.{field.name}": getattr(table, field.name) for field in fields(table)}


def array_table(kind: type[Table], prefix: str, arrays: Mapping[str, NDArray]) -> Table:
    """Return the table whose columns :func:`table_arrays` named."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(*(arrays[f"{prefix}.{name}"] for name in names))
