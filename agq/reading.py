"""Read files that somebody else may have made: nothing hangs, nothing grows without end.

A name may belong to a FIFO, which waits for a writer, to a device, which has no end, or to a link
that leads out of the folder. So every file of a user, of a run folder or of a volume is opened
here, or by a library that was handed what is opened here.
"""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, Final, TypeAlias

from agq.errors import DamagedError, InputError

PathLike: TypeAlias = str | os.PathLike[str]
Check: TypeAlias = Callable[[PathLike, os.stat_result], object]

DOCUMENT_BYTES: Final = 2**24
"""Most bytes of a document, such as the metadata of an array or the record of a run."""

DOCUMENT_LEVELS: Final = 64
"""Most levels of lists and mappings within each other in a document."""

_TOO_DEEP: Final = f"more than {DOCUMENT_LEVELS} levels of lists and objects in each other"
_PIECE: Final = 2**16
_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_KINDS: Final = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


class NotAFileError(InputError):
    """What lies at a path is no regular file, or a link where links are not followed."""


@contextmanager
def open_file(
    path: PathLike,
    *,
    within: PathLike | None = None,
    follow: bool = True,
    check: Check | None = None,
) -> Iterator[BufferedReader]:
    """Open a regular file for reading.

    Parameters
    ----------
    path
        The file.
    within
        A folder above it, below which nothing may be a link or ``..``: what is opened lies in it.
    follow
        Whether the last part of the path may be a link.
    check
        Called with the path and the state of what was opened: the name may mean another file a
        moment later.

    Raises
    ------
    NotAFileError
        If it is a FIFO, a device, a socket, a folder, or a link that must not be followed.
    OSError
        If there is none, or it may not be read.
    """
    with os.fdopen(_descriptor(path, within, follow), "rb") as file:
        if check is not None:
            check(path, os.fstat(file.fileno()))
        yield file


def read_file(
    path: PathLike,
    *,
    most: int | None = None,
    within: PathLike | None = None,
    follow: bool = True,
    check: Check | None = None,
) -> bytes:
    """Read a whole regular file.

    Parameters
    ----------
    path, within, follow, check
        As for `open_file`.
    most
        Bytes that such a file may have; None: any number.

    Raises
    ------
    InputError
        If it is larger than `most`, or as for `open_file`.
    OSError
        As for `open_file`.
    """
    with open_file(path, within=within, follow=follow, check=check) as file:
        require_size(path, os.fstat(file.fileno()).st_size, most)
        # A file may grow, and those of /proc say that they are empty.
        data = file.read(os.fstat(file.fileno()).st_size)
        while piece := file.read(_PIECE):
            data += piece
            require_size(path, len(data), most)
    return data


def require_file(path: PathLike, *, most: int | None = None) -> None:
    """Check that a path is a regular file, before it is given by its name to a library.

    Arguments and errors are those of `read_file`. Whoever may write to the folder can still put
    something else there afterwards.
    """
    with open_file(path) as file:
        require_size(path, os.fstat(file.fileno()).st_size, most)


def require_size(path: PathLike, size: int, most: int | None) -> None:
    """Check that a file is not larger than such a file is.

    Raises
    ------
    InputError
        If it has more than `most` bytes.
    """
    if most is not None and size > most:
        raise InputError(
            f"{os.fspath(path)} has {size} bytes, and such a file {most} at most: it is damaged, "
            "or another kind of file"
        )


def parse_json(data: bytes | str) -> Any:
    """Parse a JSON document that is no deeper than `DOCUMENT_LEVELS`.

    Raises
    ------
    ValueError
        If it is not JSON, or too deep.
    """
    try:
        document = json.loads(data)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level: list[Any] = [document]
    for _ in range(DOCUMENT_LEVELS):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return document
    raise ValueError(_TOO_DEEP)


def read_json(path: PathLike, *, most: int = DOCUMENT_BYTES, **how: Any) -> Any:
    """Read a JSON document; see `read_file` and `parse_json`.

    Raises
    ------
    InputError
        As for `read_file`.
    ValueError
        As for `parse_json`.
    OSError
        As for `read_file`.
    """
    return parse_json(read_file(path, most=most, **how))


def read_record(path: PathLike, **how: Any) -> dict[str, Any]:
    """Read a JSON object that a program of ours has written; see `read_json`.

    Raises
    ------
    DamagedError
        If it is none.
    InputError, OSError
        As for `read_file`.
    """
    try:
        record = read_json(path, **how)
    except ValueError as error:
        raise DamagedError(f"{os.fspath(path)}: file is damaged ({error})") from None
    if not isinstance(record, dict):
        raise DamagedError(f"{os.fspath(path)}: file is damaged (it holds no JSON object)")
    return record


def _descriptor(path: PathLike, within: PathLike | None, follow: bool) -> int:
    text = os.fspath(path)
    try:
        os.fsencode(text)
        possible = "\0" not in text
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise FileNotFoundError(errno.ENOENT, "no file can have this name", text)
    try:
        if within is None:
            descriptor = os.open(text, _FLAGS | (0 if follow else os.O_NOFOLLOW))
        else:
            descriptor = _below(Path(text), Path(within))
    except OSError as error:
        raise _told(error, Path(text), within, follow) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise NotAFileError(_no_file(text, mode))
    return descriptor


def _below(path: Path, top: Path) -> int:
    """Open a file, and every folder on the way from `top` to it, as what they are: no links."""
    try:
        parts = path.relative_to(top).parts
    except ValueError:
        parts = ("..",)
    if not parts or ".." in parts:
        raise NotAFileError(f"{path} does not lie in {top}")
    folder = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inner = os.open(part, flags, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(parts[-1], _FLAGS | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)


def _told(error: OSError, path: Path, within: PathLike | None, follow: bool) -> Exception:
    """Return the error of an open with the whole path, or that of something that is no file."""
    links = [path] if within is None else [path, *path.parents]
    for part in links if within is not None or not follow else ():
        if within is not None and part == Path(within):
            break
        if part.is_symlink():
            return NotAFileError(
                f"{part} is a symbolic link, which is not followed: whoever made the folder decides"
                " where it leads; put the file itself there"
            )
    try:
        mode = path.lstat().st_mode
    except OSError:
        mode = 0
    if stat.S_ISSOCK(mode):  # refused by the system with "no such device or address"
        return NotAFileError(_no_file(path, mode))
    error.filename = str(path)
    return error


def _no_file(path: PathLike, mode: int) -> str:
    kind = _KINDS.get(stat.S_IFMT(mode), "special file")
    return f"{os.fspath(path)} is a {kind}, not a file; correct the path, or restore the file"
