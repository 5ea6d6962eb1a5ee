"""A picture of a result: raw, segments over raw and ground truth, in the plane and across sections.

It reads one plane (z) and one cross-section (y) of each volume, at most a few million voxels of a
volume of any size. Volumes with different offsets are placed by their world units.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from funlib.geometry import Coordinate, Roi
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from agq.blockwise.storage.files import write_atomic
from agq.blockwise.volumes.open import Volume
from agq.errors import InputError

MAX_IN_PLANE = 1024
"""Voxels shown along y and x at most, around the given place."""
MAX_SECTIONS = 256
_PANEL_INCHES, _DPI = 4.4, 160
_OPACITY = 0.5
_UNITS_PER_MICROMETRE = {"nm": 1e3, "angstrom": 1e4, "pm": 1e6}


def colours(ids: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return a colour per id that is the same in every picture: float64 (..., 3) in [0, 1].

    Hue, saturation and brightness come from a hash of the id (the finalizer of splitmix64).
    """
    h = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    h ^= h >> np.uint64(31)
    parts = [((h >> np.uint64(shift)) & np.uint64(0xFFFF)) / 65535.0 for shift in (0, 16, 32)]
    return hsv_to_rgb(np.stack([parts[0], 0.55 + 0.45 * parts[1], 0.75 + 0.25 * parts[2]], -1))


def snapshot(
    out_png: Path,
    raw: Volume | None,
    segmentation: Volume | None,
    truth: Volume | None = None,
    fragments: Volume | None = None,
    *,
    at: Sequence[int] | None = None,
    most: int = MAX_IN_PLANE,
) -> None:
    """Draw the same place of raw, fragments, segmentation and truth side by side.

    Parameters
    ----------
    out_png
        File to write; its folder must exist.
    raw
        Grey values (z, y, x); None: labels are drawn on black.
    segmentation, truth, fragments
        Labels (z, y, x) of the raw volume's voxel size; they may cover only a part of it. A truth
        object and a segment that are each other's largest overlap get one colour.
    at
        Voxel (z, y, x) of the first of these volumes to show; by default the middle of the
        segmentation, or of the fragments if there is no segmentation yet. A given place is marked.
    most
        Voxels shown along y and x at most.

    Raises
    ------
    InputError
        If voxel sizes differ, the place is outside the first volume, or no labels are given.
    """
    labels = segmentation or fragments
    if labels is None:
        raise InputError("picture: the run has no fragments and no segmentation yet")
    panels = {"raw": raw, "fragments": fragments, "segmentation": segmentation}
    volumes = {t: v for t, v in (panels | {"ground truth": truth}).items() if v is not None}
    base_title, base = next(iter(volumes.items()))
    for title, volume in volumes.items():
        if volume.voxel_size != base.voxel_size or volume.unit != base.unit:
            raise InputError(
                f"picture: the voxel size of the {title}, {tuple(volume.voxel_size)} "
                f"{volume.unit}, is not that of the {base_title}, {tuple(base.voxel_size)} "
                f"{base.unit}"
            )
    planes = _planes(base, labels, at, most)
    images = [{t: plane.read(volume) for t, volume in volumes.items()} for plane in planes]
    palette = _palettes(images)
    figure, grid = _figure(list(volumes), planes)
    for axes_of_row, plane, row in zip(grid, planes, images, strict=True):
        backdrop = stretched(row["raw"] if "raw" in row else np.zeros_like(row[base_title]))
        for axes, title in zip(axes_of_row, volumes, strict=True):
            image = backdrop
            if title != "raw":
                image = _overlay(backdrop, row[title], palette[title])
            axes.imshow(image, extent=plane.extent, aspect="equal", interpolation="nearest")
            if at is not None:
                _mark(axes, plane, base.offset + (Coordinate(at) * 2 + 1) * base.voxel_size / 2)
        _scale_bar(axes_of_row[0], plane, base.unit)
    write_atomic(out_png, figure_png(figure))


def figure_png(figure: Figure) -> bytes:
    """Return a figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _figure(titles: Sequence[str], planes: Sequence[Plane]) -> tuple[Figure, Any]:
    """Make a figure with a row of axes for each plane and a column for each title."""
    ratios = [plane.height / plane.width for plane in planes]
    height = _PANEL_INCHES * sum(ratios) + 0.45
    figure = Figure((_PANEL_INCHES * len(titles), height), dpi=_DPI, facecolor="white")
    grid = figure.subplots(len(planes), len(titles), squeeze=False, height_ratios=ratios)
    figure.subplots_adjust(
        left=0.004, right=0.996, bottom=0.008, top=1 - 0.33 / height, wspace=0.015, hspace=0.03
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=11)
    return figure, grid


@dataclass(frozen=True)
class Plane:
    """A flat box of the world, one voxel thick on ``axis``."""

    roi: Roi
    voxel_size: Coordinate
    axis: int
    name: str

    @property
    def height(self) -> int:
        """World units along the rows."""
        return int(self.roi.shape[0 if self.axis == 1 else 1])

    @property
    def width(self) -> int:
        """World units along the columns."""
        return int(self.roi.shape[2])

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top, as matplotlib takes them."""
        return (0.0, self.width, self.height, 0.0)

    def read(self, volume: Volume) -> npt.NDArray[Any]:
        """Read the plane as a 2-D image; 0 outside the volume."""
        shape = tuple(int(n) for n in self.roi.shape / self.voxel_size)
        image = np.zeros(shape, volume.dtype)
        # Volumes off the raw volume's voxel grid are shown at the nearest voxel.
        first = [
            round((a - b) / v)
            for a, b, v in zip(self.roi.begin, volume.offset, self.voxel_size, strict=True)
        ]
        low = [max(0, f) for f in first]
        high = [min(n, f + s) for n, f, s in zip(volume.shape, first, shape, strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            inside = tuple(slice(a - f, b - f) for a, b, f in zip(low, high, first, strict=True))
            image[inside] = volume.read(low, high)
        return image.take(0, self.axis)


def _planes(
    base: Volume, segmentation: Volume, at: Sequence[int] | None, in_plane: int = MAX_IN_PLANE
) -> list[Plane]:
    size = base.voxel_size
    common = base.roi.intersect(segmentation.roi)
    if common.empty:
        raise InputError(
            "picture: the segmentation does not overlap the raw volume; check offset and voxel_size"
        )
    if at is None:
        middle = (common.center - base.offset) / size
    else:
        middle = Coordinate(int(v) for v in at)
        if any(not 0 <= m < n for m, n in zip(middle, base.shape, strict=True)):
            raise InputError(f"picture: voxel {tuple(at)} is outside the volume {base.shape}")
        if not common.contains(base.offset + middle * size):
            common = base.roi
    first = (common.begin - base.offset) / size
    stop = (common.end - base.offset) / size
    low, high = [], []
    for m, a, b, most in zip(middle, first, stop, (MAX_SECTIONS, in_plane, in_plane), strict=True):
        begin = int(max(a, min(m - most // 2, b - most)))
        low.append(begin)
        high.append(int(min(b, begin + most)))
    planes = []
    for axis, name in ((0, "xy"), (1, "xz")):
        corner, end = list(low), list(high)
        corner[axis], end[axis] = int(middle[axis]), int(middle[axis]) + 1
        extent = Coordinate(end) - Coordinate(corner)
        roi = Roi(base.offset + Coordinate(corner) * size, extent * size)
        planes.append(Plane(roi, size, axis, name))
    return planes


def stretched(grey: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return grey values between their 0.5 and 99.5 percentiles as RGB in [0, 1]."""
    values = np.nan_to_num(grey.astype(np.float64))
    low, high = np.percentile(values, (0.5, 99.5))
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return np.repeat(scaled[..., None], 3, axis=2)


def at_borders(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Tell which pixels of an image touch one of another label, above, below or beside them."""
    border = np.zeros(labels.shape, np.bool_)
    for here, there, marked in (
        (labels[1:], labels[:-1], (border[1:], border[:-1])),
        (labels[:, 1:], labels[:, :-1], (border[:, 1:], border[:, :-1])),
    ):
        for side in marked:
            side |= here != there
    return border


def _palettes(images: list[dict[str, npt.NDArray[Any]]]) -> dict[str, dict[int, Any]]:
    """Return the colours of the ids of each panel in all planes."""
    flat = {title: np.concatenate([i[title].ravel() for i in images]) for title in images[0]}
    palette = {}
    for title, labels in flat.items():
        if title != "raw":
            ids = np.unique(labels)
            palette[title] = dict(zip((int(i) for i in ids), colours(ids), strict=True))
    if "ground truth" in flat and "segmentation" in flat:
        _match(flat["ground truth"], flat["segmentation"], palette)
    return palette


def _match(truth: Any, segmentation: Any, palette: dict[str, dict[int, Any]]) -> None:
    """Give each truth object the colour of its segment if they are each other's largest."""
    t, t_index = np.unique(truth, return_inverse=True)
    s, s_index = np.unique(segmentation, return_inverse=True)
    pair, count = np.unique(t_index * len(s) + s_index, return_counts=True)
    rows, columns = pair // len(s), pair % len(s)
    order = np.argsort(count, kind="stable")[::-1]
    order = order[(t[rows[order]] != 0) & (s[columns[order]] != 0)]
    taken_rows: set[int] = set()
    taken_columns: set[int] = set()
    for k in order:
        row, column = int(rows[k]), int(columns[k])
        if row not in taken_rows and column not in taken_columns:
            palette["ground truth"][int(t[row])] = palette["segmentation"][int(s[column])]
        taken_rows.add(row)
        taken_columns.add(column)


def _overlay(backdrop: Any, labels: npt.NDArray[Any], palette: dict[int, Any]) -> Any:
    """Return colours over grey, stronger along the borders of segments; nothing over label 0."""
    ids, index = np.unique(labels, return_inverse=True)
    colour = np.array([palette[int(i)] for i in ids])[index.reshape(labels.shape)]
    opacity = np.where(at_borders(labels), 0.95, _OPACITY) * (labels != 0)
    return backdrop * (1 - opacity[..., None]) + colour * opacity[..., None]


def _mark(axes: Axes, plane: Plane, place: Coordinate) -> None:
    """Circle a world position."""
    y, x = (place - plane.roi.begin)[0 if plane.axis == 1 else 1], (place - plane.roi.begin)[2]
    axes.plot([x], [y], "o", ms=11, mfc="none", mec="black", mew=2.6)
    axes.plot([x], [y], "o", ms=11, mfc="none", mec="white", mew=1.2)


def _scale_bar(axes: Axes, plane: Plane, unit: str) -> None:
    """Draw a bar of a round length, about a fifth of the width, at the lower left."""
    per_micrometre = _UNITS_PER_MICROMETRE[unit]
    wanted = plane.width / 5 / per_micrometre
    power = 10.0 ** np.floor(np.log10(wanted))
    length = max(step * power for step in (1, 2, 5) if step * power <= wanted)
    text = f"{length:g} µm" if length >= 1 else f"{length * 1000:g} nm"
    inch = plane.width / _PANEL_INCHES
    x, y = 0.12 * inch, plane.height - 0.12 * inch
    bar = Rectangle((x, y), length * per_micrometre, -0.05 * inch, facecolor="white")
    bar.set_edgecolor("black")
    bar.set_linewidth(0.6)
    axes.add_patch(bar)
    label = axes.text(
        x, y - 0.09 * inch, f"{plane.name}  {text}", color="white", fontsize=8, va="bottom"
    )
    label.set_bbox({"facecolor": "black", "alpha": 0.45, "pad": 1.5, "linewidth": 0})
