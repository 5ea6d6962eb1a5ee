"""Neuroglancer's precomputed volumes as input."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agq.blockwise.volumes.content import read_content
from agq.blockwise.volumes.find import find_array
from agq.blockwise.volumes.metadata import contents
from agq.blockwise.volumes.open import open_levels, open_volume
from agq.errors import InputError
from tests.helpers.volumes import PLACE, SHARDING, check, put, put_precomputed, voxels

LABELS: dict[str, Any] = {
    "encoding": "compressed_segmentation",
    "compressed_segmentation_block_size": [4, 4, 2],
}


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        ("uint8", {}),
        ("uint8", {"encoding": "png"}),
        ("uint16", {"sharding": SHARDING}),
        ("float32", {}),
        ("uint64", LABELS),
        ("uint64", {**LABELS, "sharding": SHARDING}),
    ],
)
def test_levels_place_and_voxels(tmp_path: Path, dtype: str, scale: dict[str, Any]) -> None:
    data = voxels(dtype=dtype)
    half = np.ascontiguousarray(data[:, ::2, ::2])
    put_precomputed(
        tmp_path / "v", [data, half], [[6, 6, 30], [12, 12, 30]], voxel_offset=(-1, 2, 2), **scale
    )
    kind: Any = "labels" if dtype == "uint64" else "raw"
    volume = open_volume(f"precomputed://{tmp_path}/v", kind=kind)
    check(volume, data)
    assert volume.format == "precomputed"
    assert volume.chunks == (2, 4, 4)
    assert tuple(volume.voxel_size) == (30, 6, 6)
    assert tuple(volume.offset) == (60, 12, -6)
    assert not volume.is_stored_zyx
    # A worker opens it by what is recorded.
    check(open_volume(volume.address, volume.dataset, kind=kind), data)
    check(pickle.loads(pickle.dumps(volume)), data)
    for coarse in (
        open_volume(tmp_path / "v", level=1, kind=kind),
        open_volume(tmp_path / "v", "12_12_30", kind=kind),
        open_volume(tmp_path, "v/12_12_30", kind=kind),
        open_levels(tmp_path / "v", kind=kind)[1],
    ):
        np.testing.assert_array_equal(coarse.read((0, 0, 0), half.shape), half)
        assert tuple(coarse.voxel_size) == (30, 12, 12)
        assert tuple(coarse.offset) == (60, 24, -12)
    assert contents(find_array(tmp_path / "v", None)[0]).startswith("6_6_30 (9, 7, 5, 1) ")
    # It is known by its voxels, as any volume.
    put(tmp_path / "a.zarr", "raw", data, **PLACE)
    zarr = open_volume(tmp_path / "a.zarr", "raw", kind=kind)
    assert read_content(zarr) == read_content(volume)


def test_fractions_of_a_nanometre(tmp_path: Path) -> None:
    put_precomputed(tmp_path / "v", [voxels()], [[4.2, 4.2, 40]], voxel_offset=(1, 0, 0))
    with pytest.raises(InputError, match="set unit: pm"):
        open_volume(tmp_path / "v")
    volume = open_volume(tmp_path / "v", unit="angstrom")
    assert tuple(volume.voxel_size) == (400, 42, 42)
    assert tuple(volume.offset) == (0, 0, 42)


@pytest.mark.timeout(60)
def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    put_precomputed(tmp_path / "two", [voxels()], [[6, 6, 30]], channels=2)
    put_precomputed(tmp_path / "v", [voxels()], [[6, 6, 30]])
    put_precomputed(tmp_path / "s", [voxels()], [[6, 6, 30]], sharding=SHARDING)
    refused = {
        ("two", None): "4-D with shape .*pick one channel",
        ("v", 1): "levels 0 to 0, not 1",
    }
    for (name, level), message in refused.items():
        with pytest.raises(InputError, match=message):
            open_volume(tmp_path / name, level=level)
    with pytest.raises(InputError, match=r"has no dataset '3_3_30'; it holds: 6_6_30"):
        open_volume(tmp_path / "v", "3_3_30")
    for name in ("v", "s"):
        folder = tmp_path / name / "6_6_30"
        file = sorted(folder.iterdir())[0]
        file.write_bytes(b"damaged")
        with pytest.raises(InputError, match=rf"{name}:6_6_30: .* cannot be read"):
            open_volume(tmp_path / name).read((0, 0, 0), (5, 7, 9))
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(InputError, match="FIFO"):
            open_volume(tmp_path / name).read((0, 0, 0), (5, 7, 9))
    info = tmp_path / "v" / "info"
    described = json.loads(info.read_text())
    info.write_text(json.dumps({**described, "scales": [{"key": "6_6_30"}]}))
    with pytest.raises(InputError, match="is not that of an array"):
        open_volume(tmp_path / "v")
    info.write_text(json.dumps({"@type": "neuroglancer_legacy_mesh"}))
    with pytest.raises(InputError, match="no zarr, N5 or precomputed a"):
        open_volume(tmp_path / "v")
