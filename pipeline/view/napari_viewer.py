"""The layers of a run in napari, which reads only the voxels that its window shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dask.array as da

from agq.blockwise.volumes.placement import PER_NANOMETRE
from agq.errors import InputError
from agq.pipeline.config.schema import Config
from agq.pipeline.folder import RunFolder
from agq.pipeline.view.layers import Layer, LazyVolume, config_layers, contrast, start_voxel
from agq.pipeline.view.marks import Marks, run_marks


def view_in_napari(config: Config, *, at: Sequence[int] | None = None) -> None:
    """Show a run in a window of napari until it is closed.

    Parameters
    ----------
    config
        Of the run.
    at
        Voxel (z, y, x) to start at; default the middle.

    Raises
    ------
    InputError
        If napari is not installed, or as for `config_layers`.
    """
    try:
        import napari
    except ImportError:
        raise InputError(
            "agq view --napari needs napari; install it with: pip install 'napari[all]'"
        ) from None
    layers = config_layers(config)
    run = RunFolder(Path(config.run_dir))
    viewer = napari.Viewer(title=f"agq: {run.path.name}", show=False)
    fill_napari(viewer, layers, run_marks(run, layers[0].unit, at), at)
    viewer.show()
    napari.run()


def fill_napari(
    viewer: Any,
    layers: Sequence[Layer],
    marks: Sequence[Marks] = (),
    at: Sequence[int] | None = None,
) -> None:
    """Add layers to a `napari.Viewer`, in nanometres.

    napari's world has voxel centres at whole steps, so the first voxel lies half a voxel behind
    its corner: layers of other voxel sizes then lie over each other as they should.

    Parameters
    ----------
    viewer
        A viewer.
    layers
        Volumes to show. Affinities become three images.
    marks
        Their points are shown, boxes are not.
    at
        Voxel of the first layer to start at, (z, y, x); default its middle.

    Raises
    ------
    InputError
        If the position is outside.
    """
    start = start_voxel(layers[0], at)
    for layer in layers:
        common: dict[str, Any] = {"visible": layer.visible, **_placed(layer)}
        if layer.kind == "affinities":
            names = [f"{layer.name} {axis}" for axis in "zyx"]
            colours = ["red", "green", "blue"]
            viewer.add_image(
                da.from_array(layer.data, chunks=layer.data.chunks, name=False),
                channel_axis=0,
                name=names,
                colormap=colours,
                blending="additive",
                contrast_limits=(0, 255),
                **common,
            )
            continue
        levels = _levels(layer.data)
        common |= {"name": layer.name, "multiscale": len(levels) > 1}
        data = levels if len(levels) > 1 else levels[0]
        if layer.kind == "segmentation":
            viewer.add_labels(data, opacity=0.5, **common)
        else:
            viewer.add_image(data, contrast_limits=contrast(layer.data), **common)
    for group in marks:
        points = [corners[0] for _, corners in group.items if len(corners) == 1]
        if points:
            size = group.voxel_size
            viewer.add_points(
                [[c * s for c, s in zip(point, size, strict=True)] for point in points],
                name=group.name,
                face_color=group.colour,
                size=10 * size[-1],
                out_of_slice_display=True,
                visible=group.visible,
                units=("nm",) * 3,
            )
    placed = _placed(layers[0])
    world = [p + i * s for p, i, s in zip(placed["translate"], start, placed["scale"], strict=True)]
    viewer.dims.set_point(range(3), world)
    # Since napari 0.9 the camera is one of a scene.
    getattr(viewer, "scene", viewer).camera.center = world


def _levels(volume: LazyVolume) -> list[Any]:
    """Return arrays of all resolutions, finest first, of which only slices are read."""
    volumes = [volume, *(level for _, level in volume.coarser)]
    return [da.from_array(v, chunks=v.volume.chunks, name=False) for v in volumes]


def _placed(layer: Layer) -> dict[str, Any]:
    per = PER_NANOMETRE[layer.unit]
    scale = [float(v) / per for v in layer.voxel_size]
    corner = [float(o) / per for o in layer.offset]
    return {
        "scale": scale,
        "translate": [c + s / 2 for c, s in zip(corner, scale, strict=True)],
        "units": ("nm",) * 3,
    }
