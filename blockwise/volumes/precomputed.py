"""Scales of neuroglancer's precomputed volumes: where they lie, and their voxels by tensorstore."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agq.blockwise.volumes.location import LocalLocation, Location
from agq.blockwise.volumes.placement import Source, numbers_of
from agq.errors import InputError
from agq.reading import require_file
from agq.stores import STORED_BYTES

_MOST_SHARDS = 100_000
"""Files of a sharded scale that are looked at before one is opened."""


def scale_source(scale: Mapping[str, Any], where: str) -> Source:
    """Return what a scale of an ``info`` says of its place.

    Raises
    ------
    InputError
        If it makes no sense.
    """
    size = numbers_of(scale.get("resolution"), f"resolution of {where}")
    first = numbers_of(scale.get("voxel_offset", [0, 0, 0]), f"voxel_offset of {where}")
    if len(size) != 3 or len(first) != 3 or any(n != int(n) for n in first):
        raise InputError(f"resolution or voxel_offset of {where}: expected three numbers")
    offset = [Decimal(a) * b for a, b in zip(first, size, strict=True)]
    return Source(
        f"info of {where}",
        axis_names=["x", "y", "z", "channel"],
        voxel_size=size,
        offset=offset,
        order=["x", "y", "z"],
    )


@dataclass(frozen=True)
class Scale:
    """Voxels of a scale, counted from its first one; the order of axes is x, y, z, channel.

    Attributes
    ----------
    store
        Of tensorstore, which counts from the offset of the scale.
    chunks
        What is read at once.
    folder
        Of the files of its chunks, if they are files.
    """

    store: Any
    chunks: tuple[int, ...]
    folder: Path | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a voxel."""
        return np.dtype(self.store.dtype.numpy_dtype)

    def __getitem__(self, box: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Return the voxels of a box."""
        origin = self.store.domain.origin
        moved = [slice(o + s.start, o + s.stop) for o, s in zip(origin, box, strict=True)]
        if self.folder is not None:
            self._require_files(self.folder, box[:3])
        return np.asarray(self.store[tuple(moved)].read().result())

    def _require_files(self, folder: Path, box: tuple[slice, ...]) -> None:
        """Check that chunks are files: tensorstore would wait at a FIFO."""
        spans = []
        domain = self.store.domain
        limits = zip(domain.origin, domain.exclusive_max, strict=True)
        for part, n, (begin, end) in zip(box, self.chunks, limits, strict=False):
            firsts = range(part.start // n * n, part.stop, n)
            spans.append([f"{begin + a}-{min(begin + a + n, end)}" for a in firsts])
        for parts in product(*spans):
            with suppress(FileNotFoundError, NotADirectoryError):
                require_file(folder / "_".join(parts), most=STORED_BYTES)


def open_scale(location: Location, scale: Mapping[str, Any]) -> Scale:
    """Open a scale.

    Parameters
    ----------
    location
        Container.
    scale
        Attributes of `metadata.scale_of`.

    Raises
    ------
    ValueError
        If tensorstore cannot read it.
    InputError
        If a file of it is none.
    """
    import tensorstore as ts

    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": location.key_value_store(scale["volume"]),
        "scale_index": scale["index"],
    }
    folder = None
    if isinstance(location, LocalLocation):
        folder = location.root / scale["volume"] / scale["key"]
        if scale.get("sharding") is not None:
            for file in islice(folder.glob("*.shard"), _MOST_SHARDS):
                require_file(file)
            folder = None
    store = ts.open(spec, open=True, read=True).result()
    chunks = tuple(int(n or 1) for n in store.chunk_layout.read_chunk.shape or ())
    return Scale(store, chunks, folder)
