"""Volumes of every supported kind, small, and what reading one must give."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from agq.blockwise.volumes.open import Volume

SHAPE = (5, 7, 9)
PLACE: dict[str, Any] = {"voxel_size": [30, 6, 6], "offset": [60, 12, -6]}


def voxels(shape: tuple[int, ...] = SHAPE, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(7).integers(1, 200, shape).astype(dtype)


def put(
    container: Path,
    name: str,
    data: np.ndarray,
    zarr_format: int = 3,
    chunks: tuple[int, ...] = (2, 4, 4),
    shards: tuple[int, ...] | None = None,
    **attributes: Any,
) -> None:
    group = zarr.open_group(container, mode="a", zarr_format=zarr_format)  # type: ignore[arg-type]
    chunks = (1,) * (data.ndim - 3) + chunks[-data.ndim :]
    array = group.create_array(
        name, shape=data.shape, chunks=chunks, shards=shards, dtype=data.dtype
    )
    array[...] = data
    array.attrs.update(attributes)


def put_n5(folder: Path, data: np.ndarray, block: Any = None, **attributes: Any) -> None:
    """Write (z, y, x) data as N5 does: first axis x."""
    import tensorstore as ts

    turned = data.transpose(range(data.ndim)[::-1])
    ts.open(
        {
            "driver": "n5",
            "kvstore": {"driver": "file", "path": str(folder)},
            "metadata": {
                "dimensions": list(turned.shape),
                "blockSize": list(block) if block else [4] * turned.ndim,
                "dataType": data.dtype.name,
                "compression": {"type": "gzip"},
            },
            "create": True,
        }
    ).result().write(turned).result()
    file = folder / "attributes.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | attributes))


def put_precomputed(
    folder: Path,
    levels: list[np.ndarray],
    resolutions: list[list[float]],
    *,
    voxel_offset: tuple[int, int, int] = (0, 0, 0),
    channels: int = 1,
    **scale: Any,
) -> None:
    """Write (z, y, x) levels as a precomputed volume; resolutions and offset are (x, y, z)."""
    import tensorstore as ts

    for data, resolution in zip(levels, resolutions, strict=True):
        labels = data.dtype == np.uint64
        spec = {
            "driver": "neuroglancer_precomputed",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "multiscale_metadata": {
                "type": "segmentation" if labels else "image",
                "data_type": data.dtype.name,
                "num_channels": channels,
            },
            "scale_metadata": {
                "size": data.shape[::-1],
                "resolution": resolution,
                "voxel_offset": voxel_offset,
                "chunk_size": [4, 4, 2],
                "encoding": "raw",
                **scale,
            },
        }
        store = ts.open(spec, open=True, create=True).result()
        voxels = np.repeat(data.transpose()[..., None], channels, 3)
        store.write(voxels).result()


SHARDING: dict[str, Any] = {
    "@type": "neuroglancer_uint64_sharded_v1",
    "preshift_bits": 1,
    "hash": "identity",
    "minishard_bits": 1,
    "shard_bits": 1,
    "minishard_index_encoding": "gzip",
    "data_encoding": "gzip",
}


def ome_group(
    container: Path,
    name: str,
    levels: list[np.ndarray],
    scales: list[list[float]],
    *,
    version: str,
    axes: str = "zyx",
    unit: str | None = "nanometer",
    shifts: list[list[float]] | None = None,
) -> None:
    zarr_format = 3 if version == "0.5" else 2
    for level, data in enumerate(levels):
        put(container, f"{name}/{level}", data, zarr_format)
    kinds = {"t": "time", "c": "channel"}
    described = [
        {"name": a, "type": kinds.get(a, "space")}
        | ({"unit": unit} if unit and a not in kinds else {})
        for a in axes
    ]
    datasets = []
    for level, scale in enumerate(scales):
        steps: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
        if shifts:
            steps.append({"type": "translation", "translation": shifts[level]})
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    multiscales = [{"axes": described, "datasets": datasets, "name": name}]
    group = zarr.open_group(container, path=name, mode="a", zarr_format=zarr_format)  # type: ignore[arg-type]
    if version == "0.5":
        group.attrs["ome"] = {"version": "0.5", "multiscales": multiscales}
    else:
        group.attrs["multiscales"] = [multiscales[0] | {"version": "0.4"}]


def check(volume: Volume, data: np.ndarray) -> None:
    assert volume.shape == data.shape
    assert volume.dtype == data.dtype
    np.testing.assert_array_equal(volume.read((0, 0, 0), data.shape), data)
    np.testing.assert_array_equal(volume.read((1, 2, 3), (4, 7, 6)), data[1:4, 2:7, 3:6])
