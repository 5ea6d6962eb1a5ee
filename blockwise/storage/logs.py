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
import threading
import time
from pathlib import Path
from typing import Any

LIMIT_BYTES = 16 << 20
"""Of a log, and of the older part beside it."""

_LOOK_S = 1.0
_PIECE = 1 << 20


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
        watch = threading.Thread(
            target=_watch, args=(list(files.values()), limit), name="cap-output", daemon=True
        )
        watch.start()


def dask_setup(_worker: Any) -> None:
    """Watch the output of a dask worker that was started with ``--preload`` of this module."""
    cap_output()


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
    with contextlib.suppress(OSError), path.open("rb") as source:
        source.seek(max(0, os.fstat(descriptor).st_size - limit))
        with path.with_name(f"{path.name}.1").open("wb") as older:
            for _ in range(-(-limit // _PIECE)):
                older.write(source.read(min(limit, _PIECE)))
    os.ftruncate(descriptor, 0)
