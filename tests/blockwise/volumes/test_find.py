"""What is said of an array: by itself and by all groups above it, however it is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from agq.blockwise.volumes.open import Volume, open_volume
from agq.errors import InputError
from tests.helpers.volumes import check, ome_group, put, put_n5, voxels

SIZE = {"voxel_size": [30, 7, 6], "offset": [60, 14, -6]}


def place_of(volume: Volume) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(volume.voxel_size), tuple(volume.offset)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(
    ("path", "dataset"),
    [
        ("a.zarr/img/0", None),
        ("a.zarr/img", None),
        ("a.zarr/img", "0"),
        ("a.zarr", "img/0"),
        ("a.zarr", "img"),
        ("a.zarr", None),
    ],
)
def test_ome_metadata_above_the_path(
    tmp_path: Path, version: str, path: str, dataset: str | None
) -> None:
    turned = voxels().transpose(2, 1, 0)
    ome_group(
        tmp_path / "a.zarr",
        "img",
        [turned],
        [[6, 7, 30]],
        shifts=[[-6, 14, 60]],
        version=version,
        axes="xyz",
    )
    volume = open_volume(tmp_path / path, dataset)
    check(volume, voxels())
    assert place_of(volume) == ((30, 7, 6), (60, 14, -6))


def test_levels_nested_in_folders_of_their_own(tmp_path: Path) -> None:
    """As spatialdata writes it: scale0/image, and the multiscale above both."""
    put(tmp_path / "a.zarr", "em/scale0/image", voxels())
    group = zarr.open_group(tmp_path / "a.zarr", path="em", mode="a")
    scale = {"type": "scale", "scale": [30, 7, 6]}
    datasets = [{"path": "scale0/image", "coordinateTransformations": [scale]}]
    axes = [{"name": n, "type": "space", "unit": "nanometer"} for n in "zyx"]
    group.attrs["ome"] = {"multiscales": [{"axes": axes, "datasets": datasets}]}
    for path, dataset in (
        ("a.zarr", "em"),
        ("a.zarr", "em/scale0/image"),
        ("a.zarr/em", "scale0/image"),
        ("a.zarr/em/scale0", "image"),
        ("a.zarr/em/scale0/image", None),
    ):
        assert place_of(open_volume(tmp_path / path, dataset))[0] == (30, 7, 6)


@pytest.mark.parametrize(
    ("path", "dataset"), [("a.n5/volumes/raw/s0", None), ("a.n5", "volumes/raw/s0")]
)
@pytest.mark.parametrize("above", ["volumes/raw", "volumes", ""])
def test_n5_attributes_of_any_group_above(
    tmp_path: Path, path: str, dataset: str | None, above: str
) -> None:
    put_n5(tmp_path / "a.n5" / "volumes" / "raw" / "s0", voxels())
    (tmp_path / "a.n5" / above / "attributes.json").write_text(
        json.dumps({"resolution": [6, 7, 30], "offset": [-6, 14, 60]})
    )
    volume = open_volume(tmp_path / path, dataset)
    check(volume, voxels())
    assert place_of(volume) == ((30, 7, 6), (60, 14, -6))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(("path", "dataset"), [("a.zarr/em/raw", None), ("a.zarr", "em/raw")])
def test_attributes_of_zarr_groups(
    tmp_path: Path, zarr_format: Any, path: str, dataset: str | None
) -> None:
    put(tmp_path / "a.zarr", "em/raw", voxels(), zarr_format)
    zarr.open_group(tmp_path / "a.zarr", mode="a").attrs.update(SIZE)
    assert place_of(open_volume(tmp_path / path, dataset)) == ((30, 7, 6), (60, 14, -6))


def test_what_lies_above_the_container_does_not_count(tmp_path: Path) -> None:
    zarr.open_group(tmp_path, mode="a", zarr_format=3).attrs["voxel_size"] = [1, 1, 1]
    put(tmp_path / "a.zarr", "raw", voxels(), **SIZE)
    assert place_of(open_volume(tmp_path / "a.zarr", "raw"))[0] == (30, 7, 6)


def test_scales_of_a_group_of_n5_levels(tmp_path: Path) -> None:
    """As the viewers and BigDataViewer write it: the group lists the factors of its levels."""
    for level in range(2):
        put_n5(tmp_path / "a.n5" / "em" / f"s{level}", voxels())
    for name in ("scales", "downsamplingFactors"):
        (tmp_path / "a.n5" / "em" / "attributes.json").write_text(
            json.dumps({"resolution": [6, 7, 30], name: [[1, 1, 1], [2, 2, 1]]})
        )
        assert place_of(open_volume(tmp_path / "a.n5/em/s1"))[0] == (30, 14, 12)
        assert place_of(open_volume(tmp_path / "a.n5", "em", level=1))[0] == (30, 14, 12)
    (tmp_path / "a.n5" / "em" / "attributes.json").write_text('{"resolution": [6, 7, 30]}')
    with pytest.raises(InputError, match="s1 declares no voxel size"):
        open_volume(tmp_path / "a.n5/em/s1")


SCALE = [{"type": "scale", "scale": [30, 7, 6]}]
AXES = [{"name": n, "type": "space", "unit": "nanometer"} for n in "zyx"]


@pytest.mark.parametrize(
    "multiscale",
    [
        {"datasets": [{"path": "s0"}]},
        {"datasets": ["s0"]},
        {"datasets": [{"path": "s0", "coordinateTransformations": SCALE}]},
        {"datasets": [{"path": "s0"}], "axes": AXES},
        {"datasets": ["s0"], "axes": ["z", "y", "x"]},
        {"datasets": [{"path": "./s0/"}], "coordinateTransformations": None, "axes": AXES},
    ],
)
@pytest.mark.parametrize(
    "attributes",
    [
        SIZE,
        {
            "transform": {
                "axes": ["z", "y", "x"],
                "scale": [30, 7, 6],
                "translate": [60, 14, -6],
                "units": ["nm", "nm", "nm"],
            }
        },
    ],
)
def test_incomplete_multiscales_leave_it_to_the_array(
    tmp_path: Path, multiscale: Any, attributes: Any
) -> None:
    put(tmp_path / "a.zarr", "em/s0", voxels(), 2, **attributes)
    zarr.open_group(tmp_path / "a.zarr", path="em", mode="a").attrs["multiscales"] = [multiscale]
    for path, dataset in (("a.zarr", "em"), ("a.zarr", "em/s0"), ("a.zarr/em/s0", None)):
        volume = open_volume(tmp_path / path, dataset)
        check(volume, voxels())
        assert place_of(volume) == ((30, 7, 6), (60, 14, -6))


@pytest.mark.parametrize("name", ["em/s1", "em"])
def test_cosem_transforms_place_centres(tmp_path: Path, name: str) -> None:
    """Arrays and their group say the same of a coarser level, whose first centre is moved."""
    entries = []
    for level, (scale, shift) in enumerate((([4, 4, 4], [8, 0, 0]), ([8, 8, 8], [10, 2, 2]))):
        transform = {
            "axes": ["z", "y", "x"],
            "units": ["nm"] * 3,
            "scale": scale,
            "translate": shift,
        }
        put(tmp_path / "a.zarr", f"em/s{level}", voxels(), 2, transform=transform)
        entries.append({"path": f"s{level}", "transform": transform})
    level = 1 if name == "em" else None
    assert place_of(open_volume(tmp_path / "a.zarr", "em/s1")) == ((8, 8, 8), (8, 0, 0))
    group = zarr.open_group(tmp_path / "a.zarr", path="em", mode="a")
    group.attrs["multiscales"] = [{"datasets": entries}]
    volume = open_volume(tmp_path / "a.zarr", name, level=level)
    assert place_of(volume) == ((8, 8, 8), (8, 0, 0))
    if name == "em/s1":
        volume = open_volume(tmp_path / "a.zarr" / name)
        assert place_of(volume) == ((8, 8, 8), (8, 0, 0))


def test_ways_that_disagree(tmp_path: Path) -> None:
    put(tmp_path / "a.zarr", "img/0", voxels(), voxel_size=[40, 8, 8])
    ome_group(
        tmp_path / "b.zarr", "img", [voxels()], [[30, 7, 6]], shifts=[[60, 0, 0]], version="0.5"
    )
    array = zarr.open_array(tmp_path / "b.zarr", path="img/0", mode="r+")
    array.attrs["voxel_size"] = [40, 8, 8]
    message = (
        r"multiscales of \S*b\.zarr:img says the voxel size \(30, 7, 6\) nm, but voxel_size of "
        r"\S*b\.zarr:img/0 says \(40, 8, 8\) nm; correct one, or give voxel_size to decide"
    )
    for path, dataset in (("b.zarr", "img"), ("b.zarr", "img/0"), ("b.zarr/img/0", None)):
        with pytest.raises(InputError, match=message if path == "b.zarr" else "multiscales of .*"):
            open_volume(tmp_path / path, dataset)
    # The user decides between the two, and only of what is given.
    for size in ((30, 7, 6), (40, 8, 8)):
        volume = open_volume(tmp_path / "b.zarr", "img", voxel_size=size)
        assert tuple(volume.voxel_size) == size
        assert tuple(volume.offset) == (60, 0, 0)
        assert "is taken, because voxel_size is given" in volume.notes[0]
    with pytest.raises(InputError, match="but voxel_size is given as"):
        open_volume(tmp_path / "b.zarr", "img", voxel_size=(20, 8, 8))
    array.attrs["offset"] = [0, 0, 80]
    with pytest.raises(InputError, match=r"offset \(60, 0, 0\) nm, but offset of .*\(0, 0, 80\)"):
        open_volume(tmp_path / "b.zarr", "img", voxel_size=(30, 7, 6))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"voxel_size": [30, 7, 6]}, {"resolution": [40, 8, 8]}),
        ({"resolution": [30, 7, 6]}, {"pixelResolution": [40, 8, 8]}),
        ({"voxel_size": [30, 7, 6]}, {"transform": {"scale": [30, 7, 7]}}),
        ({"axis_names": ["z", "y", "x"]}, {"_ARRAY_DIMENSIONS": ["x", "y", "z"]}),
    ],
)
def test_attributes_of_one_array_that_disagree(tmp_path: Path, one: Any, other: Any) -> None:
    put(tmp_path / "a.zarr", "raw", voxels(), **one, **other)
    with pytest.raises(InputError, match=f"{next(iter(one))} of .* but {next(iter(other))} of "):
        open_volume(tmp_path / "a.zarr", "raw")


def test_unitless_ome_scale_takes_the_size_of_the_array(tmp_path: Path) -> None:
    ome_group(
        *(tmp_path / "a.zarr", "img", [voxels()], [[5, 1, 1]]),
        shifts=[[10, 0, 2]],
        version="0.5",
        unit=None,
    )
    array = zarr.open_array(tmp_path / "a.zarr", path="img/0", mode="r+")
    array.attrs["voxel_size"] = [30, 6, 6]
    assert place_of(open_volume(tmp_path / "a.zarr", "img")) == ((30, 6, 6), (60, 0, 12))


NAMES = {
    "axis_names": lambda names: {"axis_names": names},
    "xarray": lambda names: {"_ARRAY_DIMENSIONS": names},
    "cosem": lambda names: {"transform": {"axes": names, "scale": [6, 7, 30]}},
}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("way", NAMES)
def test_axis_names_order_axes_and_numbers(tmp_path: Path, zarr_format: int, way: str) -> None:
    attributes = {"voxel_size": [6, 7, 30], "offset": [-6, 14, 60]} | NAMES[way](["x", "y", "z"])
    put(tmp_path / "a.zarr", "raw", voxels().transpose(2, 1, 0), zarr_format, **attributes)
    volume = open_volume(tmp_path / "a.zarr", "raw")
    check(volume, voxels())
    assert place_of(volume) == ((30, 7, 6), (60, 14, -6))


def test_dimension_names(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "a.zarr", mode="a", zarr_format=3)
    data = voxels().transpose(2, 0, 1)
    array = group.create_array("raw", data=data, dimension_names=["X", "Z", "Y"])
    array.attrs["resolution"] = [6, 30, 7]
    check(open_volume(tmp_path / "a.zarr", "raw"), voxels())
    assert place_of(open_volume(tmp_path / "a.zarr", "raw"))[0] == (30, 7, 6)
    array.attrs["_ARRAY_DIMENSIONS"] = ["z", "y", "x"]
    with pytest.raises(InputError, match=r"dimension_names of .* but _ARRAY_DIMENSIONS of "):
        open_volume(tmp_path / "a.zarr", "raw")


def test_other_names_of_axes(tmp_path: Path) -> None:
    for names, is_turned in (
        (["dim_0", "dim_1", "dim_2"], False),
        (["section", "y", "x"], False),
        (["x", "y", "section"], True),
    ):
        data = voxels().transpose(2, 1, 0) if is_turned else voxels()
        name = "".join(names)
        put(tmp_path / "a.zarr", name, data, _ARRAY_DIMENSIONS=names)
        check(open_volume(tmp_path / "a.zarr", name, voxel_size=(30, 7, 6)), voxels())
    wrong: list[Any] = [*map(list, ("tyx", "cyx", "zxx", "yx", "zyxc")), 7, [["z"]], {"z": 0}]
    for i, wrong_names in enumerate(wrong):
        put(tmp_path / "a.zarr", f"wrong{i}", voxels(), axis_names=wrong_names)
        with pytest.raises(InputError, match=r"do not have z, y and x|does not name 3 axes"):
            open_volume(tmp_path / "a.zarr", f"wrong{i}", voxel_size=(30, 7, 6))


def test_axes_of_n5(tmp_path: Path) -> None:
    put_n5(tmp_path / "a.n5" / "raw", voxels(), resolution=[6, 7, 30], axes=["x", "y", "z"])
    check(open_volume(tmp_path / "a.n5", "raw"), voxels())
    turned = voxels().transpose(2, 1, 0)
    put_n5(tmp_path / "a.n5" / "zyx", turned, resolution=[30, 7, 6], axes=["z", "y", "x"])
    volume = open_volume(tmp_path / "a.n5", "zyx")
    check(volume, voxels())
    assert place_of(volume)[0] == (30, 7, 6)
    # Python's libraries write this of an array whose x axis is first in the file.
    put_n5(tmp_path / "a.n5" / "b", voxels(), resolution=[6, 7, 30], axis_names=["z", "y", "x"])
    with pytest.raises(InputError, match="N5 stores x first; list the axes as N5 does"):
        open_volume(tmp_path / "a.n5", "b")


def test_coordinate_systems_of_ome_06(tmp_path: Path) -> None:
    put(tmp_path / "a.zarr", "img/0", voxels().transpose(2, 1, 0), voxel_size=[6, 7, 30])
    group = zarr.open_group(tmp_path / "a.zarr", path="img", mode="a")
    group.attrs["ome"] = {
        "version": "0.6",
        "multiscales": [
            {
                "coordinateSystems": [{"name": "world", "axes": AXES[::-1]}],
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": [
                            {"type": "scale", "scale": [6, 7, 30], "input": "0", "output": "world"}
                        ],
                    }
                ],
            }
        ],
    }
    for path, dataset in (("a.zarr", "img"), ("a.zarr", "img/0"), ("a.zarr/img/0", None)):
        for size in (None, (30, 7, 6)):
            with pytest.raises(InputError, match=r"coordinateSystems \(version 0\.6\) cannot be"):
                open_volume(tmp_path / path, dataset, voxel_size=size)


def test_label_multisets(tmp_path: Path) -> None:
    put_n5(tmp_path / "a.n5" / "labels" / "s0", voxels(), isLabelMultiset=True)
    (tmp_path / "a.n5" / "labels" / "attributes.json").write_text(
        json.dumps({"painteraData": {"type": "label"}, "resolution": [6, 6, 30]})
    )
    for name in ("labels", "labels/s0"):
        with pytest.raises(InputError, match=r"is a label multiset \(Paintera\)"):
            open_volume(tmp_path / "a.n5", name, kind="labels")


@pytest.mark.parametrize("unit", ["nanometer", None])
def test_scale_zero(tmp_path: Path, unit: str | None) -> None:
    ome_group(
        *(tmp_path / "a.zarr", "img", [voxels()], [[30, 0, 6]]),
        shifts=[[0, 7, 0]],
        version="0.5",
        unit=unit,
    )
    for size in (None, (30, 7, 6)):
        with pytest.raises(InputError, match=r"multiscales of .*\(30, 0, 6\) must be positive"):
            open_volume(tmp_path / "a.zarr", "img", voxel_size=size)


@pytest.mark.parametrize("units", ["um", ["um"], ["um", "um", "um"], "micrometer"])
def test_units_as_a_string(tmp_path: Path, units: Any) -> None:
    size = [0.03, 0.007, 0.006]
    put(tmp_path / "a.zarr", "a", voxels(), voxel_size=size, units=units)
    put(tmp_path / "a.zarr", "b", voxels(), transform={"scale": size, "units": units})
    for name in "ab":
        assert place_of(open_volume(tmp_path / "a.zarr", name))[0] == (30, 7, 6)
    put(tmp_path / "b.zarr", "c", voxels(), voxel_size=[30, 7, 6], units=["nm", "nm"])
    with pytest.raises(InputError, match=r"voxel_size of .* must have three"):
        open_volume(tmp_path / "b.zarr", "c")


@pytest.mark.parametrize("channels", [1, 3])
def test_four_axes_of_n5_with_three_numbers(tmp_path: Path, channels: int) -> None:
    data = np.stack([voxels()] * channels)
    put_n5(tmp_path / "a.n5" / "raw", data, resolution=[6, 7, 30], offset=[-6, 14, 60])
    if channels == 1:
        volume = open_volume(tmp_path / "a.n5", "raw")
        check(volume, voxels())
        assert place_of(volume) == ((30, 7, 6), (60, 14, -6))
    else:
        with pytest.raises(InputError, match="it must be 3-D"):
            open_volume(tmp_path / "a.n5", "raw")
