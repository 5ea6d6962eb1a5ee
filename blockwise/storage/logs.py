"""Keeps the output of a process that runs for days within bounds.

What a process prints, its predictor's own prints and those of C code too, goes to a file that
something else has opened: the coordinator, or SLURM. The process itself watches the size: at the
limit, the end of the file is copied to ``NAME.1``, in the place of the copy before, and the file
starts anew.
"""

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path

from agq.blockwise.storage.files import descriptor_of
from agq.blockwise.threads import start_aside
from agq.reading import NotAFileError, open_file

LIMIT_BYTES = 16 << 20
"""Of a log, and of the older part beside it."""

_LOOK_S = 1.0
_PIECE = 1 << 20


def log_files(run_dir: Path) -> list[Path]:
    """List the logs of a run and their older parts, those written last at the end.

    Only files count, not links, FIFOs or folders of such a name.
    """
    found = []
    for pattern in ("*.log", "*.log.1"):
        for file in (run_dir / "logs").rglob(pattern):
            with contextlib.suppress(OSError):
                about = file.lstat()
                if stat.S_ISREG(about.st_mode):
                    found.append((about.st_mtime, file))
    return [file for _, file in sorted(found)]


def log_end(run_dir: Path, log: Path, size: int) -> str:
    """Return the last `size` bytes of a log of a run.

    Whoever made the run folder may have put anything there under the name of a log: links are not
    followed, so what is read lies in the folder.

    Raises
    ------
    InputError
        If it is no regular file, or there is a link on the way to it.
    OSError
        If it cannot be read.
    """
    with open_file(log, within=run_dir) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        return file.read(size).decode("utf-8", "replace")


def own_output_end(size: int) -> str | None:
    """Return the last `size` bytes of the file that stderr goes to; None if it is no file."""
    with contextlib.suppress(OSError, NotAFileError), open_file("/proc/self/fd/2") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        return file.read(size).decode("utf-8", "replace")
    return None


def cap_output(limit: int = LIMIT_BYTES) -> None:
    """Watch the files that stdout and stderr of this process go to, as long as it lives.

    Parameters
    ----------
    limit
        Bytes of a file, and of its older part, about.
    """
    files = {}
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                files[found.st_dev, found.st_ino] = descriptor
                # After a file starts anew, writing goes on at its end, not where it was.
                flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
                fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_APPEND)
    if files:
        start_aside("cap-output", _watch, list(files.values()), limit)


def _watch(descriptors: list[int], limit: int) -> None:
    while True:
        time.sleep(_LOOK_S)
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_size > limit:
                    _start_anew(descriptor, limit)


def _start_anew(descriptor: int, limit: int) -> None:
    path = Path(f"/proc/self/fd/{descriptor}").resolve()
    # On a full disk it is more important that the file ends than that its past is kept.
    with contextlib.suppress(OSError, NotAFileError), path.open("rb") as source:
        source.seek(max(0, os.fstat(descriptor).st_size - limit))
        older_path = path.with_name(f"{path.name}.1")
        with os.fdopen(descriptor_of(older_path, os.O_WRONLY | os.O_TRUNC), "wb") as older:
            for _ in range(-(-limit // _PIECE)):
                older.write(source.read(min(limit, _PIECE)))
    os.ftruncate(descriptor, 0)
