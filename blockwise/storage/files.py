"""Durable files: atomic writes, syncs, free space, checksums.

A file written here is either absent (or its old self) or whole, even after SIGKILL or a power
cut: the data go to a temporary file in the same folder, are synced, and are renamed into place;
then the folder is synced, so that the new name is durable too.
"""

import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias

from agq.errors import InputError, RunGoneError
from agq.reading import NotAFileError, open_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

PathLike: TypeAlias = str | os.PathLike[str]
Bytes: TypeAlias = bytes | bytearray | memoryview

FATAL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""A full, over-quota or read-only disk fails every block alike, so it stops the run."""

TEMPORARY_SUFFIX = ".tmp"
"""Ending of the files that a killed `write_atomic` may leave behind; safe to delete."""


_PIECE = 1 << 22


@contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Let errors of open files say which file it is: a full disk and a size limit do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def fsync_path(path: PathLike) -> None:
    """Flush an existing file, or the entries (names) of a folder, to the device.

    Raises
    ------
    OSError
        If the path is missing or the device reports an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse to sync a folder; its entries are durable there anyway.
        if not (error.errno == errno.EINVAL and Path(path).is_dir()):
            raise
    finally:
        os.close(descriptor)


class Unsynced:
    """Files that are written but not durable yet, synced together.

    A folder that names many of them is synced once, and the device has often written a file by the
    time it is asked to: cheaper than to wait for each file.

    Parameters
    ----------
    named
        Folders whose names are known to be durable: a folder that names only these is not synced
        again. It grows; threads may share it. None: nothing is known.
    """

    def __init__(self, named: set[Path] | None = None) -> None:
        self._named = named
        self._files: list[Path] = []
        self._folders: dict[Path, set[Path]] = {}

    def add(self, file: Path, top: Path) -> None:
        """Take a file and the folders above it, up to and including ``top``."""
        self._files.append(file)
        for entry in (file, *file.parents):
            if entry == top:
                return
            if self._named is None or entry not in self._named:
                names = self._folders.setdefault(entry.parent, set())
                if entry != file:
                    names.add(entry)

    def sync(self) -> None:
        """Make them durable, and forget them.

        Raises
        ------
        OSError
            If the device reports an error; some may then not be durable.
        """
        files, folders = self._files, self._folders
        self._files, self._folders = [], {}
        for path in (*files, *folders):
            fsync_path(path)
        if self._named is not None:
            self._named.update(*folders.values())


def require_folder(folder: PathLike) -> None:
    """Check that a run folder is where it was, before something is written into it.

    Raises
    ------
    RunGoneError
        If it is not.
    """
    if not Path(folder).is_dir():
        raise RunGoneError.at(folder)


def make_folder(path: PathLike, *, own: bool = False) -> Path:
    """Create a folder with its missing parents, make their names durable, and return it.

    Parameters
    ----------
    path
        The folder.
    own
        Only its owner may write in it, whatever the umask: it holds what decides what runs. In a
        folder that is shared with a group on purpose (setgid, and writable by it) the group may.
    """
    folder = Path(path)
    missing = []
    current = folder
    while not current.exists():
        missing.append(current)
        current = current.parent
    folder.mkdir(_own_mode(folder) if own else 0o777, parents=True, exist_ok=True)
    for created in reversed(missing):
        fsync_path(created.parent)
    return folder


def _own_mode(folder: Path) -> int:
    above = next((p for p in folder.parents if p.is_dir()), folder)
    shared = stat.S_ISGID | stat.S_IWGRP
    return 0o775 if above.is_dir() and above.stat().st_mode & shared == shared else 0o755


def write_atomic(path: PathLike, data: Bytes, *, mode: int = 0o666) -> None:
    """Write a whole file so that no reader, and no crash, ever sees a part of it.

    Two processes may write the same path at once: each uses its own temporary name, and the last
    rename wins with a whole file.

    Parameters
    ----------
    path
        The file; an old one is replaced. Its folder is made if missing.
    data
        All the bytes of the file.
    mode
        Permissions, less those that the umask takes: 0o600 for a file with a secret in it, 0o644
        for one that decides what runs.

    Raises
    ------
    OSError
        If the folder is not writable or the disk is full; the temporary file is removed.
    """
    with atomic_file(path, mode=mode) as file:
        file.write(data)


@contextmanager
def atomic_file(path: PathLike, *, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name, synced and whole, when the block ends well.

    Parameters and errors are those of :func:`write_atomic`.
    """
    target = Path(path)
    if not target.parent.is_dir():
        make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        temporary.touch(mode, exist_ok=False)
        with naming(target), temporary.open("r+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(target.parent)


def descriptor_of(path: PathLike, flags: int) -> int:
    """Open a regular file that stays at its place, made if missing, and return its descriptor.

    Whoever else may write to a folder could put a link under the name of a file of ours, and it
    would lead to another file of this user.

    Parameters
    ----------
    flags
        As for `os.open`.

    Raises
    ------
    NotAFileError
        If it is a link or no regular file.
    OSError
        If it cannot be opened or made.
    """
    wrong = f"{os.fspath(path)} is no regular file; remove it"
    kept = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | kept, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise NotAFileError(wrong) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAFileError(wrong)
    return descriptor


def checksum(data: "Bytes | NDArray[Any]") -> str:
    """Return the 64-bit BLAKE2b digest of bytes as 16 lower-case hex digits.

    Of an array the bytes in C order count, not its shape or dtype.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        import numpy as np  # slow to load, and callers that only write files need none

        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def file_checksum(path: PathLike) -> str:
    """Return the :func:`checksum` of a file, which ``b2sum -l 64`` prints too.

    Raises
    ------
    OSError, NotAFileError
        If it cannot be read, or is no file.
    """
    total = hashlib.blake2b(digest_size=8)
    with open_file(path) as file:
        while piece := file.read(_PIECE):
            total.update(piece)
    return total.hexdigest()


def free_space(path: PathLike) -> int:
    """Return the bytes free for this user on the file system that holds or will hold `path`."""
    parent = Path(path).absolute()
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free


class DiskUsage(NamedTuple):
    """Files below a folder, what they take of the disk, and whether all of them were counted."""

    files: int
    bytes: int
    whole: bool


def disk_usage(folder: PathLike, *, without: Collection[str] = (), most_s: float) -> DiskUsage:
    """Count the files below a folder, and the blocks of the disk that they take.

    Parameters
    ----------
    folder
        The folder; links in it are not followed.
    without
        Names of entries of the folder that are left out.
    most_s
        Seconds after which the count ends, whole or not.
    """
    end, files, size = time.monotonic() + most_s, 0, 0
    folders = [os.fspath(folder)]
    while folders:
        top = folders.pop()
        # What goes away meanwhile, or cannot be read, is not counted.
        with suppress(OSError), os.scandir(top) as entries:
            for entry in entries:
                if time.monotonic() > end:
                    return DiskUsage(files, size, whole=False)
                if top == os.fspath(folder) and entry.name in without:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    files += 1
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
    return DiskUsage(files, size, whole=True)


def require_free_space(path: PathLike, needed: int, what: str = "output") -> None:
    """Check that the disk of an output has room.

    Parameters
    ----------
    path
        The output folder; it need not exist.
    needed
        Bytes about to be written.
    what
        Name of the output for the message.

    Raises
    ------
    InputError
        If fewer than `needed` bytes are free.
    """
    free = free_space(path)
    if free < needed:
        raise InputError(
            f"{what}: {path} needs about {format_bytes(needed)}, but its disk has "
            f"{format_bytes(free)} free; free some space or choose another folder"
        )


def require_writable(folder: PathLike, what: str = "output", *, create: bool = False) -> None:
    """Check that files can be created in a folder, by creating one and removing it.

    Permission bits are not trusted: root, read-only mounts, quotas and full disks show only when
    bytes are really written.

    Parameters
    ----------
    folder
        The folder.
    what
        Name of the output for the message.
    create
        Make the folder if it does not exist.

    Raises
    ------
    InputError
        If the folder is not there, or cannot be made or written, or the disk is full.
    """
    path = Path(folder)
    try:
        if create:
            make_folder(path, own=True)
        probe = path / f".probe.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
        try:
            with probe.open("xb") as file:
                file.write(b"\0" * 4096)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except FileExistsError:
        raise InputError(
            f"{what}: {path} exists and is not a folder; choose another path"
        ) from None
    except NotADirectoryError:
        raise InputError(f"{what}: a parent of {path} is a file; choose another path") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "its disk is full"
        else:
            reason = error.strerror or str(error)
        raise InputError(
            f"{what}: cannot write in {path} ({reason}); choose another folder or fix its disk"
        ) from None


def format_bytes(count: float) -> str:
    """Return a byte count in the largest binary unit that leaves at least 1, as ``3.2 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
