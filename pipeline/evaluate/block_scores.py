"""Scores of single blocks before stitching: what the network gets wrong, apart from the stitch.

A neurite that leaves a block and comes back is two objects to a network that sees the block only,
so the truth of a block is the connected pieces of its labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockState
from agq.blockwise.volumes.boxes import unordered
from agq.blockwise.volumes.open import Volume, open_volume
from agq.blockwise.volumes.triples import commas, middle
from agq.errors import InputError
from agq.pipeline.evaluate.contingency import BorderRule, Contingency
from agq.pipeline.evaluate.scores import LEGEND, SHORT, Scores
from agq.pipeline.folder import RunFolder
from agq.tables import Tabled
from agq.terminal import WholeTable

NUMBERS = ("voi_split", "voi_merge", "voi_sum", "adapted_rand_error")


@dataclass(frozen=True)
class BlockScore:
    """One block: number, first voxel, world position, voxels scored, scores as is and filled."""

    number: int
    at: tuple[int, ...]
    world: tuple[int, ...]
    voxels: int
    as_is: Scores
    filled: Scores

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON types."""
        return {
            "block": self.number,
            "at": list(self.at),
            "world": list(self.world),
            "voxels": self.voxels,
            "as_is": self.as_is.to_dict(),
            "background_filled": self.filled.to_dict(),
        }


@dataclass(frozen=True)
class BlockReport(Tabled):
    """All blocks of a run, in the order of their numbers."""

    run: str
    unit: str
    blocks: list[BlockScore]

    def mean(self) -> dict[str, dict[str, float]]:
        """Return the mean of each figure over the blocks."""
        return {
            name: {
                key: float(np.mean([getattr(getattr(b, attribute), key) for b in self.blocks]))
                for key in NUMBERS
            }
            for name, attribute in (("as_is", "as_is"), ("background_filled", "filled"))
        }

    def worst(self, n: int = 5) -> list[BlockScore]:
        """Return the blocks of the largest variation of information, filled."""
        return sorted(self.blocks, key=lambda block: -block.filled.voi_sum)[:n]

    def table(self) -> WholeTable:
        """Return a table for a rich console."""
        table = WholeTable(
            f"{self.run}: {len(self.blocks)} blocks before stitching",
            ("block", "from voxel z,y,x", f"{self.unit} z,y,x", *SHORT),
            numbers=("block", *SHORT),
            legend=f"The mean, and the worst. {LEGEND}; predicted 0 is filled within the block",
        )
        mean = self.mean()["background_filled"]
        table.add_row("mean", "", "", *(f"{mean[key]:.4f}" for key in NUMBERS))
        for block in self.worst():
            where = (str(block.number), commas(block.at), commas(block.world))
            table.add_row(*where, *(f"{getattr(block.filled, key):.4f}" for key in NUMBERS))
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON types."""
        return {
            "mean": self.mean(),
            "worst": [block.to_dict() for block in self.worst()],
            "blocks": [block.to_dict() for block in self.blocks],
        }


def score_blocks(
    run: RunFolder,
    truth: Volume,
    *,
    ignore: BorderRule | None = None,
    client: Any = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> BlockReport:
    """Score the fragments of every done block of a run against the truth.

    Parameters
    ----------
    run
        A run with predictions.
    truth
        Ground truth, of the run's voxel size; blocks outside of it are left out.
    client
        A `distributed.Client`; None: threads.
    on_progress
        Called with (blocks done, blocks in all).

    Raises
    ------
    InputError
        If no done block has scored voxels.
    """
    grid = run.grid()
    fragments = open_volume(run.container, "fragments", kind="labels", unit=truth.unit)
    ranks = Journal(run.journal("predict")).ranks(np.arange(grid.n_blocks))
    numbers = np.flatnonzero(ranks == BlockState.DONE).tolist()
    rule = (ignore or BorderRule()).for_type(truth.dtype)
    task = partial(_score, fragments, truth, grid.to_dict(), rule)
    scores = []
    if on_progress is not None:
        on_progress(0, len(numbers))
    for done, score in enumerate(unordered(task, numbers, client=client), 1):
        if score is not None:
            scores.append(score)
        if on_progress is not None:
            on_progress(done, len(numbers))
    if not scores:
        raise InputError(f"{run.path}: no finished block has labelled voxels of {truth.name}")
    return BlockReport(run.path.name, truth.unit, sorted(scores, key=lambda score: score.number))


def _score(
    fragments: Volume, truth: Volume, grid: dict[str, Any], ignore: BorderRule, number: int
) -> BlockScore | None:
    blocks = BlockGrid.from_dict(grid)
    size, start = blocks.voxel_size, blocks.write_box(number)[0]
    common = blocks.write_roi(number).intersect(truth.roi)
    if common.empty:
        return None

    def read(volume: Volume) -> npt.NDArray[np.uint64]:
        low = (common.offset - volume.offset) / size
        return volume.read(low, low + common.shape / size).astype(np.uint64, copy=False)

    real, labels = ignore.labelled(read(truth)), read(fragments)
    compact = np.unique(real, return_inverse=True)[1].reshape(real.shape).astype(np.uint32)
    pieces = cc3d.connected_components(compact + np.uint32(real.min() > 0), connectivity=26)
    scored = ignore.clear(np.asarray(pieces).astype(np.uint64))
    filled = _fill(labels, tuple(int(v) for v in size))
    # Label 0 counts as one segment here, and a table leaves zeros out.
    one, two = (
        Scores.of(Contingency.of(scored, np.ascontiguousarray(segments) + np.uint64(1), number))
        for segments in (labels, filled)
    )
    if one is None or two is None:
        return None
    world = middle(start, size, blocks.offset)
    return BlockScore(number, start, world, int(np.count_nonzero(scored)), one, two)


def _fill(labels: npt.NDArray[np.uint64], size: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    if not labels.any() or labels.all():
        return labels
    nearest = ndimage.distance_transform_edt(
        labels == 0, sampling=size, return_distances=False, return_indices=True
    )
    filled: npt.NDArray[np.uint64] = labels[tuple(nearest)]
    return filled
