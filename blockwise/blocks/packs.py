"""Packs: the sidecars of a thousand blocks in one file, once the stitch has collected them.

File: the magic ``AGQP`` and the number of sidecars (uint32), the sidecars one after the other, a
row of (block number, offset, bytes, checksum) in uint64 for each, by number, and the CRC32C of the
rows; little-endian. The checksum is that of the sidecar's file, as the journal has it.

A sidecar of its own counts before that of a pack: a block that is predicted again needs no pack to
be changed, and the next stitch takes it in. A pack appears whole, and only then its sidecars go; so
packing may be cut off anywhere, and readers find a block in one or the other.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from agq.blockwise.storage.files import atomic_file, checksum, fsync_path
from agq.errors import DamagedError
from agq.reading import open_file, read_file

BLOCKS = 1000
"""Numbers that share a folder, and then a pack."""

_MAGIC = b"AGQP"
_HEAD = struct.Struct("<4sI")
_ROW = 4 * 8
_CRC = 4
_MOST_BYTES = 2**30


def sidecar_path(run_dir: Path, number: int) -> Path:
    """Return the path of a block's sidecar before it is packed."""
    return Path(run_dir) / "sidecars" / f"{number // BLOCKS:07d}" / f"{number}.agqs"


def pack_path(run_dir: Path, number: int) -> Path:
    """Return the path of the pack that a block's sidecar goes to."""
    return sidecar_path(run_dir, number).parent.with_suffix(".agqp")


def sidecar_file(run_dir: Path, number: int) -> Path:
    """Return the file that holds the sidecar of a block, or would."""
    own, pack = sidecar_path(run_dir, number), pack_path(run_dir, number)
    return pack if not own.exists() and pack.exists() else own


def sidecar_bytes(run_dir: Path, number: int) -> bytes:
    """Return the sidecar of a block, from wherever it is.

    Raises
    ------
    FileNotFoundError
        If it is nowhere.
    DamagedError
        If its pack is damaged.
    NotAFileError
        If what is there is no file.
    """
    try:
        return read_file(sidecar_path(run_dir, number), most=_MOST_BYTES)
    except FileNotFoundError:
        path = pack_path(run_dir, number)
    with open_file(path) as stream:
        rows = _rows_of(path, stream)
        at = int(np.searchsorted(rows[:, 0], np.uint64(number)))
        if at == len(rows) or rows[at, 0] != number:
            raise FileNotFoundError(f"{path}: holds no sidecar of block {number}")
        data, total = _piece(path, stream, rows[at]), int(rows[at, 3])
    if int(checksum(data), 16) != total:
        raise DamagedError(f"{path}: file is damaged (block {number} differs from its checksum)")
    return data


def pack_sidecars(folder: Path) -> int:
    """Put the sidecars in a folder into its pack, with those that are there; remove them.

    Parameters
    ----------
    folder
        Of up to a thousand sidecars that no one writes to.

    Returns
    -------
    int
        Sidecars packed. None are where the present pack is damaged: verify tells whose.

    Raises
    ------
    OSError
        If the pack cannot be written.
    """
    pack = folder.with_suffix(".agqp")
    own = {int(f.stem): f for f in folder.glob("*.agqs") if f.stem.isdecimal()}
    if own:
        try:
            _write(pack, own)
        except DamagedError:
            return 0
        for file in own.values():
            file.unlink()
    with suppress(OSError):  # what killed writers left is not ours to remove
        folder.rmdir()
    fsync_path(folder.parent)
    return len(own)


def remove_unreadable(pack: Path) -> None:
    """Remove a pack of which no sidecar can be read any more: the next one is made without it."""
    try:
        with open_file(pack) as stream:
            _rows_of(pack, stream)
    except DamagedError:
        pack.unlink()
    except FileNotFoundError:
        pass


def _write(pack: Path, own: Mapping[int, Path]) -> None:
    with ExitStack() as opened:
        stream, before = None, np.empty((0, 4), np.uint64)
        if pack.exists():
            stream = opened.enter_context(open_file(pack))
            before = _rows_of(pack, stream)
        packed = {int(row[0]): row for row in before}
        numbers = sorted(packed.keys() | own.keys())
        rows, at = np.empty((len(numbers), 4), "<u8"), _HEAD.size
        out = opened.enter_context(atomic_file(pack))
        out.write(_HEAD.pack(_MAGIC, len(numbers)))
        for row, number in zip(rows, numbers, strict=True):
            if number in own:
                data = read_file(own[number], most=_MOST_BYTES)
                total = int(checksum(data), 16)
            else:
                # With the checksum that it had: damage stays damage.
                assert stream is not None
                data, total = _piece(pack, stream, packed[number]), int(packed[number][3])
            row[:] = number, at, len(data), total
            out.write(data)
            at += len(data)
        table = rows.tobytes()
        out.write(table + google_crc32c.value(table).to_bytes(_CRC, "little"))


def _rows_of(pack: Path, stream: IO[bytes]) -> NDArray[np.uint64]:
    """Return the index of an open pack; that of a file which was read is remembered."""
    status = os.fstat(stream.fileno())
    return _rows(pack, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _rows(pack: Path, _inode: int, size: int, _time: int) -> NDArray[np.uint64]:
    with open_file(pack) as stream:
        head = stream.read(_HEAD.size)
        magic, count = _HEAD.unpack(head.ljust(_HEAD.size, b"\0"))
        start = size - count * _ROW - _CRC
        if magic != _MAGIC or start < _HEAD.size:
            raise DamagedError(f"{pack}: file is damaged (no pack of sidecars)")
        stream.seek(start)
        table = stream.read(count * _ROW + _CRC)
    if google_crc32c.value(table[:-_CRC]) != int.from_bytes(table[-_CRC:], "little"):
        raise DamagedError(f"{pack}: file is damaged (its index differs from its checksum)")
    return np.frombuffer(table, "<u8", 4 * count).reshape(-1, 4)


def _piece(pack: Path, stream: IO[bytes], row: NDArray[np.uint64]) -> bytes:
    _, begin, size, _ = row.tolist()
    stream.seek(begin)
    data = stream.read(size)
    if len(data) != size:
        raise DamagedError(f"{pack}: file is damaged (cut short)")
    return data
