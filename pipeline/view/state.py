"""The state of a viewer as JSON for any neuroglancer: its sources are addresses, not files.

A browser reads the arrays itself, so a web server or bucket that allows it (CORS) must serve them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import neuroglancer

from agq.blockwise.volumes.open import Volume
from agq.errors import InputError
from agq.pipeline.config.schema import Config
from agq.pipeline.folder import RunFolder
from agq.pipeline.view.layers import Layer, config_layers
from agq.pipeline.view.marks import run_marks
from agq.pipeline.view.viewer import drawn_layer, fill_state, layer_transform

_SCHEMES = ("http://", "https://", "s3://", "gs://")
_DRIVERS = {"zarr3": "zarr3", "zarr2": "zarr2", "n5": "n5", "precomputed": "precomputed"}


def portable_state(
    config: Config,
    base_url: str,
    *,
    raw_url: str | None = None,
    segmentation_url: str | None = None,
    at: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return a state that any neuroglancer can load.

    Parameters
    ----------
    base_url
        Address of the run folder: http(s)://, s3:// or gs://.
    raw_url
        Address of the raw array, if its path is not one: ``[driver://]address``, for example
        ``precomputed://gs://bucket/em``; without it, a local raw volume is left out.
    segmentation_url
        Address of the output of `agq export precomputed`, instead of the segmentation in the run
        folder: ``[precomputed://]address``.
    at
        Voxel (z, y, x) to start at; the middle by default.

    Returns
    -------
    dict
        The state. Its sources are zarr v3 arrays; the raw volume keeps its own format.

    Raises
    ------
    InputError
        If an address is not one, or an input cannot be opened.
    """
    base = _address("--base-url", base_url).rstrip("/")
    run = RunFolder(Path(config.run_dir))
    layers = config_layers(config)
    container = f"zarr3://{base}/{run.container.name}"
    urls = {
        "raw": _raw_url(layers[0].data.volume, raw_url) if layers[0].name == "raw" else None,
        "affinities": f"{container}/affinities/",
        "fragments": f"{container}/fragments/",
        "segmentation": f"{container}/segmentation/s0/",
        "truth": None,
    }
    if segmentation_url is not None:
        address = segmentation_url.removeprefix("precomputed://")
        urls["segmentation"] = f"precomputed://{_address('--segmentation-url', address)}"
    state = neuroglancer.ViewerState()
    drawn = [(layer, _layer(layer, urls[layer.name])) for layer in layers]
    fill_state(state, drawn, run_marks(run, layers[0].unit, at), at)
    return dict(state.to_json())


def _layer(layer: Layer, url: str | None) -> Any:
    """Return a layer with an address as its source; None without an address."""
    if url is None:
        return None
    # A precomputed volume knows its own voxel size and offset.
    placed = url.startswith("precomputed://")
    transform = None if placed else layer_transform(layer, sized=True)
    return drawn_layer(layer, neuroglancer.LayerDataSource(url=url, transform=transform))


def _raw_url(raw: Volume, given: str | None) -> str | None:
    """Return the address of the raw volume; None if it lies in a local file."""
    driver = _DRIVERS.get(raw.format, "zarr")
    if given is not None:
        if given.startswith(tuple(f"{d}://" for d in _DRIVERS)):
            return given
        return f"{driver}://{_address('--raw-url', given)}"
    if not raw.path.startswith(_SCHEMES):
        return None
    # The dataset of a precomputed volume is one of its scales, and a viewer takes them all.
    dataset = raw.dataset.rpartition("/")[0] if driver == "precomputed" else raw.dataset
    inside = "/".join(part for part in (raw.path.rstrip("/"), dataset) if part)
    return f"{driver}://{inside}/"


def _address(option: str, url: str) -> str:
    """Return an address after checking that it is one."""
    if not url.startswith(_SCHEMES):
        raise InputError(f"{option} {url}: give an address that begins with {', '.join(_SCHEMES)}")
    return url
