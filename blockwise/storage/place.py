"""Tells a copy of a folder from the folder itself, moved or mounted elsewhere.

A copy has other inodes, on whatever machine it is made; a move within a file system, a link and
another mount keep them. Between two file systems a move is a copy whose original is gone.
"""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any


def place_of(folder: Path, file: Path) -> dict[str, Any]:
    """Return where a folder lies, for JSON: ``path``, ``host`` and ``inodes``.

    Parameters
    ----------
    folder
        Absolute path.
    file
        A file in it that is never replaced.
    """
    inodes = [folder.stat().st_ino, file.stat().st_ino if file.exists() else 0]
    return {"path": str(folder), "host": socket.gethostname(), "inodes": inodes}


def is_copy(
    folder: Path, file: Path, recorded: dict[str, Any], holds_the_same: Callable[[Path], bool]
) -> bool:
    """Tell whether a folder is a copy of the one that has been recorded.

    Parameters
    ----------
    folder, file
        As for `place_of`.
    recorded
        What that said of the folder; of an earlier release only its ``path``.
    holds_the_same
        Tells of another folder whether it says the same of itself as this one.
    """
    other, now = Path(recorded["path"]), place_of(folder, file)
    if other == folder:
        # Nodes of a cluster see one folder under one path, and some file systems number files by
        # node: a copy at the same path of another machine cannot be told from it.
        return False
    if holds_the_same(other):
        return _mark(other, file.name) != _mark(folder, file.name)
    # 0: there was no such file.
    pairs = zip(recorded.get("inodes", ()), now["inodes"], strict=False)
    if all(was == is_ or 0 in (was, is_) for was, is_ in pairs):
        return False
    return bool(recorded["host"] != now["host"])


def _mark(folder: Path, name: str) -> tuple[int, ...]:
    """Return what two names of one folder share, and no copy: no tool can set the last of them."""
    file = (folder / name).stat()
    return folder.stat().st_ino, file.st_ino, file.st_ctime_ns
