"""Look at a run in neuroglancer: raw, affinities, fragments, segmentation and ground truth.

The viewer's server runs in this process, on the loopback interface only, and reads the voxels that
the browser asks for when it asks: nothing is loaded as a whole, so a volume of any size opens at
once, and so does a run that is still going on.
"""

import json
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import typer
from funlib.geometry import Coordinate

from blockwise.arrays import Volume, open_array, open_volume
from blockwise.errors import InputError
from pipeline.config import Config
from pipeline.run_folder import RunFolder

LOOPBACK = "127.0.0.1"

MESH_VOXELS = 2**25
"""Neuroglancer makes meshes from a whole volume in memory; larger volumes get none."""

_NANOMETRES = {"nm": 1.0, "angstrom": 0.1, "pm": 0.001}

_AFFINITY_SHADER = """
void main() {
  emitRGB(vec3(toNormalized(getDataValue(0)),
               toNormalized(getDataValue(1)),
               toNormalized(getDataValue(2))));
}
"""


@dataclass(frozen=True)
class Layer:
    """One layer of the viewer.

    Attributes
    ----------
    name
        Shown in the browser.
    kind
        How it is drawn.
    data
        Anything with ``shape``, ``dtype`` and slices: (z, y, x), affinities (3, z, y, x).
    voxel_size, offset
        World units, (z, y, x).
    unit
        The world unit.
    visible
        Whether it is switched on at first.
    """

    name: str
    kind: Literal["image", "segmentation", "affinities"]
    data: Any
    voxel_size: Coordinate
    offset: Coordinate
    unit: str = "nm"
    visible: bool = True


class LazyVolume:
    """Gives a `Volume` the look of an array, for neuroglancer: slices are read when asked for.

    Parameters
    ----------
    volume
        The volume.
    unsigned
        Show signed and boolean labels as unsigned ones, which is what the browser can draw.
    """

    def __init__(self, volume: Volume, *, unsigned: bool = False) -> None:
        self.volume = volume
        self.shape = volume.shape
        self.ndim = 3
        self.dtype = volume.dtype
        if unsigned and volume.dtype.kind != "u":
            self.dtype = np.dtype(f"u{volume.dtype.itemsize}")

    def __getitem__(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        bounds = [part.indices(size) for part, size in zip(selection, self.shape, strict=True)]
        data = self.volume.read([b[0] for b in bounds], [b[1] for b in bounds])
        return data.astype(self.dtype, copy=False)

    def transpose(self) -> npt.NDArray[Any]:
        """Return the whole volume in (x, y, z), for meshes of small volumes."""
        return self[:, :, :].transpose()


def volume_layer(
    name: str, volume: Volume, kind: Literal["image", "segmentation"], *, visible: bool = True
) -> Layer:
    """Make a layer of a volume.

    Parameters
    ----------
    name, kind, visible
        As in `Layer`.
    volume
        The volume; it is read only where the browser looks.
    """
    data = LazyVolume(volume, unsigned=kind == "segmentation")
    return Layer(name, kind, data, volume.voxel_size, volume.offset, volume.unit, visible)


def run_layers(container: Path, unit: str = "nm") -> list[Layer]:
    """Return the layers of what a run has written so far.

    Parameters
    ----------
    container
        The run's zarr container.
    unit
        World unit of the run.

    Returns
    -------
    list of Layer
        Affinities, fragments, segmentation: those that exist.
    """
    layers: list[Layer] = []
    if (container / "affinities" / "zarr.json").is_file():
        array = open_array(container, "affinities", "r")
        attributes: dict[str, Any] = dict(array.attrs)
        layers.append(
            Layer(
                "affinities",
                "affinities",
                array,
                Coordinate(attributes["voxel_size"]),
                Coordinate(attributes["offset"]),
                unit,
                visible=False,
            )
        )
    finished = (container / "segmentation" / "s0" / "zarr.json").is_file()
    for name, dataset in (("fragments", "fragments"), ("segmentation", "segmentation/s0")):
        if (container / dataset / "zarr.json").is_file():
            volume = open_volume(container, dataset, kind="labels", unit=unit)
            shown = name == "segmentation" or not finished
            layers.append(volume_layer(name, volume, "segmentation", visible=shown))
    return layers


def build_viewer(
    layers: Sequence[Layer],
    *,
    port: int = 0,
    at: Sequence[int] | None = None,
    host: str = LOOPBACK,
) -> Any:
    """Start a neuroglancer viewer, on the loopback interface unless told otherwise.

    Parameters
    ----------
    layers
        What to show; the first one decides the coordinates and the start position.
    port
        TCP port; 0 takes any free one.
    at
        Voxel of the first layer to start at, (z, y, x); default its middle.
    host
        Interface to listen on. All viewers of a process share one server: the first decides host
        and port. A viewer is only served while something refers to it.

    Returns
    -------
    neuroglancer.Viewer
        Serving in the background; ``str(viewer)`` is its address.

    Raises
    ------
    InputError
        If neuroglancer is not installed, the port is taken, or the position is outside.
    """
    neuroglancer = _neuroglancer()
    if not layers:
        raise InputError("there is nothing to show yet")
    first = layers[0]
    shape = first.data.shape[-3:]
    middle = tuple(n // 2 for n in shape) if at is None else tuple(at)
    if any(not 0 <= a < n for a, n in zip(middle, shape, strict=True)):
        raise InputError(f"--at {middle} is outside the volume of {tuple(shape)} voxels")
    if not neuroglancer.server.is_server_running():
        _require_port(host, port)
        neuroglancer.set_server_bind_address(host, port)
    viewer = neuroglancer.Viewer()
    offset, size = _nanometres(first, first.offset), _nanometres(first, first.voxel_size)
    with viewer.txn() as state:
        # Before anything that is counted in these units: the scale of the view is one of them.
        # x and y first, so that the first panel shows sections as they were imaged.
        state.dimensions = neuroglancer.CoordinateSpace(
            names=["x", "y", "z"], units="nm", scales=size[::-1]
        )
        position = [o / s + a + 0.5 for o, s, a in zip(offset, size, middle, strict=True)]
        state.position = position[::-1]
        state.cross_section_scale = 1.0
        state.layout = "4panel"
        for layer in layers:
            state.layers.append(
                name=layer.name, layer=_viewer_layer(neuroglancer, layer), visible=layer.visible
            )
    return viewer


def view_run(
    config: Config,
    *,
    port: int = 0,
    at: Sequence[int] | None = None,
    print_state: bool = False,
) -> None:
    """Show a run until it is interrupted; the address is printed.

    Parameters
    ----------
    config
        Configuration of the run; its ground truth is shown if there is one.
    port, at
        As for `build_viewer`.
    print_state
        Print the state of the viewer as JSON and return.

    Raises
    ------
    InputError
        If an input cannot be opened, or as for `build_viewer`.
    """
    neuroglancer = _neuroglancer()
    viewer = build_viewer(config_layers(config), port=port, at=at)
    try:
        if print_state:
            typer.echo(json.dumps(viewer.state.to_json(), indent=1))
            return
        typer.echo(f"{viewer}\nOpen this address in a browser on this machine; Ctrl-C ends.")
        threading.Event().wait()
    except KeyboardInterrupt:
        typer.echo("")
    finally:
        neuroglancer.stop()


def config_layers(config: Config) -> list[Layer]:
    """Return the layers of a run: its input, what it has written so far, and the ground truth.

    Parameters
    ----------
    config
        Configuration of the run.
    """
    from pipeline.prepare import open_section

    run = RunFolder(Path(config.run_dir))
    raw = open_section(config.input.raw, run, "raw", "input.raw")
    layers = [volume_layer("raw", raw, "image"), *run_layers(run.container, raw.unit)]
    if config.evaluate is not None:
        truth = open_section(config.evaluate.truth, run, "labels", "evaluate.truth")
        layers.append(volume_layer("truth", truth, "segmentation", visible=False))
    return layers


def _neuroglancer() -> Any:
    try:
        import neuroglancer
    except ImportError:
        raise InputError(
            "agq view needs neuroglancer; install it with: pip install 'agq-pipeline[view]'"
        ) from None
    return neuroglancer


def _require_port(host: str, port: int) -> None:
    """Find out by itself whether a port is free: the server leaves a thread behind if it is not."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise InputError(f"--port {port} cannot be used ({error}); try another") from error


def _nanometres(layer: Layer, values: Coordinate) -> list[float]:
    return [float(value) * _NANOMETRES[layer.unit] for value in values]


def _viewer_layer(neuroglancer: Any, layer: Layer) -> Any:
    size = _nanometres(layer, layer.voxel_size)
    place = [float(o) / float(v) for o, v in zip(layer.offset, layer.voxel_size, strict=True)]
    names, scales, units = ["z", "y", "x"], size, ["nm"] * 3
    if layer.kind == "affinities":
        names, scales, units, place = ["c^", *names], [1.0, *size], ["", *units], [0.0, *place]
    dimensions = neuroglancer.CoordinateSpace(names=names, units=units, scales=scales)
    volume = _local_volume(neuroglancer, layer, dimensions)
    # The offset goes into a transform: the server's own voxel offset would be cut to whole voxels.
    matrix = np.concatenate([np.eye(len(names)), np.array(place)[:, None]], axis=1)
    source = neuroglancer.LayerDataSource(
        url=volume,
        transform=neuroglancer.CoordinateSpaceTransform(
            output_dimensions=dimensions, matrix=matrix
        ),
    )
    if layer.kind == "segmentation":
        return neuroglancer.SegmentationLayer(source=source)
    if layer.kind == "affinities":
        return neuroglancer.ImageLayer(source=source, shader=_AFFINITY_SHADER, opacity=0.5)
    return neuroglancer.ImageLayer(
        source=source, shader_controls={"normalized": {"range": _contrast(layer.data)}}
    )


def _local_volume(neuroglancer: Any, layer: Layer, dimensions: Any) -> Any:
    class Served(neuroglancer.LocalVolume):
        """A volume whose meshes are refused, before anything is loaded, where it is large."""

        def get_object_mesh(self, object_id: int) -> Any:
            if np.prod(self.shape) > MESH_VOXELS:
                raise neuroglancer.local_volume.MeshesNotSupportedForVolume
            return super().get_object_mesh(object_id)

    volume_type = "segmentation" if layer.kind == "segmentation" else "image"
    return Served(layer.data, dimensions=dimensions, volume_type=volume_type)


def _contrast(data: Any) -> list[float]:
    """Return the grey values that become black and white, from one piece in the middle."""
    if data.dtype == np.uint8:
        return [0, 255]
    middle = [n // 2 for n in data.shape]
    sample = data[
        tuple(slice(max(0, m - r), m + r + 1) for m, r in zip(middle, (0, 128, 128), strict=True))
    ]
    low, high = (float(v) for v in np.nanpercentile(sample, (1, 99)))
    return [low, high] if high > low else [low, low + 1]
