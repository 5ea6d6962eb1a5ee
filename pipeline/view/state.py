"""The state of a viewer as JSON for any neuroglancer: its sources are addresses, not files.

A browser reads the arrays itself, so a web server or bucket that allows it (CORS) must serve them.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import neuroglancer

from agq.blockwise.volumes.open import Volume
from agq.errors import InputError
from agq.pipeline.config.schema import Config
from agq.pipeline.folder import RunFolder
from agq.pipeline.view.layers import Layer, config_layers, showing
from agq.pipeline.view.marks import run_marks
from agq.pipeline.view.viewer import drawn_layer, fill_state, layer_transform

_SCHEMES = ("http://", "https://", "s3://", "gs://")
_DRIVERS = {"zarr3": "zarr3", "zarr2": "zarr2", "n5": "n5", "precomputed": "precomputed"}


Spot = tuple[Sequence[int] | None, Sequence[int]]
"""Voxel (z, y, x) to start at, by default the middle, and segments to show first."""


def portable_states(
    config: Config,
    base_url: str,
    spots: Iterable[Spot],
    *,
    raw_url: str | None = None,
    segmentation_url: str | None = None,
    marked: bool = True,
) -> list[dict[str, Any]]:
    """Return a state that any neuroglancer can load for each spot.

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
    marked
        With borders of blocks, failed blocks, worst errors and suspects.

    Returns
    -------
    list of dict
        The states. Their sources are zarr v3 arrays; the raw volume keeps its own format.

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
    states = []
    for at, segments in spots:
        state = neuroglancer.ViewerState()
        drawn = [(one, _layer(one, urls[one.name])) for one in showing(layers, segments)]
        fill_state(state, drawn, run_marks(run, layers[0].unit, at) if marked else (), at)
        states.append(dict(state.to_json()))
    return states


def joined_state(
    config: Config,
    base_url: str,
    groups: Sequence[Sequence[int]],
    at: Sequence[int] | None,
    *,
    raw_url: str | None = None,
) -> dict[str, Any]:
    """Return a state that shows fragments, those of a group as one segment (``equivalences``).

    Parameters
    ----------
    base_url, raw_url
        As of `portable_states`.
    groups
        Fragments of each segment.
    at
        Voxel (z, y, x) to start at.

    Raises
    ------
    InputError
        If an address is not one, or an input cannot be opened.
    """
    [state] = portable_states(config, base_url, [(at, ())], raw_url=raw_url, marked=False)
    layers = {layer["name"]: layer for layer in state["layers"]}
    layers["fragments"]["equivalences"] = [[str(i) for i in group] for group in groups]
    layers["fragments"]["visible"] = True
    if "segmentation" in layers:
        layers["segmentation"]["visible"] = False
    return state


def link_to(site: str, state: dict[str, Any]) -> str:
    """Return the address of a state in a neuroglancer that somebody serves.

    Raises
    ------
    InputError
        If the site is no address.
    """
    if not site.startswith(("http://", "https://")):
        raise InputError(f"--neuroglancer {site}: give an address that begins with https://")
    return f"{site.rstrip('/')}/#!{quote(json.dumps(state, separators=(',', ':')))}"


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
