"""HDF5 datasets: place, links, and data that are elsewhere."""

import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.errors import InputError
from agq.pipeline.data.importer import import_volume, settle
from agq.pipeline.data.sections import open_sections

SHAPE = (5, 12, 14)


def stack() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 250, SHAPE).astype("uint8")


def save(file: Path, name: str = "volumes/raw", data: Any = None, **attributes: Any) -> None:
    with h5py.File(file, "a") as store:
        dataset = store.create_dataset(name, data=stack() if data is None else data)
        dataset.attrs.update(attributes)


def read(file: Path, key: str | None = None) -> np.ndarray:
    return np.stack(list(open_sections(file, key).read(0)))


def place(file: Path, key: str | None = None, size: Any = None, **given: Any) -> Any:
    folder = file.parent / f"{random.randrange(10**9)}.zarr"
    volume = import_volume(file, folder, "raw", size, key=key, **given)
    np.testing.assert_array_equal(volume.read((0, 0, 0), volume.shape), stack())
    return tuple(volume.voxel_size), tuple(volume.offset), volume.unit


def test_resolution_and_offset_of_cremi(tmp_path: Path) -> None:
    file = tmp_path / "a.h5"
    save(file, resolution=[40.0, 4.0, 4.0], offset=[160.0, 200.0, 80.0])
    wanted = (40, 4, 4), (160, 200, 80), "nm"
    assert place(file) == wanted
    assert place(file, size=(40, 4, 4)) == wanted
    assert place(file, offset=(160, 200, 80)) == wanted
    with pytest.raises(InputError, match=r"\(40, 4, 4\) nm, but voxel_size .* \(30, 4, 4\)"):
        place(file, size=(30, 4, 4))
    with pytest.raises(InputError, match=r"offset \(160, 200, 80\) nm, but offset .* \(0, 0, 0\)"):
        place(file, size=(40, 4, 4), offset=(0, 0, 0))


@pytest.mark.parametrize(
    ("attributes", "data"),
    [
        ({"voxel_size": [40, 4, 4]}, None),
        ({"element_size_um": [0.04, 0.004, 0.004]}, None),
        ({"resolution": [4, 4, 40], "axis_names": ["x", "y", "z"]}, stack().T),
        ({"resolution": [4, 4, 40], "_ARRAY_DIMENSIONS": ["x", "y", "z"]}, stack().T),
        (
            {
                "resolution": [40, 4, 4],
                "axistags": '{"axes": [{"key": "z"}, {"key": "y"}, {"key": "x"}, {"key": "c"}]}',
            },
            stack()[..., None],
        ),
        ({"resolution": [40, 4, 4]}, stack()[None, ..., None]),
    ],
)
def test_other_conventions(tmp_path: Path, attributes: Any, data: Any) -> None:
    save(tmp_path / "a.h5", data=data, **attributes)
    assert place(tmp_path / "a.h5") == ((40, 4, 4), (0, 0, 0), "nm")


def test_labels_of_dimensions_and_attributes_of_groups(tmp_path: Path) -> None:
    save(tmp_path / "a.h5", data=stack().T)
    with h5py.File(tmp_path / "a.h5", "a") as store:
        for dim, label in zip(store["volumes/raw"].dims, "xyz", strict=True):
            dim.label = label
        store["volumes"].attrs["resolution"] = [4, 4, 40]
    assert place(tmp_path / "a.h5") == ((40, 4, 4), (0, 0, 0), "nm")


def test_links_are_followed_or_named(tmp_path: Path) -> None:
    file = tmp_path / "a.h5"
    save(tmp_path / "b.h5", "other", resolution=[40, 4, 4])
    save(file, resolution=[40, 4, 4])
    with h5py.File(file, "a") as store:
        store["soft"] = h5py.SoftLink("/volumes/raw")
        store["volumes/up"] = h5py.SoftLink("/volumes")
    assert place(file) == place(file, "soft") == place(file, "volumes/up/raw")
    with h5py.File(file, "a") as store:
        store["lost"] = h5py.SoftLink("/volumes/nothing")
        store["away"] = h5py.ExternalLink("b.h5", "/other")
        store["gone"] = h5py.ExternalLink("c.h5", "/other")
    assert place(file, "away")[0] == (40, 4, 4)
    assert {f.name for f in open_sections(file, "away").files} == {"a.h5", "b.h5"}
    with pytest.raises(InputError, match=r"it holds: volumes/raw .*, away \(5, 12, 14\) uint8$"):
        open_sections(file)
    with pytest.raises(InputError, match="lost in 'lost' is a link to /volumes/nothing, which"):
        open_sections(file, "lost")
    with pytest.raises(InputError, match=r"gone in 'gone/x' is a link to c\.h5:/other, and that"):
        open_sections(file, "gone/x")


def test_data_in_other_files(tmp_path: Path) -> None:
    for n in (0, 1):
        save(tmp_path / f"part{n}.h5", "part", data=stack()[3 * n : 3 * n + 3])
    layout = h5py.VirtualLayout(SHAPE, np.uint8)
    for n, part in enumerate((slice(0, 3), slice(3, 5))):
        source = h5py.VirtualSource(f"part{n}.h5", "part", (3 - n, *SHAPE[1:]))
        layout[part] = source
    with h5py.File(tmp_path / "a.h5", "w") as store:
        store.create_virtual_dataset("virtual", layout)
        files = [(tmp_path / "raw.bin", 0, stack().nbytes)]
        store.create_dataset("outside", SHAPE, np.uint8, external=files)[...] = stack()
    for key in ("virtual", "outside"):
        np.testing.assert_array_equal(read(tmp_path / "a.h5", key), stack())
    (tmp_path / "raw.bin").write_bytes(stack().tobytes()[:-1])
    with pytest.raises(InputError, match=r"its data in .*raw\.bin, which is missing or too short"):
        read(tmp_path / "a.h5", "outside")
    (tmp_path / "part1.h5").unlink()
    with pytest.raises(InputError, match=r"virtual dataset with data in .*part1\.h5:part"):
        read(tmp_path / "a.h5", "virtual")


def test_a_filter_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as store:
        store.create_dataset(
            "raw", data=stack(), chunks=(1, 6, 7), compression=32015, allow_unknown_filter=True
        )
    monkeypatch.setitem(sys.modules, "hdf5plugin", ModuleType("without this filter"))
    with pytest.raises(InputError, match=r"a\.h5:raw is compressed by .* \(32015\), .*hdf5plugin"):
        open_sections(tmp_path / "a.h5")


def test_imaris(tmp_path: Path) -> None:
    file = tmp_path / "a.ims"
    padded = np.pad(stack(), ((0, 3), (0, 4), (0, 2)))
    channel = "DataSet/ResolutionLevel 0/TimePoint 0/Channel 0"
    save(file, f"{channel}/Data", padded)

    def text(value: Any) -> np.ndarray:
        return np.array([c.encode() for c in str(value)], "S1")

    with h5py.File(file, "a") as store:
        for axis, size in zip("ZYX", SHAPE, strict=True):
            store[channel].attrs[f"ImageSize{axis}"] = text(size)
        image = store.create_group("DataSetInfo/Image")
        for n, (low, high) in enumerate([(1, "1.056"), ("2.5", "2.548"), (0, "0.2")]):
            image.attrs[f"ExtMin{n}"], image.attrs[f"ExtMax{n}"] = text(low), text(high)
        image.attrs["Unit"] = text("um")
    assert place(file)[0] == (40, 4, 4)
    with h5py.File(file, "a") as store:
        store[channel].attrs["ImageSizeX"] = text("wide")
    with pytest.raises(InputError, match="Imaris image is malformed"):
        place(file)


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    save(tmp_path / "a.h5")
    whole = (tmp_path / "a.h5").read_bytes()
    for length in range(8, len(whole), 211):
        (tmp_path / "a.h5").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.h5: cannot be read"):
            read(tmp_path / "a.h5")


numbers = st.floats(-1e30, 1e30) | st.floats(30, 40) | st.integers(-5, 50)
values = st.one_of(
    st.lists(numbers, max_size=4),
    st.lists(st.lists(numbers, min_size=2, max_size=2), min_size=1, max_size=3),
    numbers,
    st.text(max_size=6).filter(lambda text: "\0" not in text),
    st.sampled_from(["", "nm", "zyx", b"um", np.bool_(True), np.void(b"ab"), [b"x", b"y", b"z"]]),
)
NAMES = """resolution voxel_size offset units unit axis_names _ARRAY_DIMENSIONS axes axistags
transform element_size_um pixelResolution downsamplingFactors ImageSizeZ"""
names = st.sampled_from(NAMES.split())


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, values, max_size=3), st.sampled_from([0, 1, 2]))
def test_any_attributes_give_a_place_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, attributes: dict[str, Any], level: int
) -> None:
    with h5py.File("a.h5", "w", driver="core", backing_store=False) as store:
        dataset = store.create_dataset("v/raw", data=stack())
        (dataset, store["v"], store)[level].attrs.update(attributes)
        store.flush()
        image = store.id.get_file_image()
    file = tmp_path_factory.getbasetemp() / "mutated.h5"
    file.write_bytes(image)
    try:
        settle(open_sections(file), (40, 4, 4), None, "nm")
    except InputError as error:
        if "\n" in str(error):
            raise
