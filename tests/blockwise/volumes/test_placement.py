"""Where a volume lies: voxel sizes, offsets, units."""

from pathlib import Path
from typing import Any

import pytest

from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from tests.helpers.volumes import PLACE, put, voxels


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
