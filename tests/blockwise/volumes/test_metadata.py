"""What OME-Zarr and N5 say of a volume."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from tests.helpers.volumes import check, ome_group, put_n5, voxels


@pytest.mark.parametrize("growth", [0.003, 0])  # translations of centres, or of corners
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_levels(tmp_path: Path, version: str, growth: float) -> None:
    levels = [voxels((8, 12, 10)), voxels((8, 6, 5))]
    ome_group(
        tmp_path / "a.zarr",
        "img",
        levels,
        [[0.03, 0.006, 0.006], [0.03, 0.012, 0.012]],
        shifts=[[0.0, 0.06, 0.0], [0.0, 0.06 + growth, growth]],
        version=version,
        unit="micrometer",
    )
    for level, size, offset in ((0, (30, 6, 6), (0, 60, 0)), (1, (30, 12, 12), (0, 60, 0))):
        for volume in (
            open_volume(tmp_path / "a.zarr", "img", level=level),
            open_volume(tmp_path / "a.zarr", f"img/{level}"),
            open_volume(tmp_path / "a.zarr/img", level=level),
        ):
            assert tuple(volume.voxel_size) == size
            assert tuple(volume.offset) == offset
            np.testing.assert_array_equal(volume.read((0, 0, 0), volume.shape), levels[level])
    assert open_volume(tmp_path / "a.zarr", "img").shape == (8, 12, 10)
    with pytest.raises(InputError, match="img has levels 0 to 1, not 2"):
        open_volume(tmp_path / "a.zarr", "img", level=2)


def test_ome_with_time_and_channel(tmp_path: Path) -> None:
    ome_group(
        tmp_path / "a.zarr",
        "img",
        [voxels()[None, None]],
        [[1, 1, 30, 6, 6]],
        version="0.4",
        axes="tczyx",
    )
    volume = open_volume(tmp_path / "a.zarr", "img")
    check(volume, voxels())
    assert tuple(volume.voxel_size) == (30, 6, 6)


def test_ome_with_two_channels_is_refused(tmp_path: Path) -> None:
    data = np.stack([voxels(), voxels()])
    ome_group(tmp_path / "a.zarr", "img", [data], [[1, 30, 6, 6]], version="0.5", axes="czyx")
    with pytest.raises(InputError, match=r"is 4-D with shape \(2, 5, 7, 9\); it must be 3-D"):
        open_volume(tmp_path / "a.zarr", "img")


def test_ome_scale_without_unit_is_only_a_ratio(tmp_path: Path) -> None:
    ome_group(
        tmp_path / "a.zarr",
        "img",
        [voxels()],
        [[5, 1, 1]],
        shifts=[[10, 0, 2]],
        version="0.5",
        unit=None,
    )
    with pytest.raises(InputError, match=r"scale \(5, 1, 1\) without a unit; give voxel_size"):
        open_volume(tmp_path / "a.zarr", "img")
    volume = open_volume(tmp_path / "a.zarr", "img", voxel_size=(30, 6, 6))
    assert tuple(volume.offset) == (60, 0, 12)


def test_ome_transformations_of_the_whole_multiscale(tmp_path: Path) -> None:
    ome_group(
        tmp_path / "a.zarr", "img", [voxels()], [[5, 1, 1]], shifts=[[1, 2, 3]], version="0.5"
    )
    group = zarr.open_group(tmp_path / "a.zarr", path="img", mode="a")
    ome: Any = group.attrs["ome"]
    ome["multiscales"][0]["coordinateTransformations"] = [
        {"type": "scale", "scale": [6, 6, 6]},
        {"type": "translation", "translation": [100, 0, 0]},
    ]
    group.attrs["ome"] = ome
    volume = open_volume(tmp_path / "a.zarr", "img")
    assert tuple(volume.voxel_size) == (30, 6, 6)
    assert tuple(volume.offset) == (106, 12, 18)


def test_n5_axes_are_turned(tmp_path: Path) -> None:
    put_n5(tmp_path / "a.n5" / "v" / "raw", voxels(), resolution=[6, 7, 30], offset=[1, 2, 3])
    volume = open_volume(tmp_path / "a.n5", "v/raw")
    check(volume, voxels())
    assert volume.format == "n5"
    assert volume.chunks == (4, 4, 4)
    assert tuple(volume.voxel_size) == (30, 7, 6)
    assert tuple(volume.offset) == (3, 2, 1)


@pytest.mark.parametrize(
    "attributes",
    [
        {"pixelResolution": {"dimensions": [0.006, 0.007, 0.03], "unit": "um"}},
        {"pixelResolution": [6.0, 7.0, 30.0]},
        {
            "transform": {
                "axes": ["z", "y", "x"],
                "scale": [30.0, 7.0, 6.0],
                "translate": [0.0, 0.0, 0.0],
                "units": ["nm", "nm", "nm"],
            }
        },
    ],
)
def test_n5_conventions(tmp_path: Path, attributes: dict[str, Any]) -> None:
    put_n5(tmp_path / "a.n5" / "raw", voxels(dtype="uint16"), **attributes)
    volume = open_volume(tmp_path / "a.n5", "raw")
    check(volume, voxels(dtype="uint16"))
    assert tuple(volume.voxel_size) == (30, 7, 6)


def test_n5_levels_inherit_from_their_group(tmp_path: Path) -> None:
    put_n5(tmp_path / "a.n5" / "em" / "s0", voxels())
    put_n5(tmp_path / "a.n5" / "em" / "s1", voxels(), downsamplingFactors=[2, 2, 1])
    (tmp_path / "a.n5" / "em" / "attributes.json").write_text(
        json.dumps({"pixelResolution": {"dimensions": [6, 6, 30], "unit": "nm"}})
    )
    assert tuple(open_volume(tmp_path / "a.n5", "em").voxel_size) == (30, 6, 6)
    assert tuple(open_volume(tmp_path / "a.n5", "em", level=1).voxel_size) == (30, 12, 12)


def test_n5_with_trailing_channel_of_size_one(tmp_path: Path) -> None:
    put_n5(tmp_path / "a.n5" / "raw", voxels()[None], resolution=[6, 6, 30, 1])
    volume = open_volume(tmp_path / "a.n5", "raw")
    check(volume, voxels())
    assert tuple(volume.voxel_size) == (30, 6, 6)
