"""The picture: right place, right aspect, steady colours, only a few planes read."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.image import imread
from skimage.segmentation import find_boundaries

from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import Volume, open_volume
from agq.errors import InputError
from agq.pipeline.view import picture
from agq.pipeline.view.picture import at_borders, colours, snapshot

SIZE = (30, 6, 6)


def stored(
    folder: Path, values: npt.NDArray[Any], offset: Any = (0, 0, 0), size: Any = SIZE
) -> Volume:
    array = create_array(
        folder,
        "a",
        shape=values.shape,
        chunks=(2, 32, 32),
        dtype=values.dtype,
        voxel_size=size,
        offset=offset,
    )
    array[:] = values
    return open_volume(folder, "a", kind="labels")


def example(folder: Path, shape: Any = (8, 100, 120)) -> dict[str, Volume]:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, shape).astype(np.uint8)
    labels = np.zeros(shape, np.uint64)
    labels[:, 10:90, 10:50] = 2**60 + 1
    labels[:, 10:90, 60:] = 2**60 + 2
    return {
        "raw": stored(folder / "raw", raw),
        "segmentation": stored(folder / "seg", labels),
        "truth": stored(folder / "truth", (labels % 2**60).astype(np.uint32) * 7),
    }


def panels(file: Path, n: int) -> list[npt.NDArray[Any]]:
    image = imread(file)[..., :3]
    return np.array_split(image, n, axis=1)


def test_panels_show_the_volumes_side_by_side(tmp_path: Path) -> None:
    volumes = example(tmp_path)
    file = tmp_path / "out.png"
    snapshot(file, **volumes)
    image = imread(file)
    assert image.shape[1] > 3 * 500
    raw, segmentation, truth = panels(file, 3)
    grey = raw[100:400, 100:600]
    assert np.abs(grey.max(-1) - grey.min(-1)).max() < 0.01
    assert (segmentation.max(-1) - segmentation.min(-1)).mean() > 0.1
    # Truth and segmentation agree, so they look alike though their ids differ.
    width = min(segmentation.shape[1], truth.shape[1])
    middle = slice(60, 400), slice(100, width - 100)
    assert np.abs(segmentation[middle] - truth[middle]).mean() < 0.1


def test_the_same_picture_each_time(tmp_path: Path) -> None:
    volumes = example(tmp_path)
    snapshot(tmp_path / "a.png", **volumes)
    snapshot(tmp_path / "b.png", **volumes)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_planes_have_world_aspect_and_the_place_asked_for(tmp_path: Path) -> None:
    volumes = example(tmp_path)
    xy, xz = picture._planes(volumes["raw"], volumes["segmentation"], (2, 30, 40))
    assert (xy.height, xy.width) == (600, 720)
    assert (xz.height, xz.width) == (240, 720)
    raw = volumes["raw"].read((0, 0, 0), volumes["raw"].shape)
    np.testing.assert_array_equal(xy.read(volumes["raw"]), raw[2])
    np.testing.assert_array_equal(xz.read(volumes["raw"]), raw[:, 30])


def test_a_part_with_an_offset_is_shown_in_its_place(tmp_path: Path) -> None:
    volumes = example(tmp_path)
    part = stored(tmp_path / "part", np.full((4, 30, 20), 5, np.uint16), offset=(60, 120, 60))
    xy, _ = picture._planes(volumes["raw"], volumes["raw"], (3, 50, 60))
    seen = xy.read(part)
    expected = np.zeros((100, 120), np.uint16)
    expected[20:50, 10:30] = 5
    np.testing.assert_array_equal(seen, expected)
    xy, _ = picture._planes(volumes["raw"], part, None)
    assert tuple(xy.roi.shape) == (30, 180, 120)
    snapshot(tmp_path / "out.png", volumes["raw"], part, fragments=volumes["segmentation"])
    assert len(panels(tmp_path / "out.png", 3)) == 3


def test_a_large_volume_is_read_in_planes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (600, 4000, 5000)
    arrays = [
        create_array(
            tmp_path,
            name,
            shape=shape,
            chunks=(16, 256, 256),
            dtype=dtype,
            voxel_size=SIZE,
        )
        for name, dtype in (("raw", np.uint8), ("labels", np.uint64))
    ]
    assert all(array.shape == shape for array in arrays)
    raw, labels = (open_volume(tmp_path, name, kind="labels") for name in ("raw", "labels"))
    read: list[int] = []
    true_read = Volume.read

    def counted(self: Volume, start: Any, stop: Any) -> npt.NDArray[Any]:
        read.append(int(np.prod([b - a for a, b in zip(start, stop, strict=True)])))
        return true_read(self, start, stop)

    monkeypatch.setattr(Volume, "read", counted)
    snapshot(tmp_path / "out.png", raw, labels, at=(599, 3999, 10))
    assert max(read) <= picture.MAX_IN_PLANE**2
    assert len(read) == 4


def test_colours_are_a_function_of_the_id() -> None:
    ids = np.array([1, 2, 3, 2**63, 1], np.uint64)
    rgb = colours(ids)
    assert rgb.shape == (5, 3)
    np.testing.assert_array_equal(rgb[0], rgb[4])
    assert len(np.unique(rgb[:4].round(3), axis=0)) == 4
    np.testing.assert_array_equal(rgb[:2], colours(np.array([1, 2], np.int32)))


def test_bad_input(tmp_path: Path) -> None:
    volumes = example(tmp_path)
    with pytest.raises(InputError, match="outside the volume"):
        snapshot(tmp_path / "out.png", **volumes, at=(8, 0, 0))
    coarse = stored(tmp_path / "coarse", np.zeros((4, 4, 4), np.uint8), size=(30, 12, 12))
    with pytest.raises(InputError, match="voxel size of the segmentation"):
        snapshot(tmp_path / "out.png", volumes["raw"], coarse)
    far = stored(tmp_path / "far", np.zeros((4, 4, 4), np.uint8), offset=(0, 60000, 0))
    with pytest.raises(InputError, match="does not overlap"):
        snapshot(tmp_path / "out.png", volumes["raw"], far)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (9, 13)])
def test_borders_are_those_of_scikit_image(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for most in (2, 3, 5):
        labels = rng.integers(0, most, shape).astype(np.uint64)
        np.testing.assert_array_equal(at_borders(labels), find_boundaries(labels))
        inner = find_boundaries(labels, mode="inner")
        np.testing.assert_array_equal(at_borders(labels) & (labels != 0), inner)
