"""The layers of a viewer: volumes that are read only where the browser looks."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from funlib.geometry import Coordinate

from agq.blockwise.volumes.create import open_array
from agq.blockwise.volumes.open import Volume, open_volume
from agq.blockwise.volumes.triples import commas
from agq.errors import InputError
from agq.pipeline.config.schema import Config
from agq.pipeline.folder import RunFolder
from agq.pipeline.view.meshes import largest_segments, meshes_of

_MAX_LEVELS = 20

_SHOWN = 40
"""Segments in the 3-D view at first."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """One layer of the viewer.

    Attributes
    ----------
    kind
        Decides how it is drawn.
    data
        Anything with ``shape``, ``dtype`` and slices: (z, y, x), affinities (3, z, y, x).
    voxel_size, offset
        World units, (z, y, x).
    visible
        Whether it is switched on at first.
    meshes
        Folder of meshes of the segments, in neuroglancer's format.
    shown
        Segments that are selected at first.
    """

    name: str
    kind: Literal["image", "segmentation", "affinities"]
    data: Any
    voxel_size: Coordinate
    offset: Coordinate
    unit: str = "nm"
    visible: bool = True
    meshes: Path | None = None
    shown: tuple[int, ...] = ()


class LazyVolume:
    """A `Volume` with the interface of an array, for neuroglancer; slicing reads it.

    Parameters
    ----------
    unsigned
        Show signed and boolean labels as unsigned ones: the browser draws no others.
    coarser
        The same volume at lower resolutions, which are read if the browser is zoomed out.
    """

    def __init__(
        self, volume: Volume, *, unsigned: bool = False, coarser: Sequence[Volume] = ()
    ) -> None:
        self.volume = volume
        self.coarser = [
            (factor, LazyVolume(level, unsigned=unsigned))
            for level in coarser
            if (factor := _factor(volume, level)) is not None
        ]
        self.shape = volume.shape
        self.ndim = 3
        self.dtype = volume.dtype
        if unsigned and volume.dtype.kind != "u":
            self.dtype = np.dtype(f"u{volume.dtype.itemsize}")

    def __getitem__(self, selection: tuple[slice | int, ...]) -> npt.NDArray[Any]:
        # A number, as numpy takes it: that voxel, without the axis.
        spans = [part if isinstance(part, slice) else slice(part, part + 1) for part in selection]
        bounds = [span.indices(size) for span, size in zip(spans, self.shape, strict=True)]
        data = self.volume.read([b[0] for b in bounds], [b[1] for b in bounds])
        steps = [
            slice(None, None, bound[2]) if isinstance(part, slice) else 0
            for part, bound in zip(selection, bounds, strict=True)
        ]
        return data[tuple(steps)].astype(self.dtype, copy=False)

    def level_for(
        self, wanted: npt.NDArray[np.int64]
    ) -> "tuple[npt.NDArray[np.int64], LazyVolume] | None":
        """Return the coarsest level that a downsampling factor is a multiple of, and its factor."""
        fitting = [(f, v) for f, v in self.coarser if not (wanted % f).any()]
        return max(fitting, key=lambda pair: int(np.prod(pair[0])), default=None)

    def transpose(self) -> npt.NDArray[Any]:
        """Return the whole volume in (x, y, z), for meshes of small volumes."""
        return self[:, :, :].transpose()


def _factor(volume: Volume, level: Volume) -> npt.NDArray[np.int64] | None:
    """Return the whole factor between two resolutions of a volume; None if they do not fit."""
    factor = np.array([a // b for a, b in zip(level.voxel_size, volume.voxel_size, strict=True)])
    shape = tuple(-(-n // int(f)) for n, f in zip(volume.shape, factor, strict=True) if f)
    exact = tuple(volume.voxel_size * Coordinate(factor.tolist())) == tuple(level.voxel_size)
    same_place = tuple(level.offset) == tuple(volume.offset) and shape == tuple(level.shape)
    return factor if exact and same_place and np.prod(factor) > 1 else None


def volume_levels(open_level: Callable[[int], Volume]) -> list[Volume]:
    """Open all lower resolutions of a volume.

    Parameters
    ----------
    open_level
        Opens level 1, 2, ...; raises `InputError` after the last level.
    """
    levels: list[Volume] = []
    for level in range(1, _MAX_LEVELS):
        try:
            levels.append(open_level(level))
        except InputError:
            break
    return levels


def volume_layer(
    name: str,
    volume: Volume,
    kind: Literal["image", "segmentation"],
    *,
    visible: bool = True,
    coarser: Sequence[Volume] = (),
) -> Layer:
    """Make a layer of a volume."""
    data = LazyVolume(volume, unsigned=kind == "segmentation", coarser=coarser)
    return Layer(name, kind, data, volume.voxel_size, volume.offset, volume.unit, visible)


def run_layers(container: Path, unit: str = "nm") -> list[Layer]:
    """Return the layers that a run has written so far.

    Returns
    -------
    list of Layer
        Affinities, fragments and segmentation, if they exist.
    """
    layers: list[Layer] = []
    if (container / "affinities" / "zarr.json").is_file():
        array = open_array(container, "affinities", "r")
        attributes: dict[str, Any] = dict(array.attrs)
        size, offset = Coordinate(attributes["voxel_size"]), Coordinate(attributes["offset"])
        layers.append(Layer("affinities", "affinities", array, size, offset, unit, visible=False))
    finished = (container / "segmentation" / "s0" / "zarr.json").is_file()
    for name, dataset in (("fragments", "fragments"), ("segmentation", "segmentation/s0")):
        if (container / dataset / "zarr.json").is_file():
            volume = open_volume(container, dataset, kind="labels", unit=unit)
            shown = name == "segmentation" or not finished
            coarser: list[Volume] = []
            if name == "segmentation":
                coarser = volume_levels(
                    lambda k: open_volume(container, f"segmentation/s{k}", kind="labels", unit=unit)
                )
            layers.append(
                volume_layer(name, volume, "segmentation", visible=shown, coarser=coarser)
            )
    return layers


def showing(layers: Sequence[Layer], segments: Sequence[int]) -> list[Layer]:
    """Return layers whose segmentation shows these segments first; unchanged if none are given."""
    return [
        replace(layer, shown=tuple(segments))
        if segments and layer.name == "segmentation"
        else layer
        for layer in layers
    ]


def start_voxel(first: Layer, at: Sequence[int] | None) -> tuple[int, ...]:
    """Return the voxel (z, y, x) of the first layer to start at, by default its middle.

    Raises
    ------
    InputError
        If it is outside.
    """
    shape = first.data.shape[-3:]
    start = tuple(n // 2 for n in shape) if at is None else tuple(at)
    if any(not 0 <= a < n for a, n in zip(start, shape, strict=True)):
        raise InputError(f"--at {commas(start)} is outside the volume of {commas(shape)} voxels")
    return start


def contrast(data: Any) -> list[float]:
    """Return the grey values to draw black and white, from a sample in the middle."""
    if data.dtype == np.uint8:
        return [0, 255]
    middle = [n // 2 for n in data.shape]
    sample = data[
        tuple(slice(max(0, m - r), m + r + 1) for m, r in zip(middle, (0, 128, 128), strict=True))
    ]
    low, high = (float(v) for v in np.nanpercentile(sample, (1, 99)))
    return [low, high] if high > low else [low, low + 1]


def config_layers(config: Config) -> list[Layer]:
    """Return the layers of a run: its input, what it has written so far, and the ground truth.

    A raw volume or a truth that cannot be opened, moved since the run perhaps, is left out with a
    warning where there is something else to see.

    Raises
    ------
    InputError
        If an input cannot be opened, and the run has written nothing.
    """
    run = RunFolder(Path(config.run_dir))
    layers = run_layers(run.container, config.input.unit)
    if meshes := meshes_of(run.path):
        shown = tuple(largest_segments(run.path, _SHOWN))
        layers = [
            replace(layer, meshes=meshes, shown=shown) if layer.name == "segmentation" else layer
            for layer in layers
        ]
    for name, make in (("raw", _raw_layers), ("truth", _truth_layers)):
        try:
            found = make(config, run)
        except InputError as error:
            if not layers:
                raise
            _logger.warning("%s is not shown: %s", name, error)
        else:
            layers = [*found, *layers] if name == "raw" else [*layers, *found]
    return layers


def _raw_layers(config: Config, run: RunFolder) -> list[Layer]:
    from agq.pipeline.data.importer import is_importable
    from agq.pipeline.data.inputs import open_input

    section, unit = config.input.raw, config.input.unit
    if section is None:  # fragments of another model, without the volume they were made from
        return []
    raw = open_input(section, run, "raw", "input.raw", unit)

    def open_level(level: int) -> Volume:
        # The configuration gives the voxel size of the level that it names.
        finer = {"level": (section.level or 0) + level, "voxel_size": None, "offset": None}
        return open_input(section.model_copy(update=finer), run, "raw", "input.raw", unit)

    coarser = [] if is_importable(section.path) else volume_levels(open_level)
    return [volume_layer("raw", raw, "image", coarser=coarser)]


def _truth_layers(config: Config, run: RunFolder) -> list[Layer]:
    from agq.pipeline.data.inputs import open_input

    if config.evaluate is None:
        return []
    truth = open_input(config.evaluate.truth, run, "labels", "evaluate.truth", config.input.unit)
    return [volume_layer("truth", truth, "segmentation", visible=False)]
