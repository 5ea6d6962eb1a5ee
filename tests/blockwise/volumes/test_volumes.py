"""Opening volumes of every supported kind, creating arrays, writing chunks."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from funlib.geometry import Coordinate, Roi

from agq.blockwise.stitch.output import pyramid
from agq.blockwise.storage import files
from agq.blockwise.volumes import create as arrays
from agq.blockwise.volumes.create import (
    create_affinities,
    create_array,
    open_array,
    open_volume,
    write_chunk,
)
from agq.errors import InputError

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


def check(volume: arrays.Volume, data: np.ndarray) -> None:
    assert volume.shape == data.shape
    assert volume.dtype == data.dtype
    np.testing.assert_array_equal(volume.read((0, 0, 0), data.shape), data)
    np.testing.assert_array_equal(volume.read((1, 2, 3), (4, 7, 6)), data[1:4, 2:7, 3:6])


# ----------------------------------------------------------------- zarr


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
    assert volume.units == ("nm", "nm", "nm")


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


# ----------------------------------------------------------------- voxel size


def test_voxel_size_given_where_the_file_has_none(tmp_path: Path) -> None:
    put(tmp_path / "a.zarr", "raw", voxels())
    volume = open_volume(tmp_path / "a.zarr", "raw", voxel_size=(40, 8, 8), offset=(0, 80, 0))
    assert tuple(volume.voxel_size) == (40, 8, 8)
    assert tuple(volume.offset) == (0, 80, 0)
    with pytest.raises(InputError, match=r"raw declares no voxel size; give voxel_size \(z, y, x"):
        open_volume(tmp_path / "a.zarr", "raw")


def test_voxel_size_that_differs(tmp_path: Path) -> None:
    put(tmp_path / "a.zarr", "raw", voxels(), **PLACE)
    open_volume(tmp_path / "a.zarr", "raw", voxel_size=(30, 6, 6), offset=(60, 12, -6))
    with pytest.raises(
        InputError, match=r"declares the voxel size \(30, 6, 6\) nm, but .* given as \(40, 8, 8\)"
    ):
        open_volume(tmp_path / "a.zarr", "raw", voxel_size=(40, 8, 8))
    with pytest.raises(InputError, match=r"offset \(60, 12, -6\) nm, but .* as \(0, 0, 0\)"):
        open_volume(tmp_path / "a.zarr", "raw", offset=(0, 0, 0))


def test_fractional_voxel_sizes_are_never_rounded(tmp_path: Path) -> None:
    put(tmp_path / "a.zarr", "raw", voxels(), voxel_size=[33.5, 4.2, 4.2], offset=[0, 4.2, 0])
    with pytest.raises(InputError, match=r"\(33\.5, 4\.2, 4\.2\) nm is not a whole .*set unit: pm"):
        open_volume(tmp_path / "a.zarr", "raw")
    with pytest.raises(InputError, match=r"\(40, 4\.2, 4\.2\)|declares the voxel size"):
        open_volume(tmp_path / "a.zarr", "raw", voxel_size=(40, 4.2, 4.2))
    put(tmp_path / "b.zarr", "raw", voxels(), **PLACE | {"units": ["nm"] * 3})
    volume = open_volume(tmp_path / "b.zarr", "raw", unit="pm")
    assert tuple(volume.voxel_size) == (30000, 6000, 6000)
    assert tuple(volume.offset) == (60000, 12000, -6000)
    put(tmp_path / "c.zarr", "raw", voxels(), voxel_size=[33.5, 4.2, 4.2], units=["nm"] * 3)
    for unit, size in (("pm", (33500, 4200, 4200)), ("angstrom", (335, 42, 42))):
        volume = open_volume(tmp_path / "c.zarr", "raw", unit=unit)
        assert tuple(volume.voxel_size) == size
        assert volume.unit == unit


@pytest.mark.parametrize(
    ("units", "size"),
    [("um", [0.03, 0.006, 0.006]), (["µm"] * 3, [0.030000000000000002, 0.006, 0.006])],
)
def test_units_of_attributes(tmp_path: Path, units: Any, size: list[float]) -> None:
    put(tmp_path / "a.zarr", "raw", voxels(), voxel_size=size, units=units)
    assert tuple(open_volume(tmp_path / "a.zarr", "raw").voxel_size) == (30, 6, 6)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"voxel_size": [30, 6]}, "voxel_size .* must have three numbers"),
        ({"voxel_size": "big"}, "is not a list of numbers"),
        ({"voxel_size": [30, 6, 0]}, "must be positive"),
        ({"voxel_size": [30, 6, 6], "units": ["nm", "nm", "furlong"]}, "unknown unit 'furlong'"),
        ({"voxel_size": [30, 6, 6], "offset": [0.5, 0, 0]}, "offset .* is not a whole number"),
    ],
)
def test_nonsense_in_attributes(tmp_path: Path, attributes: Any, message: str) -> None:
    put(tmp_path / "a.zarr", "raw", voxels(), **attributes)
    with pytest.raises(InputError, match=message):
        open_volume(tmp_path / "a.zarr", "raw")


# ----------------------------------------------------------------- OME-Zarr


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


# ----------------------------------------------------------------- N5


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


# ----------------------------------------------------------------- what bad input gets


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
    with pytest.raises(InputError, match="no zarr or N5 metadata found"):
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


# ----------------------------------------------------------------- object stores and web servers


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An S3 server on loopback with one bucket; yields a function that uploads a folder."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    client.create_bucket(Bucket="em-data")

    def upload(folder: Path, prefix: str) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                key = f"{prefix}/{file.relative_to(folder)}"
                client.put_object(Bucket="em-data", Key=key, Body=file.read_bytes())

    yield upload
    server.stop()
    from agq.blockwise.volumes import location

    location._object_store.cache_clear()


def test_s3(tmp_path: Path, s3: Callable[[Path, str], None]) -> None:
    data = voxels((9, 20, 30), "uint16")
    put(tmp_path / "a.zarr", "volumes/raw", data, chunks=(5, 10, 16), **PLACE)
    put(tmp_path / "b.zarr", "raw", data, 2, chunks=(5, 10, 16), **PLACE)
    ome_group(tmp_path / "a.zarr", "img", [data], [[30, 6, 6]], version="0.5")
    put_n5(tmp_path / "c.n5" / "raw", data, (16, 10, 5), resolution=[6, 6, 30])
    for name in ("a.zarr", "b.zarr", "c.n5"):
        s3(tmp_path / name, f"deep/{name}")
    for name, dataset in (
        ("a.zarr", "volumes/raw"),
        ("b.zarr", "raw"),
        ("b.zarr/raw", None),
        ("b.zarr", None),
        ("a.zarr", "img"),
        ("c.n5", "raw"),
    ):
        volume = open_volume(f"s3://em-data/deep/{name}", dataset)
        np.testing.assert_array_equal(volume.read((1, 2, 3), (9, 19, 28)), data[1:, 2:19, 3:28])
        assert tuple(volume.voxel_size) == (30, 6, 6)
    assert volume.path == "s3://em-data/deep/c.n5"
    with pytest.raises(InputError, match=r"no dataset 'raww'; it holds: raw \(9, 20, 30\) <u2"):
        open_volume("s3://em-data/deep/b.zarr", "raww")
    with pytest.raises(InputError, match="no zarr or N5 metadata found"):
        open_volume("s3://em-data/deep/nothing.zarr")
    with pytest.raises(InputError, match=r"s3://no-such-bucket/a\.zarr"):
        open_volume("s3://no-such-bucket/a.zarr", "raw")
    pickled = pickle.loads(pickle.dumps(open_volume("s3://em-data/deep/a.zarr", "volumes/raw")))
    np.testing.assert_array_equal(pickled.read((0, 0, 0), (2, 3, 4)), data[:2, :3, :4])


def test_s3_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "do-not-show",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"s3://other/a\.zarr: cannot be read") as caught:
        open_volume("s3://other/a.zarr", "raw")
    assert "do-not-show" not in str(caught.value)
    assert "\n" not in str(caught.value)


class QuietHandler(SimpleHTTPRequestHandler):
    """A web server that does not talk on stderr and gives no listings."""

    def log_message(self, format: str, *args: Any) -> None: ...

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def send_error(self, code: int, *args: Any) -> None:
        # As buckets do that may not be listed: what is not there is forbidden.
        super().send_error(403 if code == 404 else code, *args)


class QuietServer(ThreadingHTTPServer):
    request_queue_size = 64  # the default of 5 makes parallel reads wait for TCP retries


def test_http(tmp_path: Path) -> None:
    put(tmp_path / "a.zarr", "raw", voxels(), **PLACE)
    put(tmp_path / "b.zarr", "raw", voxels(), 2, **PLACE)
    put_n5(tmp_path / "c.n5" / "raw", voxels(), resolution=[6, 6, 30])
    server = QuietServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        for name in ("a.zarr", "b.zarr", "c.n5"):
            check(open_volume(f"{base}/{name}", "raw"), voxels())
        with pytest.raises(InputError, match=r"a\.zarr has no dataset 'raww'"):
            open_volume(f"{base}/a.zarr", "raww")
        with pytest.raises(InputError, match="correct the path, or the credentials if it is priv"):
            open_volume(f"{base}/nothing.zarr")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ----------------------------------------------------------------- creating and writing


def make(folder: Path, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "shape": SHAPE,
        "chunks": (2, 4, 4),
        "dtype": np.uint64,
        "voxel_size": (30, 6, 6),
        "offset": (60, 12, -6),
    }
    return create_array(folder / "data.zarr", "fragments", **arguments | changes)


def all_chunks(array: Any, data: np.ndarray) -> None:
    for index in np.ndindex(*(-(-s // c) for s, c in zip(array.shape, array.chunks, strict=True))):
        start, stop = arrays.chunk_box(array, index)
        box = tuple(slice(b, e) for b, e in zip(start, stop, strict=True))
        write_chunk(array, index, data[box])


def test_created_arrays_open_with_funlib(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        # funlib.persistence 0.7 defines a pydantic model in a deprecated way when imported.
        warnings.simplefilter("ignore", DeprecationWarning)
        from funlib.persistence import open_ds

    data = voxels(dtype="uint64")
    all_chunks(make(tmp_path), data)
    opened = open_ds(tmp_path / "data.zarr" / "fragments")
    assert opened.voxel_size == Coordinate(30, 6, 6)
    assert opened.roi == Roi((60, 12, -6), (150, 42, 54))
    assert opened.axis_names == ["z", "y", "x"]
    assert opened.units == ["nm", "nm", "nm"]
    assert opened.chunk_shape == Coordinate(2, 4, 4)
    np.testing.assert_array_equal(opened.to_ndarray(opened.roi), data)

    create_affinities(
        tmp_path / "data.zarr",
        "affinities",
        shape=SHAPE,
        chunks=(2, 4, 4),
        voxel_size=(30, 6, 6),
        offset=(60, 12, -6),
    )
    affinities = open_ds(tmp_path / "data.zarr" / "affinities")
    assert affinities.shape == (3, *SHAPE)
    assert affinities.voxel_size == Coordinate(30, 6, 6)
    assert affinities.roi == opened.roi
    assert affinities.channel_dims == 1


def test_created_arrays_open_as_volumes(tmp_path: Path) -> None:
    data = voxels(dtype="uint64")
    all_chunks(make(tmp_path), data)
    volume = open_volume(tmp_path / "data.zarr", "fragments", kind="labels")
    check(volume, data)
    assert tuple(volume.offset) == (60, 12, -6)


def test_pyramids_open_at_every_level_with_one_offset(tmp_path: Path) -> None:
    shape, chunks, offset = (9, 40, 50), (4, 8, 8), (60, 13, -6)
    levels = pyramid.plan_levels(shape, chunks, (30, 6, 6))
    assert len(levels) > 2
    pyramid.create_levels(tmp_path / "data.zarr", "segmentation", levels, chunks, offset)
    pyramid.write_metadata(tmp_path / "data.zarr", "segmentation", levels, offset)
    for number, level in enumerate(levels):
        for volume in (
            open_volume(tmp_path / "data.zarr", "segmentation", level=number, kind="labels"),
            open_volume(tmp_path / "data.zarr", f"segmentation/{level.name}", kind="labels"),
        ):
            assert volume.shape == level.shape
            assert tuple(volume.voxel_size) == level.voxel_size
            assert tuple(volume.offset) == offset


def test_chunks_larger_than_the_volume(tmp_path: Path) -> None:
    data = voxels(dtype="uint64")
    all_chunks(make(tmp_path, chunks=(16, 16, 16)), data)
    check(open_volume(tmp_path / "data.zarr", "fragments", kind="labels"), data)
    make(tmp_path, chunks=(16, 16, 16))


def test_storage_is_plain_zstd_without_shards(tmp_path: Path) -> None:
    make(tmp_path)
    metadata = json.loads((tmp_path / "data.zarr" / "fragments" / "zarr.json").read_text())
    assert [codec["name"] for codec in metadata["codecs"]] == ["bytes", "zstd"]
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [2, 4, 4]


def test_zero_chunks_are_really_written(tmp_path: Path) -> None:
    make(tmp_path)
    array = open_array(tmp_path / "data.zarr", "fragments")
    write_chunk(array, (2, 1, 2), np.zeros((1, 3, 1), np.uint64))
    assert arrays.chunk_file(array, (2, 1, 2)).is_file()
    assert not arrays.chunk_file(array, (0, 0, 0)).exists()
    plain = zarr.open_array(tmp_path / "data.zarr", path="fragments", mode="r+")
    write_chunk(plain, (0, 0, 0), np.zeros((2, 4, 4), np.uint64))
    assert arrays.chunk_file(array, (0, 0, 0)).is_file()


def test_write_chunk_takes_exactly_one_chunk(tmp_path: Path) -> None:
    array = make(tmp_path)
    for data in (
        np.zeros((1, 4, 4), np.uint64),  # numpy would broadcast it
        np.zeros((2, 4, 4), np.int64),
        np.zeros((5, 7, 9), np.uint64),
    ):
        with pytest.raises(ValueError, match=r"takes \(2, 4, 4\) uint64, not"):
            write_chunk(array, (0, 0, 0), data)
    with pytest.raises(IndexError, match="no chunk"):
        write_chunk(array, (3, 0, 0), np.zeros((2, 4, 4), np.uint64))
    assert not arrays.chunk_file(array, (0, 0, 0)).exists()


def test_write_chunk_syncs_file_and_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = make(tmp_path)
    synced: list[Path] = []
    real = files.fsync_path

    def record(path: Path) -> None:
        synced.append(path)
        real(path)

    monkeypatch.setattr(files, "fsync_path", record)
    write_chunk(array, (1, 0, 2), np.ones((2, 4, 1), np.uint64))
    top = tmp_path / "data.zarr" / "fragments"
    assert synced == [top / "c/1/0/2", top / "c/1/0", top / "c/1", top / "c", top]


def test_a_chunk_written_twice_has_the_same_bytes(tmp_path: Path) -> None:
    array = make(tmp_path)
    data = voxels((2, 4, 4), "uint64")
    write_chunk(array, (0, 0, 0), data)
    first = arrays.chunk_file(array, (0, 0, 0)).read_bytes()
    write_chunk(array, (0, 0, 0), data[::-1].copy())
    write_chunk(array, (0, 0, 0), data)
    assert arrays.chunk_file(array, (0, 0, 0)).read_bytes() == first
    assert [p.name for p in arrays.chunk_file(array, (0, 0, 0)).parent.iterdir()] == ["0"]


def test_create_array_reopens_the_same_and_refuses_another(tmp_path: Path) -> None:
    write_chunk(make(tmp_path), (0, 0, 0), np.ones((2, 4, 4), np.uint64))
    again = make(tmp_path)
    assert int(again[0, 0, 0]) == 1
    assert again.config.write_empty_chunks
    for change, name in (
        ({"shape": (6, 7, 9)}, "shape"),
        ({"chunks": (1, 4, 4)}, "chunks"),
        ({"dtype": np.uint32}, "dtype"),
        ({"voxel_size": (30, 6, 7)}, "voxel_size"),
        ({"offset": (0, 0, 0)}, "offset"),
        ({"unit": "pm"}, "units"),
    ):
        with pytest.raises(InputError, match=rf"fragments exists with {name} .* is wanted"):
            make(tmp_path, **change)
    assert int(make(tmp_path)[0, 0, 0]) == 1


def test_open_array_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such array yet"):
        open_array(tmp_path / "data.zarr", "fragments")
    make(tmp_path)
    with pytest.raises(InputError, match="there is no such array yet"):
        open_array(tmp_path / "data.zarr", "affinities", mode="r")


def test_killed_writer_leaves_whole_chunks(tmp_path: Path) -> None:
    make(tmp_path, shape=(64, 128, 128), chunks=(64, 128, 128))
    code = (
        "import sys, numpy as np\n"
        "from agq.blockwise.volumes.create import open_array, write_chunk\n"
        "a = open_array(sys.argv[1], 'fragments'); r = np.random.default_rng(1)\n"
        "noise = r.integers(0, 2**62, (64, 128, 128), dtype=np.uint64) * 2\n"
        "while True:\n"
        "    for odd in (0, 1): write_chunk(a, (0, 0, 0), noise + np.uint64(odd))\n"
    )
    array = open_array(tmp_path / "data.zarr", "fragments")
    for attempt in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "data.zarr")])
        while not arrays.chunk_file(array, (0, 0, 0)).exists():
            time.sleep(0.01)
            assert writer.poll() is None
        time.sleep(1.2 * (attempt > 0) + 0.05 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        odd = np.unique(np.asarray(array[...]) % 2)
        assert odd.size == 1
