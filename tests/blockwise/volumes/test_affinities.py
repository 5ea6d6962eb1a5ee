"""Affinities of another model: whatever the order of their axes, the same voxels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from agq.blockwise.volumes.affinities import Affinities
from agq.blockwise.volumes.open import Volume, open_volume
from agq.errors import InputError
from tests.helpers.volumes import ome_group, put, put_n5, voxels

CUBE = (6, 6, 6)


@pytest.fixture
def fragments(tmp_path: Path) -> Volume:
    place = {"voxel_size": [30, 7, 6], "offset": [60, 14, -6]}
    put(tmp_path / "f.zarr", "fragments", voxels(CUBE, "uint32"), **place)
    return open_volume(tmp_path / "f.zarr", "fragments", kind="labels")


def write(folder: Path, way: str, data: np.ndarray) -> str:
    """Write (channel, z, y, x) affinities with their axes in another order; say where."""
    turned = data.transpose(0, 3, 2, 1)
    if way == "axis_names":
        put(folder / "a", "affs", turned, axis_names=["c^", "x", "y", "z"])
    elif way == "xarray, channels last":
        put(folder / "a", "affs", data.transpose(3, 2, 1, 0), 2, _ARRAY_DIMENSIONS=[*"xyzc"])
    elif way == "dimension_names":
        group = zarr.open_group(folder / "a", mode="a", zarr_format=3)
        group.create_array("affs", data=turned, dimension_names=[*"cxyz"])
    elif way in ("ome", "ome level"):
        ome_group(
            *(folder / "a", "affs", [turned], [[1, 6, 7, 30]]),
            shifts=[[0, -6, 14, 60]],
            version="0.4",
            axes="cxyz",
        )
        return f"{folder / 'a'}::affs" + ("/0" if way == "ome level" else "")
    elif way == "n5":
        put_n5(folder / "a" / "affs", data, resolution=[6, 7, 30], offset=[-6, 14, 60])
    elif way == "n5 axes":
        put_n5(folder / "a" / "affs", data.transpose(3, 2, 1, 0), axes=[*"czyx"])
        # resolution in the order of the axes
        file = folder / "a" / "affs" / "attributes.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"resolution": [30, 7, 6]}))
    elif way == "n5 levels":
        put_n5(folder / "a" / "affs" / "s0", data)
        (folder / "a" / "affs" / "attributes.json").write_text('{"resolution": [6, 7, 30]}')
    return f"{folder / 'a'}::affs"


@pytest.mark.parametrize(
    "way",
    [
        *("axis_names", "xarray, channels last", "dimension_names", "ome", "ome level"),
        *("n5", "n5 axes", "n5 levels"),
    ],
)
def test_axis_names_of_affinities(tmp_path: Path, fragments: Volume, way: str) -> None:
    data = voxels((4, *CUBE))
    affinities = Affinities.open(write(tmp_path, way, data), fragments, (2, 0, 1))
    read = affinities.read((1, 2, 3), (4, 6, 5))
    np.testing.assert_array_equal(read, data[[2, 0, 1], 1:4, 2:6, 3:5])


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"voxel_size": [30, 7, 7]}, r"voxel size \(30, 7, 7\) are not those of the fragments"),
        ({"voxel_size": [0.03, 0.007, 0.007], "units": "um"}, r"\(30, 7, 7\) are not those of"),
        ({"offset": [0, 0, 0]}, r"offset \(0, 0, 0\) are not those of the fragments"),
        ({"axis_names": [*"cbyx"]}, None),
        ({"axis_names": [*"ctyx"]}, "do not have z, y and x"),
        ({"voxel_size": 3}, "voxel_size of .* is not a list of numbers"),
    ],
)
def test_affinities_that_lie_elsewhere(
    tmp_path: Path, fragments: Volume, attributes: Any, message: str | None
) -> None:
    put(tmp_path / "a", "affs", voxels((3, *CUBE)), **attributes)
    if message is None:
        Affinities.open(f"{tmp_path / 'a'}::affs", fragments)
        return
    with pytest.raises(InputError, match=message):
        Affinities.open(f"{tmp_path / 'a'}::affs", fragments)


def test_affinities_of_fragments_that_were_rounded(tmp_path: Path) -> None:
    size = {"voxel_size": [0.03, 0.00446428571, 0.00446428571], "units": "um"}
    place = size | {"offset": [0, 0.0446428571, 0]}
    put(tmp_path / "f", "fragments", voxels(CUBE, "uint32"), **place)
    put(tmp_path / "f", "affs", voxels((3, *CUBE)), **place)
    volume = open_volume(tmp_path / "f", "fragments", kind="labels", unit="pm")
    assert tuple(volume.voxel_size) == (30000, 4464, 4464)
    Affinities.open(f"{tmp_path / 'f'}::affs", volume)
