"""The report of a run: one HTML file that needs no network, server or other file."""

import base64
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
import numpy.typing as npt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from agq.blockwise.journal.records import BlockState
from agq.blockwise.storage.files import write_atomic
from agq.blockwise.volumes.open import Volume
from agq.blockwise.volumes.triples import Triple, commas, show_voxel, voxel_at
from agq.errors import InputError
from agq.pipeline.config.schema import Config
from agq.pipeline.dashboard.blockmap import STATES
from agq.pipeline.dashboard.run_view import RunView
from agq.pipeline.status.text import duration, measure, measured
from agq.pipeline.view.layers import LazyVolume, config_layers
from agq.pipeline.view.picture import MAX_IN_PLANE, figure_png, snapshot

_COLOURS: Final = ("#eceff2", "#b6a7d8", "#3b7dd8", "#cfd5dc", "#f0a500", "#d1264f")
_BLUE: Final = "#3b7dd8"
_MAX_LAYERS: Final = 12
_MAX_SPOTS: Final = 3
_SPOT_VOXELS: Final = 256
_SCORES: Final = (
    *("voi_split", "voi_merge", "voi_sum", "adapted_rand_error"),
    *("rand_precision", "rand_recall"),
)


def write_report(config: Config, out_html: Path) -> None:
    """Write the report of a run on this machine, finished or not, into an existing folder.

    Raises
    ------
    InputError
        If there is no run in the folder.
    """
    view = RunView(Path(config.run_dir))
    run = view.overview(patience_s=None)
    now = run["now"]
    for stage in run["stages"]:
        begun = stage["started"]
        stage["time"] = duration((stage["finished"] or now) - begun) if begun else ""
    evaluation = run["results"].get("evaluate", {})
    figures = [("Block map", _block_map(view, run))] if run["blocks"] else []
    figures += _plots(view.rows, run["history"])
    figures += _pictures(config, evaluation)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template("report.html").render(
        run=run,
        made=time.strftime("%Y-%m-%d %H:%M"),
        figures=figures,
        compared=[
            [measured(row["name"]), *(_value(row, which) for which in ("forecast", "fact"))]
            for row in run["forecast"]
        ],
        scores=list(evaluation.get("scores", {}).values()),
        score_names=_SCORES,
        show_place=partial(_show_place, run["grid"], evaluation.get("unit", "nm")),
        worst=[(k, evaluation.get(f"worst_{k}", [])) for k in ("mergers", "splits")],
        reports=[(n, _rows(r)) for n, r in run["results"].items() if n != "evaluate"],
        largest=run["results"].get("stitch", {}).get("largest", []),
    )
    write_atomic(out_html, html.encode())


def write_snapshot(
    config: Config, out_png: Path, at: Sequence[int] | None = None, most: int = MAX_IN_PLANE
) -> str:
    """Draw raw, fragments, segmentation and truth of a run side by side.

    The picture is centred at, and marks, the voxel `at` (z, y, x), by default the middle, and has
    at most `most` voxels along y and x. The folder of the file must exist.

    Returns
    -------
    str
        The place `at`, in voxels and world units; "the middle" without one.

    Raises
    ------
    InputError
        If an input cannot be opened, the run has no labels yet, or the place is outside.
    """
    volumes = _volumes(config)
    if config.input.raw is not None and "raw" not in volumes:
        raise InputError("input.raw: a snapshot shows it, and it cannot be opened")
    snapshot(
        out_png,
        volumes.get("raw"),
        volumes.get("segmentation"),
        truth=volumes.get("truth"),
        fragments=volumes.get("fragments"),
        at=at,
        most=most,
    )
    if at is None:
        return "the middle"
    # Of the raw volume, or of the labels where there is none.
    first = next(iter(volumes.values()))
    return show_voxel(at, first.voxel_size, first.unit, first.offset)


def _volumes(config: Config) -> dict[str, Volume]:
    layers = config_layers(config)
    return {layer.name: layer.data.volume for layer in layers if isinstance(layer.data, LazyVolume)}


def _pictures(config: Config, evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """Draw the middle and the worst mergers; nothing if the raw data cannot be opened."""
    try:
        volumes = _volumes(config)
    except InputError:
        return []
    first = next(iter(volumes.values()), None)
    if first is None or (config.input.raw is not None and "raw" not in volumes):
        return []
    spots: list[tuple[str, Triple | None]] = [("Snapshot", None)]
    for item in evaluation.get("worst_mergers", [])[:_MAX_SPOTS]:
        # Of the second largest part: in the largest, the segment is right.
        parts = item["largest"]
        place = voxel_at(parts[min(1, len(parts) - 1)]["at"], first.voxel_size, first.offset)
        where = show_voxel(place, first.voxel_size, first.unit, first.offset)
        spots.append((f"Merger of segment {item['label']}, {where}", place))
    pictures = []
    with tempfile.TemporaryDirectory() as folder:
        for title, at in spots:
            file = Path(folder) / "picture.png"
            try:
                write_snapshot(config, file, at, MAX_IN_PLANE if at is None else _SPOT_VOXELS)
            except InputError:
                continue
            pictures.append((title, _base64(file.read_bytes())))
    return pictures


def _show_place(grid: dict[str, Any] | None, unit: str, world: Sequence[int]) -> str:
    """Write the place of an error in voxels of the run and in world units."""
    if grid is None:
        return f"{commas(world)} {unit}"
    size, origin = grid["voxel_size"], grid["offset"]
    return show_voxel(voxel_at(world, size, origin), size, unit, origin)


def _block_map(view: RunView, run: dict[str, Any]) -> str:
    """Draw up to `_MAX_LAYERS` layers along z, evenly chosen, coloured by state."""
    layers = np.unique(np.linspace(0, run["blocks"][0] - 1, _MAX_LAYERS).round().astype(int))
    columns = min(len(layers), 4)
    rows = -(-len(layers) // columns)
    ratio = run["blocks"][1] / run["blocks"][2]
    figure = _figure(11, max(1.4, min(2.6 * ratio, 4.0)) * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in axes:
        panel.set_axis_off()
    for panel, index in zip(axes, layers, strict=False):
        cells = view.image("state", 0, int(index)).cells
        panel.imshow(cells, cmap=ListedColormap(_COLOURS), vmin=0, vmax=5, interpolation="nearest")
        panel.set_title(f"z layer {index + 1} of {run['blocks'][0]}", fontsize=9)
    keys = [
        Patch(color=colour, label=f"{name} {count:,}")
        for name, colour, count in zip(STATES, _COLOURS, run["states"], strict=True)
        if count
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return _base64(figure_png(figure))


def _plots(rows: npt.NDArray[Any], history: dict[str, Any]) -> list[tuple[str, str]]:
    done = rows[rows["rank"] == BlockState.DONE]
    if not done.size:
        return []
    figure = _figure(11, 2.4)
    axes = figure.subplots()
    minutes = (np.arange(len(history["blocks_per_s"])) + 0.5) * history["seconds"] / 60
    width = history["seconds"] / 60
    axes.bar(minutes, history["blocks_per_s"], width=width, color=_BLUE)
    axes.set(xlabel="minutes since the stage was started", ylabel="blocks/s")
    speed = _base64(figure_png(figure))
    figure = _figure(11, 2.4)
    panels = (
        ("labels per block", done["labels"]),
        ("dropped queries per block", done["dropped"]),
        ("seconds per block", done["finished"] - done["started"]),
    )
    for axes, (title, values) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.hist(values, bins=40, color=_BLUE)
        axes.set(xlabel=title, ylabel="blocks")
    return [("Speed", speed), ("Blocks", _base64(figure_png(figure)))]


def _value(row: dict[str, Any], which: str) -> str:
    return "" if row[which] is None else measure(row["name"], row[which])


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
        for name, value in report.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
