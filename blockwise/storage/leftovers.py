"""Removal of the temporary files that killed writers leave beside what they were writing.

Every file of a run is written under a temporary name and renamed. A process that gets SIGKILL in
between leaves the temporary file: harmless, but it would take space for ever. It may be removed
once its writer has ended.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from agq.blockwise.storage.files import TEMPORARY_SUFFIX

# `write_atomic` and zarr's LocalStore: .NAME.<16 hex>.tmp and STEM.<32 hex>.partial.
_TEMPORARY = re.compile(
    rf"\.(?P<name>.+)\.[0-9a-f]{{16}}{re.escape(TEMPORARY_SUFFIX)}"
    r"|(?P<stem>.+)\.[0-9a-f]{32}\.partial"
)


def remove_temporaries(files: Iterable[Path]) -> int:
    """Remove what killed writers of some files left beside them; return how many files.

    Neither the files, named by their final paths, nor their folders need exist. Each folder is
    listed once; temporary files of other files in it stay.
    """
    folders: dict[Path, set[str]] = defaultdict(set)
    for file in files:
        folders[file.parent].update((file.name, file.stem))
    return sum(_clean(folder, names) for folder, names in folders.items())


def remove_all_temporaries(folder: Path) -> int:
    """Remove what killed writers left anywhere below a folder; return how many files that were.

    Lists every folder: only for after a crash.
    """
    return sum(_clean(Path(top), None) for top, _, _ in os.walk(folder))


def _clean(folder: Path, names: set[str] | None) -> int:
    removed = 0
    try:
        entries = [entry.name for entry in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return 0
    for entry in entries:
        match = _TEMPORARY.fullmatch(entry)
        if match and (names is None or (match["name"] or match["stem"]) in names):
            (folder / entry).unlink(missing_ok=True)
            removed += 1
    return removed
