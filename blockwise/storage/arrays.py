"""Plain arrays in files (npy, npz), and tables of them.

Files hold no pickles, and their bytes depend on the arrays alone. A table is a dataclass of arrays
that all have one row for each item, see `Columns`.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.storage.files import atomic_file, write_atomic
from agq.errors import DamagedError

Result = TypeVar("Result")

# What a damaged zip may raise, of whose headers any bit may be wrong.
_UNREADABLE = (
    zipfile.BadZipFile,
    ValueError,
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    zlib.error,
    struct.error,
    SyntaxError,
    MemoryError,
    OverflowError,
)


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
    DamagedError
        If the file is missing, or not a readable npz.
    """

    def read() -> dict[str, NDArray]:
        # Opened here: np.load leaks the file it opens when it finds no zip archive in it.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            wanted = [name for name in archive.files if not prefixes or name.startswith(prefixes)]
            return {name: archive[name] for name in wanted}

    try:
        return parsed(read)
    except FileNotFoundError:
        raise DamagedError(f"{path}: file is missing") from None
    except (*_UNREADABLE, OSError) as error:
        raise DamagedError(f"{path}: file is damaged ({error})") from None


Ids = NDArray[np.uint64]
"""A column of fragment or segment ids."""

Numbers = NDArray[np.int64]
"""A column of counts and sums."""

Rows = NDArray[np.int32]
"""A column of places in another table."""

Pairs = Annotated[NDArray[np.uint64], 2]
"""A column of pairs of ids, (n, 2)."""

Boxes = Annotated[NDArray[np.int64], 6]
"""A column of bounding boxes, (n, 6): first voxel (z, y, x) and one past the last."""


class Columns:
    """Base of frozen dataclasses whose fields are the columns of a table.

    A field is annotated as an array of its type, or as ``Annotated[NDArray[...], width]`` if each
    row of the column holds ``width`` numbers.
    """

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in self.names()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{type(self).__name__}: columns differ in length: {lengths}")

    def __len__(self) -> int:
        return len(getattr(self, self.names()[0]))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the columns."""
        return tuple(field.name for field in fields(cls))  # type: ignore[arg-type]

    def take(self, rows: Any) -> Self:
        """Return some rows, chosen by number or by a mask."""
        columns = {name: getattr(self, name)[rows] for name in self.names()}
        return replace(self, **columns)  # type: ignore[type-var]

    @classmethod
    def concatenate(cls, tables: Sequence[Self]) -> Self:
        """Return the rows of several tables; of a single one, that table itself."""
        if not tables:
            return cls.empty()
        if len(tables) == 1:
            return tables[0]
        return cls(*(np.concatenate([getattr(t, name) for t in tables]) for name in cls.names()))

    @classmethod
    def empty(cls) -> Self:
        """Return a table without rows."""
        return cls(*(np.zeros((0, *width), dtype) for dtype, width in _types(cls)))

    def arrays(self, prefix: str) -> dict[str, NDArray]:
        """Return the columns, named ``prefix.column``, to be saved in an npz file."""
        return {f"{prefix}.{name}": getattr(self, name) for name in self.names()}

    @classmethod
    def of_arrays(cls, prefix: str, arrays: Mapping[str, NDArray]) -> Self:
        """Return the table whose columns :meth:`arrays` named."""
        return cls(*(arrays[f"{prefix}.{name}"] for name in cls.names()))

    @classmethod
    def load(cls, path: Path, prefix: str) -> Self:
        """Read the table whose columns :meth:`arrays` named from an npz file."""
        return cls.of_arrays(prefix, load_arrays(path, f"{prefix}."))


def _types(table: type[Columns]) -> list[tuple[np.dtype, tuple[int, ...]]]:
    """Return the type of each column and the shape of its rows."""
    types = []
    for hint in get_type_hints(table, include_extras=True).values():
        width: tuple[int, ...] = ()
        if get_origin(hint) is Annotated:
            hint, *width_of = get_args(hint)
            width = tuple(width_of)
        scalar = get_args(get_args(hint)[1])[0]
        types.append((np.dtype(scalar), width))
    return types
