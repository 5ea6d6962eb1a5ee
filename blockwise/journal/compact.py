"""The snapshot beside the journal files: columns in an npz, plus one JSON member.

It holds what all lines up to some byte of each file mean. It can be deleted at any time, and a
damaged or newer one is passed over: the lines say it all again.
"""

import contextlib
import json
import os
import secrets
import time
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.journal.lazy import SnapshotColumns
from agq.blockwise.journal.pages import page_index, page_sums
from agq.blockwise.journal.table import ROW
from agq.blockwise.storage.files import fsync_path
from agq.blockwise.storage.npz import parsed
from agq.errors import InputError

SNAPSHOT: Final = "compact.npz"
_VERSION: Final = 1
_STALE_S: Final = 3600.0


def write_snapshot(folder: Path, rows: NDArray[np.void], meta: dict[str, Any]) -> Path:
    """Replace the snapshot of a journal folder.

    Parameters
    ----------
    folder : Path
        Journal folder of one stage.
    rows : ndarray
        One row per block, dtype ROW, any order.
    meta : dict
        JSON-able rest.

    Returns
    -------
    Path
        The file, durable.

    Raises
    ------
    OSError
        If it cannot be written; the old one is then still there.
    """
    folder = Path(folder)
    _remove_stale(folder)
    order = np.argsort(rows["block"], kind="stable")
    text = json.dumps(meta | {"version": _VERSION}, separators=(",", ":")).encode("ascii")
    temporary = folder / f".compact-{secrets.token_hex(6)}.tmp"
    try:
        with temporary.open("wb") as file:
            # Member by member: np.savez would hold a copy of every column at once.
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                _add(archive, "meta", np.frombuffer(text, np.uint8))
                index = page_index(rows, order)
                for k, name in enumerate(ROW.names or ()):
                    column = rows[name][order]
                    index["sums"][:, k] = page_sums(column)
                    _add(archive, name, column)
                _add(archive, "pages", index)
            file.flush()
            os.fsync(file.fileno())
        target = folder / SNAPSHOT
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_path(folder)
    return target


def read_snapshot(folder: Path) -> tuple[NDArray[np.void], dict[str, Any]] | None:
    """Rows and meta of the snapshot, or None where there is no usable one."""
    try:
        return parsed(lambda: _read(Path(folder) / SNAPSHOT))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _read(path: Path) -> tuple[NDArray[np.void], dict[str, Any]] | None:
    # Opened here: np.load leaks the file it opens when it finds no zip archive in it.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        meta: dict[str, Any] = json.loads(archive["meta"].tobytes())
        if meta["version"] != _VERSION:
            return None
        rows = np.zeros(len(archive["block"]), ROW)
        for name in ROW.names or ():
            rows[name] = archive[name]
    return rows, meta


def open_snapshot(folder: Path) -> tuple[SnapshotColumns, dict[str, Any]] | None:
    """Columns, not yet read, and meta of the snapshot; None where there is none with an index."""
    try:
        columns = SnapshotColumns(Path(folder) / SNAPSHOT)
        meta: dict[str, Any] = json.loads(columns["meta"].tobytes())
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, InputError):
        return None
    if meta.get("version") != _VERSION or "summary" not in meta or "pages" not in columns:
        columns.close()
        return None
    return columns, meta


def snapshot_files(folder: Path) -> set[str]:
    """Return the names of the journal files that the snapshot stands for."""
    opened = open_snapshot(folder)
    if opened is None:
        snapshot = read_snapshot(folder)
        return set() if snapshot is None else set(snapshot[1]["files"])
    opened[0].close()
    return set(opened[1]["files"])


def _add(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def _remove_stale(folder: Path) -> None:
    """Remove what a killed compaction has left."""
    for path in folder.glob(".compact-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()
