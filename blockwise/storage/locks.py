"""Locks between processes, also of several machines, with or without the file system's help.

`flock` alone is not enough: some network file systems refuse it, and some mounts keep it to one
machine. So a second file beside the lock, ``NAME.owner``, made with O_EXCL, says who holds it, and
its owner renews it every few seconds. It counts as left behind if its process has ended or, seen
from another machine, if it is not renewed any more. Where processes share a kernel, `flock` tells
at once that the owner has died.
"""

import errno
import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from agq.blockwise.storage.files import descriptor_of
from agq.blockwise.threads import start_vital
from agq.reading import NotAFileError, open_file

_NO_FLOCK = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
_RENEW_S = 5.0
_STALE_S = 30.0
_SETTLE_S = 1.0
_POLL_S = 0.2
_MOST = 4096

_logger = logging.getLogger(__name__)


class LockedError(Exception):
    """Another process holds the lock; the message names its host and process id."""


@contextmanager
def hold(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock while the block runs.

    Parameters
    ----------
    path
        File of the lock, made if missing; it keeps the name of its last owner.
    wait
        Wait until it is free.

    Raises
    ------
    LockedError
        If another process holds it, and `wait` is off.
    NotAFileError
        If it is a link or no regular file: it is emptied.
    OSError
        If the file cannot be made or written.
    """
    descriptor = descriptor_of(path, os.O_RDWR | os.O_APPEND)
    with os.fdopen(descriptor, "a+", encoding="utf-8", errors="replace") as file:
        owner = _OwnerFile(path, flocked=_flock(file, wait=wait))
        while owner.is_taken() or not owner.take():
            if not wait:
                raise LockedError(owner.name())
            time.sleep(_POLL_S)
        file.truncate(0)
        file.write(_this_process())
        file.flush()
        with owner.renewed():
            yield


def is_held(path: Path) -> bool | None:
    """Tell whether a process of this machine holds a lock; None if another machine's may.

    The lock is tried only if the process that took it last lives: one that starts at this moment
    may want a free lock.
    """
    import psutil

    try:
        with open_file(path, follow=False) as file:
            host, pid = file.read(_MOST).decode().removeprefix("host ").split(", pid ")
            if host != socket.gethostname():
                return None
            if not psutil.pid_exists(int(pid)):
                return False
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError as error:
                return _owner_path(path).exists() if error.errno in _NO_FLOCK else None
            return False
    except (OSError, ValueError, NotAFileError):
        return None


def _flock(file: IO[str], *, wait: bool) -> bool:
    """Lock an open file; False if its file system cannot."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.seek(0)
        raise LockedError(file.read(_MOST).strip()) from None
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return False
    return True


class _OwnerFile:
    """``NAME.owner`` beside a lock: there while a process holds the lock.

    Its lines: host and process id for people, kernel, namespace of process ids, process id and
    start, whether the owner has flock, and a random word.
    """

    def __init__(self, lock: Path, *, flocked: bool) -> None:
        self._flocked = flocked
        self._path = _owner_path(lock)
        self._kernel, self._pids = _kernel()
        words = _this_process(), self._kernel, self._pids, _process(os.getpid()), str(flocked)
        self._mine = "\n".join([*words, secrets.token_hex(8)])
        self._removed = False

    def name(self) -> str:
        """Return host and process id of the owner."""
        return self._read()[0].partition("\n")[0]

    def is_taken(self) -> bool:
        """Tell whether another process holds it; remove what a process that has ended left."""
        state = self._read()
        content, renewed = state
        if not renewed:
            return False
        lines = content.split("\n")
        whole = len(lines) == 6
        if whole and lines[1] == self._kernel and self._flocked and lines[4] == str(True):
            over = True
        elif whole and lines[1:3] == [self._kernel, self._pids]:
            over = lines[3] != _process(int(lines[3].split()[0]))
        else:
            over = self._stays(state)
        if over and self._read() == state:
            _logger.warning("%s: %s has ended and left it behind", self._path, lines[0])
            self._path.unlink(missing_ok=True)
            self._removed = True
        return not over

    def _stays(self, state: tuple[str, int]) -> bool:
        """Tell whether the file is not renewed; its clock may differ from that of this machine."""
        deadline = time.monotonic() + _STALE_S
        while self._read() == state:
            if time.monotonic() > deadline:
                return True
            time.sleep(_POLL_S)
        return False

    def take(self) -> bool:
        """Make the file; False if another process was faster."""
        try:
            with self._path.open("x", encoding="utf-8") as file:
                file.write(self._mine)
        except FileExistsError:
            return False
        if self._removed and not self._flocked:
            # Another process that found the same left-over may remove this file in its place.
            time.sleep(_SETTLE_S)
        return self._is_mine()

    def _is_mine(self) -> bool:
        return self._read()[0] == self._mine

    def _read(self) -> tuple[str, int]:
        """Return the content of the file and when it was renewed; 0 if there is none."""
        try:
            with open_file(self._path, follow=False) as file:
                text = file.read(_MOST).decode("utf-8", "replace")
                return text, os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return "", 0

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the file while the block runs, and remove it at the end."""
        over = threading.Event()
        # Without it others take the lock, and write where this process writes.
        thread = start_vital("renew-lock", self._renew, over)
        try:
            yield
        finally:
            over.set()
            thread.join()
            if self._is_mine():
                self._path.unlink(missing_ok=True)

    def _renew(self, over: threading.Event) -> None:
        missed = 0
        while not over.wait(_RENEW_S):
            try:
                if self._is_mine():
                    os.utime(self._path)
                    missed = 0
                    continue
            except OSError:
                continue  # while its server is away, nobody can take it
            missed += 1
            if missed > 1:
                # This process was stopped for so long that another one took its place, or the
                # folder has been moved away.
                _logger.critical("%s is no longer of this process: ending", self._path)
                logging.shutdown()
                os._exit(1)


def _owner_path(lock: Path) -> Path:
    return lock.with_name(lock.name + ".owner")


def _this_process() -> str:
    return f"host {socket.gethostname()}, pid {os.getpid()}"


def _kernel() -> tuple[str, str]:
    """Return what tells this kernel, since its start, from others, and the namespace of pids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return boot, str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return socket.gethostname(), ""


def _process(pid: int) -> str:
    """Return a process id with the time of its start; the id alone if that process has ended."""
    import psutil  # a status needs it only here

    try:
        process = psutil.Process(pid)
        ended = process.status() == psutil.STATUS_ZOMBIE
        return str(pid) if ended else f"{pid} {process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return str(pid)
