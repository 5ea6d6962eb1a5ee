"""Chunks as they are stored: one a file, or those of a box of the array in one file, a shard.

A shard is written whole, by one writer, from chunks that are encoded one at a time: zarr's own
codec wants all of its voxels at once, which for 64 blocks is half a gibibyte. The file is that of
zarr v3's ``sharding_indexed``: the chunks, then for each (offset, bytes) in C order, then the
CRC32C of that index. A chunk that was never written has 2^64 - 1 twice there, and no bytes.
"""

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import zstd
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore

from agq.blockwise.storage.files import Unsynced, checksum
from agq.blockwise.storage.frames import decompressed
from agq.errors import DamagedError
from agq.reading import NotAFileError, open_file

LEVEL = 3
"""Of zstd."""

_NO_CHUNK = 2**64 - 1
_CRC = 4


class ChunkFiles:
    """The chunks of an array in a local folder; threads may share it.

    Parameters
    ----------
    array
        In a local folder.
    keep
        Bytes of decoded chunks that `read_box` keeps for neighbouring boxes.

    Attributes
    ----------
    shard
        Chunks in a file on each axis of the array; all 1: a chunk is a file.
    sharded
        Whether files are shards, be it of one chunk.
    """

    def __init__(self, array: "zarr.Array[Any]", keep: int = 0) -> None:
        store = array.store_path.store
        assert isinstance(store, LocalStore)
        self.array, self._store = array, store
        self._folder = Path(store.root) / array.store_path.path
        self.sharded = array.shards is not None
        self.chunks, self.shape, self.dtype = array.chunks, array.shape, np.dtype(array.dtype)
        self.shard = tuple(
            s // c for s, c in zip(array.shards or self.chunks, self.chunks, strict=True)
        )
        self._plain = _is_plain(array)
        self._index: tuple[Path | None, tuple[int, int], npt.NDArray[np.uint64]]
        self._index = (None, (0, 0), np.zeros((0, 2), np.uint64))
        self._most_kept = keep // (math.prod(self.chunks) * self.dtype.itemsize)
        self._kept: OrderedDict[tuple[int, ...], npt.NDArray[Any] | None] = OrderedDict()
        self._lock = threading.Lock()

    def extent(self, index: Sequence[int]) -> tuple[int, ...]:
        """Return the voxels of a chunk on each axis, clipped to the array.

        Raises
        ------
        IndexError
            If the array has no such chunk.
        """
        sizes = [
            min(c, n - int(i) * c) if i >= 0 else 0
            for i, c, n in zip(index, self.chunks, self.shape, strict=True)
        ]
        if min(sizes) < 1:
            raise IndexError(f"no chunk {tuple(index)} in an array of shape {self.shape}")
        return tuple(sizes)

    def key(self, index: Sequence[int]) -> str:
        """Return the name in the array's folder of the file that holds a chunk."""
        place = tuple(int(i) // s for i, s in zip(index, self.shard, strict=True))
        return self.array.metadata.encode_chunk_key(place)

    def file(self, index: Sequence[int]) -> Path:
        """Return the file that holds a chunk."""
        return self._folder / self.key(index)

    def encoded(self, index: Sequence[int]) -> bytes | None:
        """Return the bytes of a chunk as they are stored; None if it was not written.

        Raises
        ------
        DamagedError
            If the shard is damaged.
        """
        file = self.file(index)
        try:
            with open_file(file) as stream:
                if not self.sharded:
                    return stream.read()
                info = _status(stream)
                known, at, entries = self._index
                if (known, at) != (file, info):
                    entries = self._read_index(stream, info[0])
                    self._index = (file, info, entries)
                inner = tuple(int(i) % s for i, s in zip(index, self.shard, strict=True))
                begin, size = entries[int(np.ravel_multi_index(inner, self.shard))].tolist()
                if begin == size == _NO_CHUNK:
                    return None
                if begin + size > info[0]:
                    raise ValueError("its index leads out of the file")
                stream.seek(begin)
                return stream.read(size)
        except FileNotFoundError:
            return None
        except (NotAFileError, ValueError) as error:
            raise DamagedError(f"{file}: file is damaged ({error})") from None

    def _read_index(self, stream: Any, size: int) -> npt.NDArray[np.uint64]:
        length = 16 * math.prod(self.shard) + _CRC
        if size < length:
            raise ValueError(f"{size} bytes are no shard")
        stream.seek(size - length)
        data = stream.read(length)
        if google_crc32c.value(data[:-_CRC]) != int.from_bytes(data[-_CRC:], "little"):
            raise ValueError("its index differs from its checksum")
        return np.frombuffer(data, "<u8", count=2 * math.prod(self.shard)).reshape(-1, 2)

    def read(
        self, index: Sequence[int], out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any] | None:
        """Return the voxels of a chunk, clipped to the array; None if it was not written.

        Parameters
        ----------
        index
            Place in the grid of chunks, one number per axis.
        out
            Contiguous memory of a whole chunk to decode into; the result then lies in it.

        Raises
        ------
        DamagedError
            If it cannot be decoded.
        IndexError
            If the array has no such chunk.
        """
        extent = self.extent(index)
        if not self._plain:
            return self._by_zarr(index, extent)
        data = self.encoded(index)
        if data is None:
            return None
        if out is None:
            out = np.empty(self.chunks, self.dtype)
        try:
            decompressed(data, out.nbytes, out)
        except (ValueError, RuntimeError, IndexError) as error:
            raise DamagedError(f"{self.file(index)}: file is damaged ({error})") from None
        return out[tuple(slice(0, n) for n in extent)]

    def read_box(self, start: Sequence[int], stop: Sequence[int]) -> npt.NDArray[Any] | None:
        """Return the voxels of a box inside the array.

        That is what zarr returns for it, at half of the CPU where chunks are small: no event loop
        and no thread for each.

        Returns
        -------
        ndarray or None
            Of the array's dtype; None if only zarr can read the array.

        Raises
        ------
        DamagedError
            If a chunk cannot be decoded.
        """
        if not self._plain or self.array.fill_value is None:
            return None
        box = np.empty([b - a for a, b in zip(start, stop, strict=True)], self.dtype)
        spans = (
            range(a // c, -(-b // c)) for a, b, c in zip(start, stop, self.chunks, strict=True)
        )
        for index in product(*spans):
            inside, outside = [], []
            for a, b, c, i in zip(start, stop, self.chunks, index, strict=True):
                low, high = max(a, i * c), min(b, (i + 1) * c)
                inside.append(slice(low - i * c, high - i * c))
                outside.append(slice(low - a, high - a))
            data = self._kept_or_read(index)
            part = self.array.fill_value if data is None else data[tuple(inside)]
            box[tuple(outside)] = part
        return box

    def _kept_or_read(self, index: tuple[int, ...]) -> npt.NDArray[Any] | None:
        with self._lock:
            if index in self._kept:
                self._kept.move_to_end(index)
                return self._kept[index]
        data = self.read(index)
        with self._lock:
            self._kept[index] = data
            while len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
        return data

    def _by_zarr(self, index: Sequence[int], extent: Sequence[int]) -> npt.NDArray[Any] | None:
        if not self.file(index).exists():
            return None
        starts = [int(i) * c for i, c in zip(index, self.chunks, strict=True)]
        try:
            box = tuple(slice(a, a + n) for a, n in zip(starts, extent, strict=True))
            return np.asarray(self.array[box])
        except OSError:
            raise
        except Exception as error:  # of whatever type the codec raises
            raise DamagedError(f"{self.file(index)}: file is damaged ({error})") from None

    def encode(self, data: npt.NDArray[Any]) -> bytes:
        """Return a chunk, clipped to the array or whole, as it is stored."""
        if data.shape != self.chunks:
            whole = np.zeros(self.chunks, self.dtype)
            whole[tuple(slice(0, n) for n in data.shape)] = data
            data = whole
        return bytes(zstd.compress(np.ascontiguousarray(data), LEVEL, False))

    def write_shard(
        self,
        place: Sequence[int],
        encoded: Mapping[tuple[int, ...], bytes],
        unsynced: Unsynced | None = None,
    ) -> str | None:
        """Write a whole shard, atomically and durably, or remove it if nothing is in it.

        Parameters
        ----------
        place
            Of the shard in the grid of shards.
        encoded
            Its chunks by place in the grid of chunks; others read as the fill value.
        unsynced
            Collects what is to be synced instead.

        Returns
        -------
        str or None
            Checksum of the file; None: there is none now.
        """
        corner = [int(p) * s for p, s in zip(place, self.shard, strict=True)]
        file = self.file(corner)
        if not encoded:
            file.unlink(missing_ok=True)
            return None
        entries = np.full((*self.shard, 2), _NO_CHUNK, "<u8")
        parts, at = [], 0
        for index in sorted(encoded):
            inner = tuple(i - c for i, c in zip(index, corner, strict=True))
            entries[inner] = at, len(encoded[index])
            parts.append(encoded[index])
            at += len(encoded[index])
        table = entries.tobytes()
        parts += [table, google_crc32c.value(table).to_bytes(_CRC, "little")]
        data = b"".join(parts)
        self._write(corner, data, unsynced)
        return checksum(data)

    def write(self, index: Sequence[int], encoded: bytes, unsynced: Unsynced | None = None) -> None:
        """Write a chunk that is a file, atomically and durably.

        Parameters
        ----------
        index
            Place in the grid of chunks, one number per axis.
        encoded
            Of :meth:`encode`.
        unsynced
            Collects what is to be synced instead.

        Raises
        ------
        ValueError
            If the array is sharded: two writers of a shard would lose chunks.
        """
        if self.sharded:
            raise ValueError(f"{self.array.name} is sharded: no chunk of it is a file")
        self._write(index, encoded, unsynced)

    def _write(self, index: Sequence[int], data: bytes, unsynced: Unsynced | None) -> None:
        buffer = default_buffer_prototype().buffer.from_bytes(data)
        self._store.set_sync(f"{self.array.store_path.path}/{self.key(index)}", buffer)
        written = Unsynced() if unsynced is None else unsynced
        written.add(self.file(index), self._folder)
        if unsynced is None:
            written.sync()


def _status(stream: Any) -> tuple[int, int]:
    """Return size and time of an open file, by which an index that was read is known again."""
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def _is_plain(array: "zarr.Array[Any]") -> bool:
    """Whether chunks are stored as `volumes.create.create_array` has them: bytes, then zstd."""
    codecs: Any = getattr(array.metadata, "codecs", ())  # zarr 2 has none
    if array.shards is not None:
        (outer,) = codecs
        if not isinstance(outer, ShardingCodec) or outer.index_location.value != "end":
            return False
        if [type(codec) for codec in outer.index_codecs] != [BytesCodec, Crc32cCodec]:
            return False
        codecs = outer.codecs
    if [type(codec) for codec in codecs] != [BytesCodec, ZstdCodec]:
        return False
    return codecs[0].endian is None or codecs[0].endian.value == "little"
