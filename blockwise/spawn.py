"""How `multiprocessing` starts processes: apart from the script and the folder of this one."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_SAFE_PATH = "PYTHONSAFEPATH"
_SEARCHED = "PYTHONPATH"

_spawning_lock = threading.Lock()
_spawning: list[tuple[ModuleType, list[str], str | None]] = []
"""What `spawning_apart` puts back, once for each caller that is inside."""


def search_named_folders_only() -> None:
    """Keep the current folder off the import path where an empty entry of PYTHONPATH put it.

    ``PYTHONPATH=$PYTHONPATH:/mine`` has one if the variable was not set, and nobody means it. What
    this process starts later inherits the rest; ``.`` is a folder that the user has named.
    """
    given = os.environ.get(_SEARCHED)
    entries = given.split(os.pathsep) if given else []  # Python takes an empty text for none
    named = [entry for entry in entries if entry]
    if len(named) == len(entries):
        return
    if named:
        os.environ[_SEARCHED] = os.pathsep.join(named)
    else:
        os.environ.pop(_SEARCHED, None)
    here = str(Path.cwd())
    if here not in {str(Path(entry).absolute()) for entry in named}:
        standard = str(Path(os.__file__).parent)
        front = sys.path.index(standard) if standard in sys.path else 0
        sys.path[:front] = [path for path in sys.path[:front] if path not in ("", here)]


@contextmanager
def spawning_apart() -> Iterator[None]:
    """Let `multiprocessing` spawn processes that know nothing of this one's script and folder.

    A spawned process imports its parent's main script again, so that one without a guard
    (``if __name__ == "__main__"``) would run twice; and it takes over the import path, on which
    the script's folder or the current one comes first: a user's ``yaml.py`` there is not ours.
    Any number of threads may be inside at the same time.
    """
    search_named_folders_only()
    with _spawning_lock:
        _spawning.append((sys.modules["__main__"], sys.path, os.environ.get(_SAFE_PATH)))
        if len(_spawning) == 1:
            sys.path = _without_own_folder(sys.path)
            sys.modules["__main__"] = ModuleType("__main__")
            os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        with _spawning_lock:
            # The first entry holds the state before any caller changed it; it is popped last.
            main, path, safe = _spawning.pop()
            if not _spawning:
                sys.modules["__main__"], sys.path = main, path
                os.environ.pop(_SAFE_PATH)
                if safe is not None:
                    os.environ[_SAFE_PATH] = safe


def _without_own_folder(path: list[str]) -> list[str]:
    """Return an import path without the folder that Python itself has put on it."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    own = {"", str(Path.cwd()), *([] if script is None else [str(Path(script).resolve().parent)])}
    named = os.environ.get("PYTHONPATH")
    own -= {str(Path(p).absolute()) for p in named.split(os.pathsep)} if named else set()
    # What is installed, in the same folder perhaps, comes after the standard library.
    standard = str(Path(os.__file__).parent)
    front = path.index(standard) if standard in path else 0
    return [p for p in path[:front] if p not in own] + path[front:]
