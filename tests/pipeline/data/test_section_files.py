"""Folders and globs of images, one section each."""

from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from agq.errors import InputError
from agq.pipeline.data.importer import import_volume, is_importable
from agq.pipeline.data.sections import open_sections

SIZE = (30, 6, 6)


def section(z: int) -> np.ndarray:
    return np.random.default_rng(z).integers(0, 250, (20, 30), np.uint8)


def save(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for z, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".png"):
            (folder / name).write_bytes(imagecodecs.png_encode(section(z)))
        else:
            tifffile.imwrite(folder / name, section(z))
    return folder


def check(path: str | Path, order: list[int]) -> None:
    read = np.stack(list(open_sections(path).read(0)))
    np.testing.assert_array_equal(read, np.stack([section(z) for z in order]))


def test_sections_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    check(save(tmp_path / "case", "Slice1.tif", "Slice3.tif", "slice2.TIFF"), [0, 2, 1])
    check(save(tmp_path / "signs", "z0.png", "z1.png", "z-1.png", "z-2.png"), [3, 2, 0, 1])
    folder = save(tmp_path / "folders", "w1/s1.tif", "w2/s1.tif", "w1/s2.tif", "w2/s2.tif")
    check(str(folder / "w*" / "*.tif"), [0, 2, 1, 3])


def test_gaps(tmp_path: Path) -> None:
    em = save(tmp_path / "em", *(f"z{n:03}.tif" for n in (0, 1, 2, 5, 6, 9)))
    message = r"em: 4 sections are missing, by number: 3, 4, 7, 8; .*--allow-gaps"
    with pytest.raises(InputError, match=message):
        open_sections(em)
    with pytest.raises(InputError, match="4 sections are missing"):
        open_sections(str(em / "z*"))
    for value in (0, 7):
        name = f"{value}.zarr"
        volume = import_volume(em, tmp_path / name, "raw", SIZE, gap_value=value)
        data = volume.read((0, 0, 0), (10, 20, 30))
        np.testing.assert_array_equal(data[5], section(3))
        assert set(np.unique(data[[3, 4, 7, 8]])) == {value}
        record = zarr.open_array(tmp_path / name / "raw", mode="r").attrs["imported"]
        assert isinstance(record, dict)
        assert record["filled"] == {"sections": ["3", "4", "7", "8"], "value": value}
    with pytest.raises(InputError, match="filled sections"):
        import_volume(em, tmp_path / "7.zarr", "raw", SIZE, gap_value=0)
    for value in (-1, 256, 0.5, float("nan")):
        with pytest.raises(InputError, match=r"the gap value .* is no uint8"):
            open_sections(em, gap_value=value)


def test_links(tmp_path: Path) -> None:
    em = save(tmp_path / "em", "z0.tif", "z1.tif")
    (em / "z2.tif").symlink_to(em / "z1.tif")
    check(em, [0, 1, 1])
    (em / "z3.tif").symlink_to("nowhere.tif")
    for path in (em, str(em / "z*"), str(em / "z*.tif")):
        with pytest.raises(InputError, match=r"z3\.tif is a link to nowhere\.tif, which does not"):
            open_sections(path)


def test_what_is_no_section(tmp_path: Path) -> None:
    em = save(tmp_path / "em", "z0.tif", "z1.tif")
    (em / "notes.txt").write_text("no section")
    (em / "z2.tif").mkdir()
    for path in (em, str(em / "z*")):
        with pytest.raises(InputError, match=r"z2\.tif is no file"):
            open_sections(path)
    (em / "z2.tif").rmdir()
    check(em, [0, 1])
    with pytest.raises(InputError, match=r"notes\.txt is no tif or png file"):
        open_sections(str(em / "*"))
    tifffile.imwrite(em / "z2.tif", np.zeros((5, 20, 30), np.uint8))
    with pytest.raises(InputError, match=r"z2\.tif holds 3-D data of shape \(5, 20, 30\)"):
        list(open_sections(em).read(0))
    (em / "z2.tif").unlink()
    Image.fromarray(section(2)).save(em / "z2.jpg")
    with pytest.raises(InputError, match=r"z2\.jpg is no tif or png file; convert it"):
        open_sections(em)
    for name in ("z0.tif", "z1.tif"):
        (em / name).unlink()
    assert is_importable(em)
    with pytest.raises(InputError, match=r"z2\.jpg is no tif or png file; convert it"):
        open_sections(em)


@pytest.mark.parametrize("kind", ["L", "P", "RGB", "RGBA", "LA"])
def test_png_sections_are_whole_and_grey(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "z0.png"
    Image.fromarray(section(0)).convert(kind).save(file)
    if kind != "L":
        with pytest.raises(InputError, match=r"z0\.png holds 3-D data"):
            open_sections(tmp_path)
        return
    check(tmp_path, [0])
    whole = file.read_bytes()
    for length in (len(whole) - 1, len(whole) - 12, len(whole) // 2, 20, 0):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"z0\.png: cannot be read"):
            open_sections(tmp_path)
