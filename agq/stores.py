"""Stores of zarr arrays in folders that somebody else may have made."""

import asyncio
import os

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import LocalStore

from agq.reading import DOCUMENT_BYTES, open_file, require_size

STORED_BYTES = 2**32
"""Most bytes of a chunk, or of a shard that is read whole, as stored."""

_DOCUMENTS = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


class RegularFiles(LocalStore):
    """A folder whose chunks are files: it may hold FIFOs and devices too, at which reads hang."""

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Return a file or a part of it; None if there is none."""
        make = (prototype or default_buffer_prototype()).buffer.from_bytes
        try:
            with open_file(self.root / key) as file:
                size = os.fstat(file.fileno()).st_size
                start, stop = 0, size
                if isinstance(byte_range, RangeByteRequest):
                    start, stop = byte_range.start, byte_range.end
                elif isinstance(byte_range, OffsetByteRequest):
                    start = byte_range.offset
                elif isinstance(byte_range, SuffixByteRequest):
                    start = size - byte_range.suffix
                # The index of a damaged shard may say anything.
                start, stop = max(0, min(start, size)), max(0, min(stop, size))
                most = DOCUMENT_BYTES if key.endswith(_DOCUMENTS) else STORED_BYTES
                require_size(self.root / key, stop - start, most)
                file.seek(start)
                return make(file.read(max(0, stop - start)))
        except (FileNotFoundError, NotADirectoryError):
            return None

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Return a file or a part of it; None if there is none."""
        return await asyncio.to_thread(
            self.get_sync, key, prototype=prototype, byte_range=byte_range
        )
