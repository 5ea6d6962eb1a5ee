"""Tif files: whole or refused, grey, and what they say of the voxel size."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from agq.errors import InputError
from agq.pipeline.data.importer import import_volume
from agq.pipeline.data.sections import open_sections

SHAPE = (9, 24, 32)

Written = dict[str, Any]
ZYX: Written = {"metadata": {"axes": "ZYX"}}

WRITERS: dict[str, Written] = {
    "plain.tif": {"metadata": None},
    "shaped.tif": {},
    "shaped-zlib.tif": {"compression": "zlib"},
    "tiles.tif": {"tile": (16, 16), "compression": "lzw"},
    "big.tif": {"bigtiff": True},
    "imagej.tif": {"imagej": True, **ZYX},
    "a.ome.tif": ZYX,
    "zlib.ome.tif": {"compression": "zlib", **ZYX},
}


def stack(dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(5).integers(0, 250, SHAPE).astype(dtype)


def read(path: Path) -> np.ndarray:
    return np.stack(list(open_sections(path).read(0)))


def check_line(error: InputError, name: str) -> None:
    assert name in str(error)
    assert "\n" not in str(error)


def write(folder: Path, name: str) -> Path:
    """Write the stack with a writer of `WRITERS`, or with Pillow and a compression."""
    file = folder / name
    if name in WRITERS:
        tifffile.imwrite(file, stack(), **WRITERS[name])
    else:
        pages = [Image.fromarray(section) for section in stack()]
        compression = None if name == "raw.tif" else file.stem
        pages[0].save(file, save_all=True, append_images=pages[1:], compression=compression)
    return file


@pytest.mark.parametrize("name", [*WRITERS, "tiff_lzw.tif", "tiff_deflate.tif", "raw.tif"])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name)
    whole = file.read_bytes()
    np.testing.assert_array_equal(read(file), stack())
    chance = random.Random(name)
    for length in (len(whole) // 2, *(chance.randrange(8, len(whole)) for _ in range(12))):
        file.write_bytes(whole[:length])
        try:
            # A few bytes at the end may be no part of any page.
            np.testing.assert_array_equal(read(file), stack())
            assert len(whole) - length < 20
        except InputError as error:
            check_line(error, name)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_with_damaged_bytes_is_read_or_refused(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name)
    whole = file.read_bytes()
    chance = random.Random(name)
    for _ in range(120):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 3))):
            near = chance.choice((400, len(whole)))
            place = chance.choice((0, len(whole) - near)) + chance.randrange(near)
            damaged[place] = chance.choice((0, 255, damaged[place] ^ 1 << chance.randrange(8)))
        file.write_bytes(damaged)
        try:
            open_sections(file)
        except InputError as error:
            check_line(error, name)


@pytest.mark.parametrize(
    "options",
    [
        {"imagej": True, "metadata": {"axes": "YX"}, "description": "ImageJ=1.53\nimages=9\n"},
        {"metadata": None, "description": "ImageJ=1.53\nimages=9\nslices=9\n"},
        {"metadata": None, "description": '{"shape": [9, 24, 32]}'},
    ],
)
def test_fewer_pages_than_declared(tmp_path: Path, options: Any) -> None:
    options = {key: value for key, value in options.items() if key != "imagej"}
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for n, section in enumerate(stack()[:4]):
            described = options if n == 0 else {"metadata": None}
            writer.write(section, contiguous=False, **described)
    with pytest.raises(InputError, match=r"a\.tif.*(declares 9 pages, but has|cannot be read)"):
        open_sections(tmp_path / "a.tif")


def test_ome_with_fewer_planes_than_declared(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.ome.tif", stack(), **ZYX)
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tif:
        text = tif.ome_metadata
    assert text is not None
    tifffile.imwrite(tmp_path / "b.ome.tif", stack()[:5], metadata=None, description=text)
    with pytest.raises(InputError, match=r"b\.ome\.tif"):
        read(tmp_path / "b.ome.tif")


def test_a_page_without_data_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "shaped-zlib.tif")
    with tifffile.TiffFile(file) as tif:
        tag = tif.pages[4].aspage().tags["StripByteCounts"]
        place, size = tag.valueoffset, tag.dtype
    assert size in (3, 4)
    damaged = bytearray(file.read_bytes())
    damaged[place : place + 4] = b"\0\0\0\0"
    file.write_bytes(damaged)
    with pytest.raises(InputError, match=r"shaped-zlib\.tif.* (section 4 has no data|page)"):
        read(file)


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_white_zero_is_inverted(tmp_path: Path, bits: int) -> None:
    data = stack("uint16" if bits == 16 else "uint8")
    data = data % 2 == 0 if bits == 1 else data
    for page_by_page in (False, True):
        with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
            for part in data if page_by_page else (data,):
                writer.write(part, photometric="miniswhite", contiguous=False)
        opened = open_sections(tmp_path / "a.tif")
        assert opened.inverted
        wanted = ~data if bits == 1 else 2**bits - 1 - data
        np.testing.assert_array_equal(np.stack(list(opened.read(0))), wanted)
    (tmp_path / "em").mkdir()
    for z, section in enumerate(data):
        tifffile.imwrite(tmp_path / "em" / f"{z}.tif", section, photometric="miniswhite")
    np.testing.assert_array_equal(read(tmp_path / "em"), wanted)
    with pytest.raises(InputError, match="0 is white"):
        import_volume(tmp_path / "a.tif", tmp_path / "o.zarr", "l", (1, 1, 1), kind="labels")


def test_pages_of_two_photometric_kinds(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for z, section in enumerate(stack()):
            kind = "miniswhite" if z == 4 else "minisblack"
            writer.write(section, photometric=kind, contiguous=False, metadata=None)
    wanted = stack()
    wanted[4] = 255 - wanted[4]
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), wanted)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((24, 32, 3), {"photometric": "rgb"}, "colour image"),
        ((3, 24, 32), {"photometric": "rgb", "planarconfig": "separate"}, "colour image"),
        ((3, 24, 32), {"imagej": True, "metadata": {"axes": "CYX"}}, "3 channels"),
        ((4, 24, 32), {"metadata": {"axes": "CYX"}, "ome": True}, "4 channels"),
        (
            (9, 24, 32),
            {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)},
            "PALETTE",
        ),
    ],
)
def test_what_is_not_grey(tmp_path: Path, shape: Any, options: Any, message: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros(shape, np.uint8), **options)
    with pytest.raises(InputError, match=message):
        open_sections(tmp_path / "a.tif")


SET = ["p0.ome.tif", "p1.ome.tif", "p2.ome.tif"]


def save_set(folder: Path) -> None:
    """Write an OME set of three files with three planes each, in reverse order."""
    folder.mkdir()
    ids = [f"urn:uuid:0000000{n}-0000-0000-0000-000000000000" for n in range(3)]
    planes = "".join(
        f'<TiffData FirstZ="{z}" IFD="{z % 3}" PlaneCount="1">'
        f'<UUID FileName="{SET[2 - z // 3]}">{ids[2 - z // 3]}</UUID></TiffData>'
        for z in range(9)
    )
    for n, name in enumerate(SET):
        text = (
            '<?xml version="1.0" encoding="UTF-8"?><OME '
            'xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="{ids[n]}"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" '
            'Type="uint8" SizeX="32" SizeY="24" SizeZ="9" SizeC="1" SizeT="1" '
            'PhysicalSizeX="6" PhysicalSizeXUnit="nm" PhysicalSizeY="6" PhysicalSizeYUnit="nm" '
            'PhysicalSizeZ="0.03">'
            f'<Channel ID="Channel:0:0" SamplesPerPixel="1"/>{planes}</Pixels></Image></OME>'
        )
        part = stack()[6 - 3 * n : 9 - 3 * n]
        tifffile.imwrite(
            folder / name, part, description=text, metadata=None, photometric="minisblack"
        )


def test_an_ome_set_in_a_folder(tmp_path: Path) -> None:
    save_set(tmp_path / "em")
    opened = open_sections(tmp_path / "em")
    assert sorted(file.name for file in opened.files) == SET
    np.testing.assert_array_equal(np.stack(list(opened.read(0))), stack())
    np.testing.assert_array_equal(read(tmp_path / "em" / SET[1]), stack())
    volume = import_volume(tmp_path / "em", tmp_path / "o.zarr", "raw", None)
    assert tuple(volume.voxel_size) == (30, 6, 6)
    tifffile.imwrite(tmp_path / "em" / "stray.tif", stack()[0])
    with pytest.raises(InputError, match=r"stray\.tif do not belong to the OME set of p0"):
        open_sections(tmp_path / "em")
    (tmp_path / "em" / "stray.tif").unlink()
    (tmp_path / "em" / SET[0]).unlink()
    with pytest.raises(InputError, match=r"p1\.ome\.tif"):
        read(tmp_path / "em")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"metadata": {"axes": "ZYX", "spacing": 30, "unit": "nm"}, "resolution": (0.25,) * 2}, 1),
        (
            {
                "metadata": {"axes": "ZYX", "spacing": 0.03, "unit": "um"},
                "resolution": (250, 250),
            },
            1,
        ),
        ({"metadata": {"axes": "ZYX", "spacing": 30}, "resolution": (72, 72)}, None),
        ({"metadata": {"axes": "ZYX", "unit": "nm"}, "resolution": (0.25, 0.25)}, "z"),
    ],
)
def test_spacing_of_imagej(tmp_path: Path, options: Any, wanted: Any) -> None:
    tifffile.imwrite(tmp_path / "a.tif", stack(), imagej=True, **options)

    def place(size: Any, name: str) -> tuple[int, ...]:
        return tuple(import_volume(tmp_path / "a.tif", tmp_path / name, "raw", size).voxel_size)

    if wanted == 1:
        assert place(None, "a.zarr") == (30, 4, 4)
    else:
        with pytest.raises(InputError, match="declares no voxel size"):
            place(None, "a.zarr")
    if wanted is None:
        assert place((40, 8, 8), "b.zarr") == (40, 8, 8)
    else:
        assert place((30, 4, 4), "b.zarr") == (30, 4, 4)
        with pytest.raises(InputError, match=r"\(30, 4, 4\) nm, but .* \(30, 8, 4\)"):
            place((30, 8, 4), "c.zarr")


def test_pixels_per_unit_that_imagej_cut(tmp_path: Path) -> None:
    # 30 nm: 0.033333 pixels per nm.
    tifffile.imwrite(
        tmp_path / "a.tif",
        stack(),
        imagej=True,
        metadata={"axes": "ZYX", "spacing": 42.5, "unit": "nm"},
        resolution=((33333, 1000000), (238095, 1000000)),
    )
    volume = import_volume(tmp_path / "a.tif", tmp_path / "o.zarr", "raw", None, unit=None)
    assert (tuple(volume.voxel_size), volume.unit) == ((425, 42, 300), "angstrom")


@pytest.mark.parametrize(
    "sizes",
    [
        {"X": (4, "nm"), "Y": (4, "nm"), "Z": (30, "nm")},
        {"X": (0.004, None), "Y": (0.004, "µm"), "Z": (3e-5, "mm")},
    ],
)
def test_physical_size_of_ome(tmp_path: Path, sizes: Any) -> None:
    metadata: dict[str, Any] = {"axes": "ZYX"}
    for axis, (size, unit) in sizes.items():
        metadata[f"PhysicalSize{axis}"] = size
        if unit:
            metadata[f"PhysicalSize{axis}Unit"] = unit
    tifffile.imwrite(tmp_path / "a.ome.tif", stack(), metadata=metadata)
    volume = import_volume(tmp_path / "a.ome.tif", tmp_path / "a.zarr", "raw", None)
    assert tuple(volume.voxel_size) == (30, 4, 4)
    with pytest.raises(InputError, match=r"declares the voxel size .* \(OME\)"):
        import_volume(tmp_path / "a.ome.tif", tmp_path / "b.zarr", "raw", (30, 4, 8))
