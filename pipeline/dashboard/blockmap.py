"""The block grid of a run as small images: a cell shows one block, or several of a large grid.

It works on columns of all blocks (one or four bytes each): an image of 10^6 blocks takes a few
milliseconds.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.records import BlockState
from agq.blockwise.volumes.triples import Triple

By = Literal["state", "seconds", "labels", "dropped"]

STATES: Final = ("outside", "skipped", "done", "waiting", "running", "failed")
"""Name of each state code. A cell of several blocks shows the largest code, so that a failed block
is never hidden by done ones."""

OUTSIDE, SKIPPED, DONE, WAITING, RUNNING, FAILED = range(6)

MAX_CELLS: Final = 512
"""Cells on each side of an image at most."""

_CODE_OF_RANK: Final = np.array([WAITING, FAILED, SKIPPED, DONE], np.uint8)


@dataclass(frozen=True)
class MapImage:
    """A picture of one layer of blocks.

    Attributes
    ----------
    cells
        Uint8 (rows, columns). By state: the codes of `STATES`. By a value: 1 (``low``) to 255
        (``high``), 0 without a value.
    step
        Blocks per cell along each side.
    blocks
        Blocks along rows and columns.
    index
        The layer.
    low, high
        Values at the two ends of the colours; None by state.
    """

    cells: npt.NDArray[np.uint8]
    step: int
    blocks: tuple[int, int]
    index: int
    low: float | None = None
    high: float | None = None


def block_states(
    n_blocks: int,
    selected: npt.NDArray[np.int64] | None,
    rows: npt.NDArray[Any],
    running: npt.NDArray[np.int64],
) -> npt.NDArray[np.uint8]:
    """Return the state code of every block, uint8 (n_blocks,).

    Parameters
    ----------
    selected
        Numbers of the blocks of the run; None for all.
    rows
        Columns ``block`` and ``rank`` of the blocks that have ended, as in the journal's table.
    """
    codes = np.full(n_blocks, WAITING if selected is None else OUTSIDE, np.uint8)
    if selected is not None:
        codes[selected] = WAITING
    inside = rows["block"] < n_blocks
    codes[rows["block"][inside]] = _CODE_OF_RANK[rows["rank"][inside]]
    codes[running[running < n_blocks]] = RUNNING
    return codes


def block_values(n_blocks: int, rows: npt.NDArray[Any], by: By) -> npt.NDArray[np.float32]:
    """Return a value of every done block, float32 (n_blocks,); NaN elsewhere.

    It is the ``seconds`` from begin to end, ``labels``, or ``dropped``.
    """
    values = np.full(n_blocks, np.nan, np.float32)
    done = rows[(rows["rank"] == BlockState.DONE) & (rows["block"] < n_blocks)]
    values[done["block"]] = done["finished"] - done["started"] if by == "seconds" else done[by]
    return values


def layer_to_show(grid: BlockGrid, codes: npt.NDArray[np.uint8], axis: int) -> int:
    """Return the layer along an axis in which most happens.

    It is the one with the most running blocks; without any, with the most failed ones, then done,
    waiting, skipped ones; of equals the nearest to the middle.
    """
    blocks = codes.reshape(grid.shape)
    others = tuple(other for other in range(3) if other != axis)
    middle = np.abs(np.arange(grid.shape[axis]) - grid.shape[axis] // 2)
    for code in (RUNNING, FAILED, DONE, WAITING, SKIPPED):
        count = np.count_nonzero(blocks == code, axis=others)
        if count.any():
            return int(np.lexsort((middle, -count))[0])
    return grid.shape[axis] // 2


def layer(
    grid: BlockGrid, column: npt.NDArray[Any], axis: int, index: int
) -> tuple[npt.NDArray[Any], int]:
    """Cut block `index` along `axis` (0 z, 1 y, 2 x) out of a column with a number per block.

    Returns
    -------
    cells, step
        Array of the other two axes in order, at most `MAX_CELLS` a side, and the blocks per cell
        along each; of a cell's blocks the largest number is kept.
    """
    plane = column.reshape(grid.shape).take(index, axis)
    step = -(-max(plane.shape) // MAX_CELLS)
    if step > 1:
        for side in (0, 1):
            starts = np.arange(0, plane.shape[side], step)
            plane = np.fmax.reduceat(plane, starts, axis=side)
    return plane, step


def state_image(grid: BlockGrid, codes: npt.NDArray[np.uint8], axis: int, index: int) -> MapImage:
    """Draw the states of one layer of blocks."""
    cells, step = layer(grid, codes, axis, index)
    return MapImage(np.ascontiguousarray(cells), step, _sides(grid, axis), index)


def value_image(
    grid: BlockGrid, values: npt.NDArray[np.float32], axis: int, index: int
) -> MapImage:
    """Draw the values of one layer of blocks; colours span the 1st to 99th percentile of all."""
    measured = values[~np.isnan(values)]
    # A sample is enough for the ends of a colour scale, and keeps 10^7 blocks quick.
    sample = measured[:: max(1, measured.size // 100_000)]
    low, high = (float(v) for v in np.percentile(sample, (1, 99))) if sample.size else (0.0, 1.0)
    cells, step = layer(grid, values, axis, index)
    scaled = np.clip((cells - low) / max(high - low, 1e-9), 0, 1) * 254 + 1
    image = np.where(np.isnan(cells), 0, np.nan_to_num(scaled)).astype(np.uint8)
    return MapImage(image, step, _sides(grid, axis), index, low, high)


def block_in_cell(
    grid: BlockGrid, codes: npt.NDArray[np.uint8], at: Triple, axis: int, step: int
) -> int:
    """Return the number of the block that a cell shows: the one with its largest state code.

    The cell is named by the index (z, y, x) of its first block.

    Raises
    ------
    IndexError
        If the grid has no such block.
    """
    grid.number(at)
    ranges = [
        np.arange(i, min(n, i + (1 if a == axis else step)))
        for a, (i, n) in enumerate(zip(at, grid.shape, strict=True))
    ]
    z, y, x = np.ix_(*ranges)
    numbers = ((z * grid.shape[1] + y) * grid.shape[2] + x).ravel()
    return int(numbers[int(np.argmax(codes[numbers]))])


def _sides(grid: BlockGrid, axis: int) -> tuple[int, int]:
    rows, columns = (n for a, n in enumerate(grid.shape) if a != axis)
    return rows, columns
