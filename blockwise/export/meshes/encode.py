"""Meshes as neuroglancer reads them: levels of detail in cells of an octree, many in a shard.

The formats are those of neuroglancer's precomputed meshes (``neuroglancer_multilod_draco``) and of
its shards (``neuroglancer_uint64_sharded_v1``). tensorstore writes shards too, but has no room for
the data of a mesh, which lie before its manifest and are not in the index.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from typing import Any

import DracoPy
import numpy as np
import numpy.typing as npt

from agq.blockwise.export.meshes.octree import BITS, STEPS, Ints, Piece, pieces, z_order
from agq.blockwise.export.meshes.surface import Mesh

_MINISHARD_BITS = 6
_COMPRESSION = 7

_NEAR = 0.02
"""Voxels from a vertex to a border below which it is moved onto it; twice as many a level."""


def sharding(shard_bits: int) -> dict[str, Any]:
    """Return the specification of 2^shard_bits shards; segments are spread over them by a hash."""
    return {
        "@type": "neuroglancer_uint64_sharded_v1",
        "preshift_bits": 0,
        "hash": "murmurhash3_x86_128",
        "minishard_bits": _MINISHARD_BITS,
        "shard_bits": shard_bits,
        "minishard_index_encoding": "gzip",
        "data_encoding": "raw",
    }


def info(shard_bits: int) -> bytes:
    """Return the document beside the shards; places are nanometres."""
    document = {
        "@type": "neuroglancer_multilod_draco",
        "vertex_quantization_bits": BITS,
        "transform": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0],
        "lod_scale_multiplier": 1.0,
        "sharding": sharding(shard_bits),
    }
    return json.dumps(document).encode()


def shard_of(segments: npt.NDArray[np.uint64], shard_bits: int) -> npt.NDArray[np.int64]:
    """Return the shard of each segment."""
    return ((_hash(segments) >> _MINISHARD_BITS) & (2**shard_bits - 1)).astype(np.int64)


def shard_name(shard: int, shard_bits: int) -> str:
    """Return the name of a shard's file."""
    return f"{shard:0{-(-shard_bits // 4)}x}.shard"


def encode(
    levels: Sequence[Mesh], resolution: Sequence[float], offset: Sequence[float]
) -> tuple[bytes, bytes]:
    """Return the Draco data of a segment, and its manifest.

    The coarsest level is in one cell, a cube; a cell of a finer one has half the side. The scale of
    a level is the side of its mean triangle.

    Parameters
    ----------
    levels
        Levels of detail, finest first; vertices in voxels.
    resolution, offset
        Nanometres of a voxel, and place of the volume's first corner, (x, y, z).
    """
    places = [mesh.vertices * np.asarray(resolution) + np.asarray(offset) for mesh in levels]
    low = np.min([p.min(axis=0) for p in places], axis=0).astype("<f4")
    extent = max(float((p - low).max()) for p in places)
    # Where rounding opens a cut surface, the segment gets fewer levels; one level is not cut.
    for count in range(len(levels), 0, -1):
        # A little more than the box: single precision must not cut it.
        cell = np.float32(max(extent, min(resolution)) * (1 + 1e-6) / 2 ** (count - 1))
        found = []
        for level, (mesh, place) in enumerate(zip(levels[:count], places, strict=False)):
            cells = 2 ** (count - 1 - level)
            step = float(cell) * 2**level / STEPS
            steps = np.rint((place - low) / step).astype(np.int64).clip(0, cells * STEPS)
            near = int(_NEAR * 2**level * min(resolution) / step)
            cut = pieces(steps, mesh.faces, cells, halves=level > 0, near=near)
            if cut is None:
                break
            found.append(cut)
        if len(found) == count:
            break
    scales = [_side(p, mesh.faces) for p, mesh in zip(places, levels[:count], strict=False)]
    return _packed(found, cell, low, np.maximum.accumulate(scales))


def _side(places: npt.NDArray[np.float64], faces: Ints) -> float:
    """Return the side of an equilateral triangle that has the mean area of the faces."""
    a, b, c = (places[faces[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1).mean() / 2
    return float(np.sqrt(area * 4 / np.sqrt(3)))


def _packed(
    levels: Sequence[Sequence[Piece]],
    cell: np.float32,
    low: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float64],
) -> tuple[bytes, bytes]:
    count = len(levels)
    data, tables, fragments = bytearray(), [], []
    finer = np.zeros((0, 3), np.int64)
    for level in levels:
        coded = {piece.cell: _draco(piece) for piece in level}
        # Cells of the finer level lie in cells of this one, if only in empty ones.
        cells = np.unique(np.concatenate([np.array(list(coded)), finer >> 1]), axis=0)
        cells = cells[np.argsort(z_order(cells))]
        parts = [coded.get((x, y, z), b"") for x, y, z in cells.tolist()]
        tables.append(cells.T.astype("<u4").tobytes())
        tables.append(np.array([len(part) for part in parts], "<u4").tobytes())
        fragments.append(len(parts))
        data += b"".join(parts)
        finer = cells
    head = [
        np.full(3, cell, "<f4").tobytes(),
        low.astype("<f4").tobytes(),
        np.array([count], "<u4").tobytes(),
        scales.astype("<f4").tobytes(),
        np.zeros((count, 3), "<f4").tobytes(),
        np.array(fragments, "<u4").tobytes(),
    ]
    return bytes(data), b"".join([*head, *tables])


def _draco(piece: Piece) -> bytes:
    return bytes(
        DracoPy.encode(
            piece.vertices.astype(np.float32),
            piece.faces.astype(np.uint32),
            quantization_bits=BITS,
            quantization_range=STEPS,
            quantization_origin=np.zeros(3),
            compression_level=_COMPRESSION,
        )
    )


def pack_shard(meshes: dict[int, tuple[bytes, bytes]]) -> bytes:
    """Return a shard with the data and manifests of segments."""
    segments = np.array(sorted(meshes), np.uint64)
    minishards = (_hash(segments) & (2**_MINISHARD_BITS - 1)).astype(int)
    body = bytearray()
    indices = []
    for minishard in range(2**_MINISHARD_BITS):
        mine = segments[minishards == minishard]
        rows = np.zeros((3, len(mine)), "<u8")
        rows[0] = np.diff(mine, prepend=np.uint64(0))
        for k, segment in enumerate(mine.tolist()):
            data, manifest = meshes[segment]
            # From the end of the manifest before, and from the end of the index for the first.
            rows[1, k] = len(data) if k else len(body) + len(data)
            rows[2, k] = len(manifest)
            body += data + manifest
        indices.append(gzip.compress(rows.tobytes(), mtime=0) if len(mine) else b"")
    ends = len(body) + np.cumsum([len(index) for index in indices])
    bounds = np.stack([ends - [len(index) for index in indices], ends], axis=1).astype("<u8")
    return b"".join([bounds.tobytes(), bytes(body), *indices])


def _hash(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the low 8 bytes of MurmurHash3_x86_128 of each value, without a seed."""
    low = (values & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    high = (values >> np.uint64(32)).astype(np.uint32)
    c1, c2, c3 = np.uint32(0x239B961B), np.uint32(0xAB0E9789), np.uint32(0x38B34AE5)
    h1 = _turned(low * c1, 15) * c2 ^ np.uint32(8)
    h2 = _turned(high * c2, 16) * c3 ^ np.uint32(8)
    h3 = h4 = np.full_like(low, 8)
    h1 = h1 + h2 + h3 + h4
    h2, h3, h4 = h2 + h1, h3 + h1, h4 + h1
    h1, h2, h3, h4 = map(_mixed, (h1, h2, h3, h4))
    h1 = h1 + h2 + h3 + h4
    h2 = h2 + h1
    return h1.astype(np.uint64) | h2.astype(np.uint64) << np.uint64(32)


def _turned(value: npt.NDArray[np.uint32], by: int) -> npt.NDArray[np.uint32]:
    return value << np.uint32(by) | value >> np.uint32(32 - by)


def _mixed(value: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    value = (value ^ value >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    value = (value ^ value >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return value ^ value >> np.uint32(16)
