"""Opening volumes: what can be named and read, and what bad input gets."""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from funlib.geometry import Coordinate, Roi

from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from tests.helpers.volumes import PLACE, SHAPE, check, put, put_n5, voxels


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_zarr(tmp_path: Path, zarr_format: int, dtype: str) -> None:
    data = voxels(dtype=dtype)
    put(tmp_path / "a.zarr", "volumes/raw", data, zarr_format, **PLACE)
    volume = open_volume(tmp_path / "a.zarr", "volumes/raw")
    check(volume, data)
    assert volume.format == f"zarr{zarr_format}"
    assert volume.chunks == (2, 4, 4)
    assert volume.voxel_size == Coordinate(30, 6, 6)
    assert volume.offset == Coordinate(60, 12, -6)
    assert volume.roi == Roi((60, 12, -6), (150, 42, 54))
    assert volume.unit == "nm"


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_crop(tmp_path: Path, zarr_format: int) -> None:
    data = voxels()
    put(tmp_path / "a.zarr", "raw", data, zarr_format, **PLACE)
    whole = open_volume(tmp_path / "a.zarr", "raw")
    part = whole.crop(Roi((90, 18, -60), (60, 18, 84)))
    assert part.roi == Roi((90, 18, -6), (60, 18, 30))
    np.testing.assert_array_equal(part.read((0, 0, 0), part.shape), data[1:3, 1:4, :5])
    np.testing.assert_array_equal(part.read((1, 1, 2), (2, 3, 5)), data[2:3, 2:4, 2:5])
    twice = pickle.loads(pickle.dumps(part.crop(Roi((120, 0, 6), (900, 900, 12)))))
    assert twice.shape == (1, 3, 2)
    np.testing.assert_array_equal(twice.read((0, 0, 0), (1, 3, 2)), data[2:3, 1:4, 2:4])
    with pytest.raises(InputError, match="no voxel inside"):
        whole.crop(Roi((300, 0, 0), (30, 6, 6)))
    with pytest.raises(InputError, match="whole number of voxels"):
        whole.crop(Roi((75, 12, -6), (30, 6, 6)))
    with pytest.raises(ValueError, match="is not inside"):
        part.read((0, 0, 0), (3, 1, 1))


def test_sharded_zarr(tmp_path: Path) -> None:
    put(tmp_path / "a.zarr", "raw", voxels(), shards=(4, 8, 12), **PLACE)
    volume = open_volume(tmp_path / "a.zarr", "raw")
    check(volume, voxels())
    assert volume.chunks == (2, 4, 4)


@pytest.mark.parametrize(
    ("path", "dataset"), [("a.zarr", "/raw/"), ("a.zarr/raw", None), ("a.zarr", None)]
)
def test_ways_to_name_an_array(tmp_path: Path, path: str, dataset: str | None) -> None:
    put(tmp_path / "a.zarr", "raw", voxels(), **PLACE)
    check(open_volume(f"file://{tmp_path / path}", dataset), voxels())


def test_reads_are_owned_native_and_contiguous(tmp_path: Path) -> None:
    data = voxels(dtype="uint16").astype(">u2")
    put(tmp_path / "a.zarr", "raw", data, 2, resolution=[30, 6, 6])
    volume = open_volume(tmp_path / "a.zarr", "raw")
    read = volume.read((0, 0, 0), (5, 7, 9))
    assert read.dtype == np.dtype("uint16")
    assert read.dtype.isnative
    assert read.flags.c_contiguous
    assert read.flags.writeable
    np.testing.assert_array_equal(read, data)


@pytest.mark.parametrize(
    ("start", "stop"), [((0, 0, 0), (6, 7, 9)), ((-1, 0, 0), (2, 2, 2)), ((2, 2, 2), (2, 3, 3))]
)
def test_boxes_are_never_clamped(tmp_path: Path, start: Any, stop: Any) -> None:
    put(tmp_path / "a.zarr", "raw", voxels(), **PLACE)
    with pytest.raises(ValueError, match="is not inside"):
        open_volume(tmp_path / "a.zarr", "raw").read(start, stop)


def test_axis_names_turn_the_axes(tmp_path: Path) -> None:
    data = voxels()
    put(
        tmp_path / "a.zarr",
        "raw",
        data.transpose(2, 1, 0),
        voxel_size=[6, 7, 30],
        offset=[1, 2, 3],
        axis_names=["x", "y", "z"],
    )
    volume = open_volume(tmp_path / "a.zarr", "raw")
    check(volume, data)
    assert tuple(volume.voxel_size) == (30, 7, 6)
    assert tuple(volume.offset) == (3, 2, 1)


def test_leading_axes_of_size_one(tmp_path: Path) -> None:
    put(
        tmp_path / "a.zarr",
        "raw",
        voxels()[None],
        voxel_size=[30, 6, 6],
        axis_names=["c^", "z", "y", "x"],
    )
    check(open_volume(tmp_path / "a.zarr", "raw"), voxels())


def test_threads_share_a_volume(tmp_path: Path) -> None:
    data = voxels((16, 32, 32), "uint16")
    put(tmp_path / "a.zarr", "raw", data, **PLACE)
    volume = open_volume(tmp_path / "a.zarr", "raw")
    boxes = [((z, y, x), (z + 5, y + 9, x + 7)) for z in range(9) for y in (0, 13) for x in (3, 20)]
    with ThreadPoolExecutor(8) as pool:
        for (start, stop), read in zip(
            boxes * 4, pool.map(lambda box: volume.read(*box), boxes * 4), strict=True
        ):
            box = tuple(slice(b, e) for b, e in zip(start, stop, strict=True))
            np.testing.assert_array_equal(read, data[box])


@pytest.mark.parametrize("kind", ["zarr", "n5"])
def test_volumes_can_be_pickled(tmp_path: Path, kind: str) -> None:
    if kind == "zarr":
        put(tmp_path / "a", "raw", voxels(), **PLACE)
    else:
        put_n5(tmp_path / "a" / "raw", voxels(), **PLACE)
    volume = pickle.loads(pickle.dumps(open_volume(tmp_path / "a", "raw")))
    check(volume, voxels())


@pytest.fixture
def container(tmp_path: Path) -> Path:
    put(tmp_path / "a.zarr", "volumes/raw", voxels(), **PLACE)
    put(tmp_path / "a.zarr", "volumes/labels", voxels(dtype="uint32"), **PLACE)
    put(tmp_path / "a.zarr", "flat", voxels((7, 9)))
    put(tmp_path / "a.zarr", "wide", voxels((2, *SHAPE)), voxel_size=[30, 6, 6])
    put(tmp_path / "a.zarr", "double", voxels(dtype="float64"), **PLACE)
    return tmp_path / "a.zarr"


def test_wrong_dataset_lists_what_is_there(container: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_volume(container, "volumes/raww")
    message = str(caught.value)
    assert "has no dataset 'volumes/raww'; it holds: " in message
    assert "volumes/raw (5, 7, 9) uint8" in message
    assert "volumes/labels (5, 7, 9) uint32" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("volumes", "dataset 'volumes' is a group; name one array of: .*volumes/raw"),
        (None, "dataset is not named; name one array of: "),
        ("flat", r"flat is 2-D with shape \(7, 9\); it must be 3-D"),
        ("wide", r"wide is 4-D with shape \(2, 5, 7, 9\); it must be 3-D"),
        ("double", "raw of type float64 cannot be used; convert it to one of uint8, uint16, flo"),
        ("volumes/labels", "raw of type uint32 cannot be used"),
    ],
)
def test_unusable_datasets(container: Path, dataset: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_volume(container, dataset)


def test_missing_and_foreign_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.zarr: no such file or folder"):
        open_volume(tmp_path / "nothing.zarr", "raw")
    (tmp_path / "a.h5").write_bytes(b"x")
    with pytest.raises(InputError, match=r"a\.h5 is a file, .*agq import"):
        open_volume(tmp_path / "a.h5", "raw")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no zarr, N5 or precomputed metadata found"):
        open_volume(tmp_path / "empty")
    with pytest.raises(InputError, match=r"cannot be looked up \(File name too long"):
        open_volume("x" * 5000, "raw")
    with pytest.raises(InputError, match="cannot read ftp://"):
        open_volume("ftp://somewhere/a.zarr", "raw")


def test_kinds_decide_the_types(container: Path) -> None:
    assert open_volume(container, "volumes/labels", kind="labels").dtype == np.uint32
    assert open_volume(container, "volumes/raw", kind="mask").dtype == np.uint8
    put(container, "yes", voxels() > 100, **PLACE)
    assert open_volume(container, "yes", kind="mask").read((0, 0, 0), SHAPE).dtype == np.bool_
    with pytest.raises(InputError, match="labels of type float64"):
        open_volume(container, "double", kind="labels")


def test_damaged_metadata(container: Path) -> None:
    (container / "volumes" / "raw" / "zarr.json").write_text("{")
    with pytest.raises(InputError, match=r"volumes/raw/zarr\.json is damaged"):
        open_volume(container, "volumes/raw")
    (container / "double" / "zarr.json").write_text('{"node_type": "array", "shape": [1, 1, 1]}')
    with pytest.raises(InputError, match="double: the array cannot be opened"):
        open_volume(container, "double", voxel_size=(1, 1, 1))


def test_level_of_a_plain_array(container: Path) -> None:
    with pytest.raises(InputError, match="is one array, so level 2 cannot be picked"):
        open_volume(container, "volumes/raw", level=2)


def test_describe_identifies_the_metadata_and_not_the_time(container: Path) -> None:
    first = open_volume(container, "volumes/raw").describe()
    assert json.loads(json.dumps(first)) == first
    assert first["path"] == str(container.resolve())
    os.utime(container / "volumes" / "raw" / "zarr.json", (1, 1))
    assert open_volume(container, "volumes/raw").describe() == first
    zarr.open_array(container, path="volumes/raw", mode="r+").attrs["note"] = "changed"
    assert open_volume(container, "volumes/raw").describe() != first
