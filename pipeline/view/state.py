"""The state of a viewer as JSON for a neuroglancer of one's own: sources are addresses, not files.

A browser reads the arrays itself, so a web server or bucket that allows it (CORS) must serve them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agq.blockwise.volumes.create import Volume
from agq.errors import InputError
from agq.pipeline.config.schema import Config
from agq.pipeline.folder import RunFolder
from agq.pipeline.view.layers import config_layers
from agq.pipeline.view.marks import annotation_layer, run_marks

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
    config
        Configuration of the run.
    base_url
        Where the run folder is served: http(s)://, s3:// or gs://.
    raw_url
        Where the raw array is served, if its own path is not such an address:
        ``[driver://]address``, for example ``precomputed://gs://bucket/em``; without it, a local
        raw volume is left out.
    segmentation_url
        Where the segmentation is served instead, once `agq export precomputed` has written it:
        ``[precomputed://]address``.
    at
        Voxel (z, y, x) to start at; the middle by default.

    Returns
    -------
    dict
        The state; its sources are zarr v3 arrays, or whatever the raw volume is.

    Raises
    ------
    InputError
        If an address is none, neuroglancer is not installed, or an input cannot be opened.
    """
    from agq.pipeline.view.viewer import require_neuroglancer, start_view

    neuroglancer = require_neuroglancer()
    _require_address("--base-url", base_url)
    base = base_url.rstrip("/")
    run = RunFolder(Path(config.run_dir))
    layers = config_layers(config)
    state = neuroglancer.ViewerState()
    start_view(neuroglancer, state, layers[0], at)
    for layer in layers:
        if layer.name == "raw":
            url = raw_url or _address_of(layer.data.volume)
            if url is None:
                continue
            if raw_url is not None and not raw_url.startswith(tuple(f"{d}://" for d in _DRIVERS)):
                _require_address("--raw-url", raw_url)
                url = f"{_driver(layer.data.volume)}://{raw_url}"
        elif layer.name == "truth":
            continue
        elif layer.name == "segmentation" and segmentation_url is not None:
            address = segmentation_url.removeprefix("precomputed://")
            _require_address("--segmentation-url", address)
            url = f"precomputed://{address}"
        else:
            dataset = "segmentation/s0" if layer.name == "segmentation" else layer.name
            url = f"zarr3://{base}/{run.container.name}/{dataset}/"
        state.layers.append(
            name=layer.name,
            layer=_layer(neuroglancer, layer, url),
            visible=layer.visible,
        )
    for marks in run_marks(run, layers[0].unit, at):
        made = annotation_layer(neuroglancer, marks)
        state.layers.append(name=marks.name, layer=made, visible=marks.visible)
    return dict(state.to_json())


def _layer(neuroglancer: Any, layer: Any, url: str) -> Any:
    from agq.pipeline.view.viewer import drawn_layer, layer_transform

    if url.startswith("precomputed://"):
        # It knows its own voxel size and offset.
        source = neuroglancer.LayerDataSource(url=url)
    else:
        source = neuroglancer.LayerDataSource(
            url=url, transform=layer_transform(neuroglancer, layer, sized=True)
        )
    return drawn_layer(neuroglancer, layer, source)


def _address_of(volume: Volume) -> str | None:
    if not volume.path.startswith(_SCHEMES):
        return None
    inside = "/".join(part for part in (volume.path.rstrip("/"), volume.dataset or "") if part)
    return f"{_driver(volume)}://{inside}/"


def _driver(volume: Volume) -> str:
    return _DRIVERS.get(volume.format, "zarr")


def _require_address(option: str, url: str) -> None:
    if not url.startswith(_SCHEMES):
        raise InputError(f"{option} {url}: expected an address ({', '.join(_SCHEMES)}...)")
