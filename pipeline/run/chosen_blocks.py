"""Blocks that a user names, by number or by a box of voxels, to compute them again."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.text import Text

from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockState
from agq.blockwise.volumes.triples import Box
from agq.errors import InputError
from agq.pipeline.run.prepare import Prepared
from agq.tables import Tabled
from agq.terminal import facts

_NAMED = 20
"""Blocks listed in a table."""


def choose_blocks(
    prepared: Prepared, blocks: Iterable[int] | None, roi: Box | None
) -> npt.NDArray[np.int64]:
    """Return the blocks that are named, or write a voxel of a box; ascending.

    Parameters
    ----------
    prepared
        The checked run.
    blocks
        Block numbers.
    roi
        First voxel and one past the last, (z, y, x).

    Raises
    ------
    InputError
        If a block lies outside the volume or the run's ROI, or none is left.
    """
    grid = prepared.grid
    numbers = np.unique(np.fromiter(blocks or (), np.int64))
    outside = numbers[(numbers < 0) | (numbers >= grid.n_blocks)]
    if outside.size:
        raise InputError(
            f"blocks: the volume has blocks 0 to {grid.n_blocks - 1}, and no block {outside[0]}"
        )
    if roi is not None:
        numbers = np.union1d(numbers, grid.select(*roi))
    if not numbers.size:
        raise InputError("roi: the box holds no voxel of the volume")
    beyond = np.setdiff1d(numbers, prepared.selected, assume_unique=True)
    if beyond.size:
        raise InputError(f"blocks: block {beyond[0]} lies outside input.roi; widen input.roi first")
    return numbers


@dataclass(frozen=True)
class ChosenBlocks(Tabled):
    """What computing some blocks again would take back.

    Attributes
    ----------
    run_dir
        The run folder.
    numbers
        Block numbers.
    states
        State of each, as `BlockState`.
    """

    run_dir: Path
    numbers: npt.NDArray[np.int64]
    states: npt.NDArray[np.uint8]

    @classmethod
    def look_up(cls, prepared: Prepared, numbers: npt.NDArray[np.int64]) -> "ChosenBlocks":
        """Read the states of some blocks; a run that was never started has none."""
        if prepared.run.exists():
            prepared.run.require_identity(prepared.identity)
        journal = Journal(prepared.run.journal("predict"))
        return cls(prepared.run.path, numbers, journal.ranks(numbers))

    def table(self) -> Text:
        """Return counts and numbers for the terminal."""
        named = ", ".join(map(str, self.numbers[:_NAMED].tolist()))
        rows = [
            ("blocks", f"{self.numbers.size:,}"),
            *((f"  {s.word}", f"{int((self.states == s).sum()):,}") for s in BlockState),
            ("numbers", named + ", ..." * (self.numbers.size > _NAMED)),
        ]
        return facts(f"Would be computed again in {self.run_dir}", rows)
