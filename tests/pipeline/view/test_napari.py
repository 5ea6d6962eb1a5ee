"""The layers of a run in napari: a viewer of the test takes what napari's would be given."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agq.blockwise.stitch.output.pyramid import Pyramid, plan_levels
from agq.blockwise.volumes.create import create_affinities, create_array
from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from agq.pipeline.view.layers import run_layers, volume_layer
from agq.pipeline.view.marks import Marks
from agq.pipeline.view.napari_viewer import fill_napari
from tests.helpers.runs import make_config

SHAPE = (4, 20, 30)


class Viewer:
    """Records the calls that `napari.Viewer` would get."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[str, Any, dict[str, Any]]] = {}
        self.dims = self.camera = self
        self.center: list[float] = []
        self.point: list[float] = []

    def set_point(self, axes: range, point: list[float]) -> None:
        assert list(axes) == [0, 1, 2]
        self.point = point

    def _add(self, kind: str, data: Any, name: Any, **options: Any) -> None:
        self.calls[str(name)] = (kind, data, options)

    def add_image(self, data: Any, **options: Any) -> None:
        self._add("image", data, **options)

    def add_labels(self, data: Any, **options: Any) -> None:
        self._add("labels", data, **options)

    def add_points(self, data: Any, **options: Any) -> None:
        self._add("points", data, **options)


@pytest.fixture
def container(tmp_path: Path) -> Path:
    place: dict[str, Any] = {"voxel_size": (300, 42, 42), "offset": (600, 0, -42)}
    options = {"shape": SHAPE, "chunks": (4, 16, 16), "unit": "angstrom", **place}
    labels = np.arange(np.prod(SHAPE), dtype=np.uint64).reshape(SHAPE)
    create_array(tmp_path, "segmentation/s0", dtype=np.uint64, **options)[...] = labels
    coarse = options | {"shape": (4, 10, 15), "voxel_size": (300, 84, 84)}
    create_array(tmp_path, "segmentation/s1", dtype=np.uint64, **coarse)[...] = labels[:, ::2, ::2]
    grey = (labels % 200 * 100).astype(np.uint16)
    create_array(tmp_path, "raw", dtype=np.uint16, **options)[...] = grey
    affinities = create_affinities(tmp_path, "affinities", **options)
    affinities[...] = np.stack([labels % 251] * 3).astype(np.uint8)
    levels = plan_levels(SHAPE, (4, 16, 16), (300, 42, 42), 2)
    pyramid = Pyramid(tmp_path, "segmentation", levels, (4, 16, 16), (600, 0, -42), "angstrom")
    pyramid.write_metadata()
    return tmp_path


def test_layers_have_their_place(container: Path) -> None:
    raw = volume_layer("raw", open_volume(container, "raw", unit="angstrom"), "image")
    layers = [raw, *run_layers(container, "angstrom")]
    points = (("a merger", ((2.5, 3.5, 4.5),)),)
    boxes = (("block 0", ((0.0, 0.0, 0.0), (4.0, 4.0, 4.0))),)
    marks = [Marks("mergers", "red", (30, 4.2, 4.2), points), Marks("blocks", "blue", (1,), boxes)]
    viewer = Viewer()
    fill_napari(viewer, layers, marks, at=(1, 2, 3))
    assert list(viewer.calls) == [
        "raw",
        "['affinities z', 'affinities y', 'affinities x']",
        "segmentation",
        "mergers",
    ]
    for name, kind in (("raw", "image"), ("segmentation", "labels")):
        found, data, options = viewer.calls[name]
        assert found == kind
        np.testing.assert_allclose(options["scale"], [30, 4.2, 4.2])
        np.testing.assert_allclose(options["translate"], [60 + 15, 2.1, -4.2 + 2.1])
        assert options["units"] == ("nm", "nm", "nm")
        finest = data[0] if options["multiscale"] else data
        assert finest.shape == SHAPE
    assert viewer.calls["raw"][2]["contrast_limits"][1] > 255
    _, levels, options = viewer.calls["segmentation"]
    assert [level.shape for level in levels] == [SHAPE, (4, 10, 15)]
    assert np.asarray(levels[0][2, 3:5, 7]).tolist() == [2 * 600 + 97, 2 * 600 + 127]
    assert np.asarray(levels[0][3, 4, 1:9:3]).tolist() == [1921, 1924, 1927]
    _, affinities, options = viewer.calls["['affinities z', 'affinities y', 'affinities x']"]
    assert (affinities.shape, options["channel_axis"]) == ((3, *SHAPE), 0)
    np.testing.assert_allclose(viewer.calls["mergers"][1], [[75, 14.7, 18.9]])
    np.testing.assert_allclose(viewer.point, [75 + 30, 2.1 + 8.4, -2.1 + 12.6])
    assert viewer.center == viewer.point
    with pytest.raises(InputError, match=r"--at .* is outside"):
        fill_napari(viewer, layers, at=(4, 0, 0))


def test_a_layer_without_coarser_levels_is_plain(container: Path) -> None:
    viewer = Viewer()
    fill_napari(viewer, [volume_layer("raw", open_volume(container, "raw", unit=None), "image")])
    _, data, options = viewer.calls["raw"]
    assert data.shape == SHAPE
    assert not options["multiscale"]


@pytest.mark.skipif(importlib.util.find_spec("napari") is not None, reason="napari is installed")
def test_the_command_says_how_to_install_it(main: Any, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    code, _, error = main("view", config, "--napari")
    assert (code, len(error.splitlines())) == (2, 1)
    assert "pip install 'napari[all]'" in error
    code, _, error = main("view", config, "--napari", "--port", "8000")
    assert (code, len(error.splitlines())) == (2, 1)
    assert "leave out --port" in error
