"""Boxes and points over the volumes of a viewer: block borders, failed blocks, errors, suspects."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.reader import Journal
from agq.blockwise.volumes.placement import PER_NANOMETRE
from agq.blockwise.volumes.triples import show_voxel, voxel_at
from agq.errors import InputError
from agq.pipeline.folder import RunFolder
from agq.pipeline.suspects.listed import read_suspects

MAX_BOXES: Final = 2000
"""Borders are drawn for this many blocks nearest to the start position: the browser loads the
state of a viewer as a whole."""

MAX_POINTS: Final = 1000


@dataclass(frozen=True)
class Marks:
    """One layer of boxes or points.

    Attributes
    ----------
    colour
        CSS colour.
    voxel_size
        Nanometres per unit of the coordinates, (z, y, x).
    items
        (description, corners): one corner (a point) or two (a box), in voxels of the world,
        (z, y, x).
    visible
        Whether the layer is switched on at first.
    """

    name: str
    colour: str
    voxel_size: tuple[float, ...]
    items: tuple[tuple[str, tuple[tuple[float, ...], ...]], ...]
    visible: bool = True


def run_marks(run: RunFolder, unit: str, at: Sequence[int] | None = None) -> list[Marks]:
    """Return the marks of a run: borders of blocks, failed blocks, mergers and splits.

    Without a run in the folder there are none. `at` is the voxel (z, y, x) that the viewer starts
    at; default the middle of the volume.
    """
    try:
        record, grid = run.record(), run.grid()
    except InputError:
        return []
    size = tuple(float(v) / PER_NANOMETRE[unit] for v in grid.voxel_size)
    marks = [_blocks(grid, size, at), _failed(run, grid, size)]
    report = record["stages"].get("evaluate", {}).get("report") or {}
    for name, colour in (("mergers", "#ff4d4d"), ("splits", "#ffd24d")):
        items = []
        for error in report.get(f"worst_{name}", ()):
            for part in error["largest"]:
                voxel = voxel_at(part["at"], grid.voxel_size, grid.offset)
                place = show_voxel(voxel, grid.voxel_size, unit, grid.offset)
                text = f"{name[:-1]} {error['label']} ({error['bits']:.4f} bits): {part['label']}"
                corner = [w / v + 0.5 for w, v in zip(part["at"], grid.voxel_size, strict=True)]
                items.append((f"{text}, {place}", (tuple(corner),)))
        marks.append(Marks(name, colour, size, tuple(items[:MAX_POINTS])))
    marks += _suspects(run, grid, size, unit)
    return [layer for layer in marks if layer.items]


def _suspects(run: RunFolder, grid: BlockGrid, size: tuple[float, ...], unit: str) -> list[Marks]:
    """Mark what `agq suspects` has listed, a layer for each kind."""
    rows = read_suspects(run.path)
    corner = [o / v + 0.5 for o, v in zip(grid.offset, grid.voxel_size, strict=True)]
    layers = []
    for kind, colour in (("merge", "#ff9a4d"), ("split", "#4dffd2")):
        items = []
        for row in rows:
            if row["kind"] == kind:
                voxel = [row[axis] for axis in "zyx"]
                place = show_voxel(voxel, grid.voxel_size, unit, grid.offset)
                text = f"{row['rank']}: p {row['probability']:.2f}, {row['why']}, {place}"
                at = tuple(c + v for c, v in zip(corner, voxel, strict=True))
                items.append((text, (at,)))
        layers.append(Marks(f"suspect {kind}s", colour, size, tuple(items)))
    return layers


def _blocks(grid: BlockGrid, size: tuple[float, ...], at: Sequence[int] | None) -> Marks:
    """Mark the blocks around a voxel with boxes."""
    middle = [n // 2 for n in grid.volume_shape] if at is None else list(at)
    # From a voxel outside the grid the window would never be whole.
    home = np.array(
        [
            min(max(m // w, 0), n - 1)
            for m, w, n in zip(middle, grid.write_shape, grid.shape, strict=True)
        ]
    )
    # Widen a window of blocks around the home block until it would hold too many.
    reach = 0
    low = high = home
    while True:
        wider_low = np.maximum(home - reach, 0)
        wider_high = np.minimum(home + reach + 1, grid.shape)
        if np.prod(wider_high - wider_low) > MAX_BOXES:
            break
        low, high = wider_low, wider_high
        if (low == 0).all() and (high == np.array(grid.shape)).all():
            break
        reach += 1
    items = []
    for index in np.ndindex(*(high - low).tolist()):
        number = grid.number([int(a + b) for a, b in zip(low, index, strict=True)])
        items.append((f"block {number}", _corners(grid, number)))
    everything = len(items) == grid.n_blocks
    name = "blocks" if everything else f"blocks (nearest {len(items)})"
    return Marks(name, "#8fd3ff", size, tuple(items), visible=False)


def _failed(run: RunFolder, grid: BlockGrid, size: tuple[float, ...]) -> Marks:
    items = []
    for record in Journal(run.journal("predict")).failed(MAX_POINTS):
        if record.block >= grid.n_blocks:
            continue
        low, high = _corners(grid, record.block)
        middle = tuple((a + b) / 2 for a, b in zip(low, high, strict=True))
        text = f"block {record.block}: {record.summary}"
        items.append((text, (middle,)))
    return Marks("failed blocks", "#ff00ff", size, tuple(items))


def _corners(grid: BlockGrid, number: int) -> tuple[tuple[float, ...], ...]:
    place = [o / v for o, v in zip(grid.offset, grid.voxel_size, strict=True)]
    return tuple(
        tuple(p + c for p, c in zip(place, corner, strict=True))
        for corner in grid.write_box(number)
    )
