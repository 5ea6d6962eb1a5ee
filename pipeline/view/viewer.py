"""Look at a run in neuroglancer: raw, affinities, fragments, segmentation and ground truth.

The viewer's server runs in this process, on the loopback interface only. It reads only the voxels
that the browser asks for, so a volume of any size opens at once, and so does a run that goes on.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from funlib.geometry import Coordinate

from agq.blockwise.volumes.placement import PER_NANOMETRE
from agq.blockwise.volumes.triples import show_voxel
from agq.errors import InputError
from agq.pipeline.config.schema import Config
from agq.pipeline.folder import RunFolder
from agq.pipeline.view.layers import (
    Layer,
    LazyVolume,
    config_layers,
    contrast,
    showing,
    start_voxel,
)
from agq.pipeline.view.marks import Marks, run_marks
from agq.plain_text import say

try:
    import neuroglancer

    from agq.pipeline.view.server import require_server, serve_folder
except ImportError:
    raise InputError(
        "agq view needs neuroglancer; install it with: pip install 'agq-pipeline[view]'"
    ) from None

LOOPBACK = "127.0.0.1"

MESH_VOXELS = 2**25
"""Neuroglancer makes meshes from a whole volume in memory; larger volumes get none."""

_READ_AT_ONCE = 64

_AFFINITY_SHADER = """
void main() {
  emitRGB(vec3(toNormalized(getDataValue(0)),
               toNormalized(getDataValue(1)),
               toNormalized(getDataValue(2))));
}
"""


def build_viewer(
    layers: Sequence[Layer],
    *,
    port: int = 0,
    at: Sequence[int] | None = None,
    host: str = LOOPBACK,
    marks: Sequence[Marks] = (),
) -> Any:
    """Start a neuroglancer viewer, on the loopback interface unless told otherwise.

    Parameters
    ----------
    layers
        Volumes to show; the first one decides the coordinates and the start position.
    port
        TCP port; 0 takes any free one.
    at
        Voxel of the first layer to start at, (z, y, x); default its middle.
    marks
        Boxes and points over the volumes.
    host
        Interface to listen on. All viewers of a process share one server: the first decides host
        and port. The server forgets a viewer that has been garbage-collected.

    Returns
    -------
    neuroglancer.Viewer
        Serving in the background; ``str(viewer)`` is its address.

    Raises
    ------
    InputError
        If the port is taken, or the position is outside.
    """
    if not layers:
        raise InputError("the viewer has no volume to show")
    start_voxel(layers[0], at)
    require_server(host, port)
    # Its volumes are those of this process: the browser needs no credentials of the user.
    viewer = neuroglancer.Viewer(allow_credentials=False)
    drawn = []
    for layer in layers:
        meshes = None if layer.meshes is None else serve_folder(viewer, layer.meshes)
        drawn.append((layer, _served(layer, meshes)))
    with viewer.txn() as state:
        fill_state(state, drawn, marks, at)
    return viewer


def fill_state(
    state: Any,
    layers: Sequence[tuple[Layer, Any]],
    marks: Sequence[Marks],
    at: Sequence[int] | None,
) -> None:
    """Fill a viewer's state; `marks` and `at` are as for `build_viewer`.

    Layers come with neuroglancer's layer of each; one with None only counts as the first.
    """
    _start_view(state, layers[0][0], at)
    for layer, drawn in layers:
        if drawn is not None:
            state.layers.append(name=layer.name, layer=drawn, visible=layer.visible)
    for group in marks:
        state.layers.append(name=group.name, layer=_annotations(group), visible=group.visible)


def _start_view(state: Any, first: Layer, at: Sequence[int] | None) -> None:
    """Set coordinates, position, scale and layout of a state from its first layer."""
    middle = start_voxel(first, at)
    offset, size = _nanometres(first, first.offset), _nanometres(first, first.voxel_size)
    # The dimensions come first: position and scales count in their units. The order x, y lets the
    # first panel show sections as they were imaged.
    state.dimensions = neuroglancer.CoordinateSpace(
        names=["x", "y", "z"], units="nm", scales=size[::-1]
    )
    position = [o / s + a + 0.5 for o, s, a in zip(offset, size, middle, strict=True)]
    state.position = position[::-1]
    state.cross_section_scale = 1.0
    # Let the whole volume fit into the 3-D panel.
    extent = [n * s for n, s in zip(first.data.shape[-3:], size, strict=True)]
    state.projection_scale = 1.5 * max(extent) / size[-1]
    state.layout = "4panel"


def view_run(
    config: Config,
    *,
    port: int = 0,
    at: Sequence[int] | None = None,
    segments: Sequence[int] = (),
) -> None:
    """Show a run, with its ground truth if it has one, until interrupted; print the address.

    Parameters are those of `run_viewer`.

    Raises
    ------
    InputError
        If an input cannot be opened, or as for `build_viewer`.
    """
    layers = showing(config_layers(config), segments)
    viewer = _run_viewer(config, layers, port=port, at=at)
    first = layers[0]
    place = show_voxel(start_voxel(first, at), first.voxel_size, first.unit, first.offset)
    try:
        say(
            f"{viewer}\nIt starts at {place}. Open this address in a browser on this machine; "
            "Ctrl-C ends."
        )
        threading.Event().wait()
    except KeyboardInterrupt:
        say("")
    finally:
        neuroglancer.stop()


def run_viewer(
    config: Config,
    *,
    port: int = 0,
    at: Sequence[int] | None = None,
    host: str = LOOPBACK,
    segments: Sequence[int] = (),
) -> Any:
    """Start a viewer of a run: its volumes, block borders, failed blocks and worst errors.

    `segments` are those that it shows first; other parameters, and errors, are those of
    `build_viewer`.
    """
    layers = showing(config_layers(config), segments)
    return _run_viewer(config, layers, port=port, at=at, host=host)


def _run_viewer(
    config: Config, layers: Sequence[Layer], *, at: Sequence[int] | None, **where: Any
) -> Any:
    marks = run_marks(RunFolder(Path(config.run_dir)), layers[0].unit, at)
    return build_viewer(layers, at=at, marks=marks, **where)


def _nanometres(layer: Layer, values: Coordinate) -> list[float]:
    return [float(value) / PER_NANOMETRE[layer.unit] for value in values]


def layer_transform(layer: Layer, *, sized: bool = False) -> Any:
    """Return the place of a layer's voxels; `sized` for a source that does not know their size."""
    place = [float(o) / float(v) for o, v in zip(layer.offset, layer.voxel_size, strict=True)]
    if layer.kind == "affinities":
        place = [0.0, *place]
    # The offset goes into a transform: the server would cut its own voxel offset to whole voxels.
    matrix = np.concatenate([np.eye(len(place)), np.array(place)[:, None]], axis=1)
    dimensions = _dimensions(layer)
    return neuroglancer.CoordinateSpaceTransform(
        output_dimensions=dimensions,
        input_dimensions=dimensions if sized else None,
        matrix=matrix,
    )


def drawn_layer(layer: Layer, source: Any) -> Any:
    """Return neuroglancer's layer: an image, colours or segments."""
    if layer.kind == "segmentation":
        # Sections show the segments that are not in the 3-D view too.
        chosen = {"segments": layer.shown, "not_selected_alpha": 0.5} if layer.shown else {}
        return neuroglancer.SegmentationLayer(source=source, **chosen)
    if layer.kind == "affinities":
        return neuroglancer.ImageLayer(source=source, shader=_AFFINITY_SHADER, opacity=0.5)
    return neuroglancer.ImageLayer(
        source=source, shader_controls={"normalized": {"range": contrast(layer.data)}}
    )


def _dimensions(layer: Layer) -> Any:
    names, scales, units = ["z", "y", "x"], _nanometres(layer, layer.voxel_size), ["nm"] * 3
    if layer.kind == "affinities":
        names, scales, units = ["c^", *names], [1.0, *scales], ["", *units]
    return neuroglancer.CoordinateSpace(names=names, units=units, scales=scales)


def _annotations(marks: Marks) -> Any:
    dimensions = neuroglancer.CoordinateSpace(
        names=["z", "y", "x"], units=["nm"] * 3, scales=marks.voxel_size
    )
    annotations = []
    for k, (text, corners) in enumerate(marks.items):
        common = {"id": str(k), "description": text}
        if len(corners) == 1:
            annotation = neuroglancer.PointAnnotation(point=corners[0], **common)
        else:
            annotation = neuroglancer.AxisAlignedBoundingBoxAnnotation(
                point_a=corners[0], point_b=corners[1], **common
            )
        annotations.append(annotation)
    return neuroglancer.LocalAnnotationLayer(
        dimensions=dimensions, annotations=annotations, annotation_color=marks.colour
    )


class _ServedVolume(neuroglancer.LocalVolume):
    """The voxels of a layer, read from lower resolutions if possible; no meshes if it is large."""

    def __init__(self, layer: Layer) -> None:
        self.layered = layer.data if isinstance(layer.data, LazyVolume) else None
        # The browser asks for factors up to this; each request reads a few million voxels at most.
        levels = self.layered.coarser if self.layered else []
        coarsest = max((int(np.prod(factor)) for factor, _ in levels), default=1)
        super().__init__(
            layer.data,
            dimensions=_dimensions(layer),
            volume_type="segmentation" if layer.kind == "segmentation" else "image",
            max_downsampling=_READ_AT_ONCE * coarsest,
        )

    def get_object_mesh(self, object_id: int) -> Any:
        """Refuse the mesh of a large volume before anything is loaded."""
        if np.prod(self.shape) > MESH_VOXELS:
            raise neuroglancer.local_volume.MeshesNotSupportedForVolume
        return super().get_object_mesh(object_id)

    def get_encoded_subvolume(self, data_format: str, start: Any, end: Any, scale_key: str) -> Any:
        """Read the lowest resolution that is fine enough, and shrink only what remains."""
        wanted = np.array(scale_key.split(","), np.int64)
        level = None
        if self.layered is not None and wanted.size == 3 and (wanted > 0).all():
            level = self.layered.level_for(wanted)
        if level is None:
            return super().get_encoded_subvolume(data_format, start, end, scale_key)
        factor, coarse = level
        volume = neuroglancer.LocalVolume(
            coarse, dimensions=self.dimensions, volume_type=self.volume_type
        )
        rest = ",".join(str(n) for n in wanted // factor)
        return volume.get_encoded_subvolume(data_format, start, end, rest)


def _served(layer: Layer, meshes: str | None) -> Any:
    """Return a layer whose voxels this process serves, and meshes of an address."""
    volume = _ServedVolume(layer)
    source = neuroglancer.LayerDataSource(url=volume, transform=layer_transform(layer))
    if meshes is None:
        return drawn_layer(layer, source)
    source.subsources["meshes"] = False
    return drawn_layer(layer, [source, neuroglancer.LayerDataSource(url=f"precomputed://{meshes}")])
