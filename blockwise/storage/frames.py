"""Frames of zstd that somebody else may have written: nothing is believed before it is checked."""

from numcodecs import zstd
from numpy.typing import NDArray

_MOST_BYTES = 2**30


def decompressed(data: bytes, size: int, out: "NDArray | None" = None) -> bytes:
    """Decode a frame that must come to a number of bytes.

    Parameters
    ----------
    data
        The frame.
    size
        Bytes when it is decoded; no frame: 0.
    out
        Contiguous memory of that size to decode into; the result is then empty.

    Raises
    ------
    ValueError, RuntimeError
        If it is damaged, or claims another size.
    """
    if out is None and size > _MOST_BYTES:
        raise ValueError(f"a frame of {size} bytes, and {_MOST_BYTES} are the most")
    if not data or not size:
        if len(data) or size:
            raise ValueError(f"a frame of {len(data)} bytes for {size}")
        return b""
    # zstd takes the length that a frame claims to have before it looks at its contents.
    if _claimed(data) != size:
        raise ValueError(f"a frame of other than {size} bytes")
    if out is None:
        return bytes(zstd.decompress(data))
    zstd.decompress(data, out)
    return b""


def _claimed(data: bytes) -> int:
    """Return the length that the head of a zstd frame says it has when it is decoded (RFC 8878)."""
    if len(data) < 14:
        data = data.ljust(14, b"\0")
    descriptor = data[4]
    width = ((descriptor >> 5) & 1, 2, 4, 8)[descriptor >> 6]
    start = 5 + (not (descriptor >> 5) & 1) + (0, 1, 2, 4)[descriptor & 3]
    return int.from_bytes(data[start : start + width], "little") + 256 * (width == 2)
