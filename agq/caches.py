"""Folders in which libraries keep what they compile, where neither package nor home can be written.

numba refuses to start without such a folder, and matplotlib warns and starts slowly. Containers,
shared installations and batch jobs often have none: then a temporary folder of this user is named
in the environment, which child processes inherit.
"""

import contextlib
import os
import stat
from pathlib import Path


def name_writable_caches() -> None:
    """Name a temporary folder for each library that would find no place for its cache."""
    package = Path(__file__).resolve().parent
    # Path.expanduser refuses to answer where there is no home at all.
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    for variable, places in (("NUMBA_CACHE_DIR", (package, home)), ("MPLCONFIGDIR", (home,))):
        if variable not in os.environ and not any(_writable(Path(place)) for place in places):
            # Where there is no temporary folder either, the library itself says what it lacks.
            with contextlib.suppress(OSError):
                os.environ[variable] = str(temporary_folder() / variable.lower())


def checkpoints_folder() -> Path:
    """Return where fetched checkpoints are kept: ``AGQ_CHECKPOINTS``, or a folder of the user."""
    if named := os.environ.get("AGQ_CHECKPOINTS"):
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(home) / "agq" / "checkpoints"


def _writable(folder: Path) -> bool:
    """Tell whether files can be made in a folder, or in the one in which it would be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_absolute() and os.access(folder, os.W_OK | os.X_OK)


def temporary_folder() -> Path:
    """Return a folder that is only this user's, for what is run when it is read back."""
    import tempfile  # slow to load, and seldom needed

    folder = Path(tempfile.gettempdir()) / f"agq-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if own and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return folder
    return Path(tempfile.mkdtemp(prefix="agq-"))
