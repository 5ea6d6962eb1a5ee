"""Plain arrays in files (npy, npz), and tables of them.

Files hold no pickles, and their bytes depend on the arrays alone. A table is a dataclass of arrays
that all have one row for each item, see `Columns`.
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import IO, Annotated, Any, Self, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.storage.files import atomic_file, write_atomic
from agq.errors import DamagedError
from agq.reading import NotAFileError, open_file, require_file

Result = TypeVar("Result")

UNREADABLE = (
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
    TypeError,
)
"""What a damaged zip may raise, of whose headers any bit may be wrong."""


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


def map_arrays(path: Path, *prefixes: str) -> dict[str, NDArray]:
    """Map what :func:`load_arrays` reads into memory, read-only.

    Raises
    ------
    DamagedError
        As for :func:`load_arrays`.
    """

    def read() -> dict[str, NDArray]:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = {n: i for n, i in infos.items() if not prefixes or n.startswith(prefixes)}
            return _Arrays(path, ((name, _mapped(path, file, i)) for name, i in wanted.items()))

    with _damage(path):
        return parsed(read)


def _mapped(path: Path, file: IO[bytes], info: zipfile.ZipInfo) -> NDArray:
    """Map a member of a zip that is not compressed."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    file.seek(info.header_offset + 26)
    lengths = struct.unpack("<HH", file.read(4))
    file.seek(sum(lengths), os.SEEK_CUR)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{info.filename} has another version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or fortran:
        raise ValueError(f"{info.filename} is not a plain array")
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", file.tell(), shape)


def map_array(path: Path) -> NDArray:
    """Map the file of :func:`save_array` into memory, read-only.

    Raises
    ------
    DamagedError
        If the file is missing, or not a readable npy.
    """
    with _damage(path):
        require_file(path)
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


class _Arrays(dict[str, NDArray]):
    """Arrays of a file that is damaged if one is missing."""

    def __init__(self, path: Path, arrays: Iterable[tuple[str, NDArray]]) -> None:
        super().__init__(arrays)
        self._path = path

    def __missing__(self, name: str) -> NDArray:
        raise DamagedError(f"{self._path}: file is damaged (it has no {name})")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Let errors of reading a file say that it is missing or damaged."""
    try:
        yield
    except FileNotFoundError:
        raise DamagedError(f"{path}: file is missing") from None
    except (*UNREADABLE, OSError, NotAFileError) as error:
        raise DamagedError(f"{path}: file is damaged ({error})") from None


def open_npz(file: IO[bytes], most: int | None = None) -> "np.lib.npyio.NpzFile":
    """Open an npz, of which no member is larger than it may be.

    Parameters
    ----------
    file
        The open file.
    most
        Bytes that all members may have, decompressed; None: those of the file itself, as they have
        in the files of :func:`save_arrays`, which are not compressed.

    Raises
    ------
    ValueError
        If it is no npz, or its members are larger: a small file can say that it holds any number of
        zeros.
    """
    archive = np.load(file, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile) or archive.zip is None:
        raise ValueError("not an npz")
    if most is None:
        most = os.fstat(file.fileno()).st_size
    size = sum(info.file_size for info in archive.zip.infolist())
    if size > most:
        raise ValueError(f"its arrays have {size} bytes, and {most} are the most")
    return archive


def load_arrays(path: Path, *prefixes: str, most: int | None = None) -> dict[str, NDArray]:
    """Read :func:`save_arrays`: members whose name begins with one of ``prefixes``, or all.

    Parameters
    ----------
    most
        As for :func:`open_npz`.

    Raises
    ------
    DamagedError
        If the file is missing, or not a readable npz; also if the dictionary is asked for an array
        that the file does not have.
    """

    def read() -> dict[str, NDArray]:
        with open_file(path) as file, open_npz(file, most) as archive:
            wanted = [name for name in archive.files if not prefixes or name.startswith(prefixes)]
            return _Arrays(path, ((name, archive[name]) for name in wanted))

    with _damage(path):
        return parsed(read)


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
        """Return the table whose columns :meth:`arrays` named.

        Raises
        ------
        DamagedError
            If a column is missing, or of another type or width: compiled code relies on them.
        """
        columns = []
        for name, (dtype, width) in zip(cls.names(), _types(cls), strict=True):
            column = arrays.get(f"{prefix}.{name}")
            if column is None or column.dtype != dtype or column.shape[1:] != width:
                found = "missing" if column is None else f"{column.dtype} {column.shape}"
                raise DamagedError(f"column {prefix}.{name} is {found}, not {dtype} (n, {width})")
            columns.append(column)
        try:
            return cls(*columns)
        except ValueError as error:
            raise DamagedError(str(error)) from None

    @classmethod
    def load(cls, path: Path, prefix: str) -> Self:
        """Read the table whose columns :meth:`arrays` named from an npz file.

        Raises
        ------
        DamagedError
            If the file is missing or damaged.
        """
        try:
            return cls.of_arrays(prefix, load_arrays(path, f"{prefix}."))
        except DamagedError as error:
            if str(path) in str(error):
                raise
            raise DamagedError(f"{path}: file is damaged ({error})") from None


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
