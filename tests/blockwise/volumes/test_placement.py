"""Where a volume lies: voxel sizes, offsets, units."""

from pathlib import Path
from typing import Any

import pytest
import zarr

from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from tests.helpers.volumes import PLACE, put, put_n5, voxels


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


FINE = {
    "decimals": ([0.00446428571] * 3, "um", 4464),
    "thirds": (["1.33333333333"] * 3, "nm", 1333),
    "inch": ([1.7e-7] * 3, "inch", 4318),
    "inch, not whole": ([1.71e-7] * 3, "inch", 4343),
}


@pytest.mark.parametrize("case", FINE)
def test_voxel_sizes_that_are_whole_in_no_unit(tmp_path: Path, case: str) -> None:
    size, units, rounded = FINE[case]
    far = [10 * float(size[0]), 0, 0]
    put(tmp_path / "a.zarr", "raw", voxels(), voxel_size=size, offset=far, units=units)
    with pytest.raises(InputError, match=r"is not a whole number of nm, .*set unit: pm"):
        open_volume(tmp_path / "a.zarr", "raw")
    volume = open_volume(tmp_path / "a.zarr", "raw", unit="pm")
    assert tuple(volume.voxel_size) == (rounded,) * 3
    assert tuple(volume.offset) == (10 * rounded, 0, 0)  # voxels keep their place
    assert bool(volume.notes) == (case != "inch")
    # What a worker is given opens the same, and so does what is found without a unit.
    again = open_volume(
        *(tmp_path / "a.zarr", "raw"),
        voxel_size=[int(v) for v in volume.voxel_size],
        offset=[int(v) for v in volume.offset],
        unit="pm",
    )
    assert again.describe() == volume.describe()
    assert open_volume(tmp_path / "a.zarr", "raw", unit=None).describe() == volume.describe()


def test_rounding_that_would_move_voxels(tmp_path: Path) -> None:
    size = [40, 0.00446428571 * 1000, 0.00446428571 * 1000]
    group = zarr.open_group(tmp_path / "a.zarr", mode="a")
    array = group.create_array("raw", shape=(4, 20000, 8), chunks=(4, 64, 8), dtype="uint8")
    array.attrs["voxel_size"] = size
    for unit, advice in (
        ("nm", r"set unit: pm and voxel_size: \(40000, 4464, 4464\)"),
        ("pm", r"would lie 1\.28 voxels off; .* give voxel_size: \(40000, 4464, 4464\)"),
    ):
        with pytest.raises(InputError, match=advice):
            open_volume(tmp_path / "a.zarr", "raw", unit=unit)
    volume = open_volume(tmp_path / "a.zarr", "raw", voxel_size=(40000, 4464, 4464), unit="pm")
    assert tuple(volume.voxel_size) == (40000, 4464, 4464)
    assert "4464.28571" in volume.notes[0]
    assert "1.28 voxels off" in volume.notes[0]
    for other in ((40000, 4466, 4464), (40001, 4464, 4464)):
        with pytest.raises(InputError, match="declares the voxel size"):
            open_volume(tmp_path / "a.zarr", "raw", voxel_size=other, unit="pm")


@pytest.mark.parametrize("unit", ["nm", "angstrom", "pm"])
def test_numbers_without_a_unit_are_nanometres(tmp_path: Path, unit: str) -> None:
    put(tmp_path / "a.zarr", "raw", voxels(), **PLACE)
    put_n5(tmp_path / "b.n5" / "raw", voxels(), resolution=[6, 6, 30], offset=[-6, 12, 60])
    scale = {"nm": 1, "angstrom": 10, "pm": 1000}[unit]
    for path in ("a.zarr", "b.n5"):
        volume = open_volume(tmp_path / path, "raw", unit=unit)
        assert tuple(volume.voxel_size) == (30 * scale, 6 * scale, 6 * scale)
        assert tuple(volume.offset) == (60 * scale, 12 * scale, -6 * scale)


def test_offsets_in_voxels(tmp_path: Path) -> None:
    put(tmp_path / "a.zarr", "raw", voxels(), offset=[2, 0, -1], units="pixel")
    volume = open_volume(tmp_path / "a.zarr", "raw", voxel_size=(30, 6, 6))
    assert tuple(volume.offset) == (60, 0, -6)


def test_the_unit_is_found(tmp_path: Path) -> None:
    for i, (size, unit) in enumerate(
        (([30, 6, 6], "nm"), ([33.5, 4.2, 4.2], "angstrom"), ([33.5, 4.25, 4.2], "pm"))
    ):
        put(tmp_path / "a.zarr", str(i), voxels(), voxel_size=size)
        assert open_volume(tmp_path / "a.zarr", str(i), unit=None).unit == unit
    put(tmp_path / "a.zarr", "moved", voxels(), voxel_size=[30, 6, 6], offset=[0.1, 0, 0])
    assert open_volume(tmp_path / "a.zarr", "moved", unit=None).unit == "angstrom"


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
