"""Specification and report of a stitch."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from agq.blockwise.blocks.spec import GridSpec
from agq.blockwise.journal.records import BlockState
from agq.blockwise.journal.writer import Journal
from agq.blockwise.stitch.settings import Downsampling, MergeSettings, Thresholds
from agq.blockwise.stitch.steps import Step
from agq.errors import InputError
from agq.tables import Tabled

if TYPE_CHECKING:
    from rich.text import Text

_NAMED = 10  # blocks listed in an error


class StitchSpec(MergeSettings, GridSpec):
    """Fragments to stitch, and how; goes to JSON and back."""

    run_dir: Path
    """Run folder, after predict."""

    start: tuple[int, int, int] | None = None
    """First voxel (z, y, x) of a box: its blocks are stitched. None: the whole volume."""

    stop: tuple[int, int, int] | None = None
    """One past the last voxel of that box."""

    levels: PositiveInt | None = None
    """Most levels of the pyramid, the full one included; None: down to one chunk."""

    downsampling: Downsampling = "majority"
    """How its coarse voxels are chosen (`stitch.output.pyramid`)."""

    batch_blocks: PositiveInt = 512
    """Most blocks per task. The result does not depend on it."""

    def thresholds(self, margin: float | None = None) -> Thresholds:
        """Return the rule for merging, at the margin of this stitch or at another.

        Raises
        ------
        InputError
            If overlaps are asked for and blocks do not overlap.
        """
        if self.evidence != "affinity":
            grid = self.block_grid()
            for axis, blocks in zip("zyx", range(3), strict=True):
                if grid.shape[blocks] > 1 and not grid.before[blocks] + grid.after[blocks]:
                    raise InputError(
                        f"stitch.evidence: {self.evidence} needs blocks that overlap, but these"
                        f" have no context on {axis} (blocks.before, blocks.after); use affinity"
                    )
        values = self.model_dump(include=set(Thresholds.model_fields))
        return Thresholds(**values | ({} if margin is None else {"margin": margin}))


@dataclass
class StitchReport(Tabled):
    """Counts and times of a stitch.

    Attributes
    ----------
    blocks, skipped, missing
        Blocks with fragments, blocks skipped by predict, and blocks left out because they failed
        or were never done (only with ``allow_missing``).
    fragments, contacts, merges, segments
        Counts; contacts are distinct pairs of fragments.
    small_segments, small_voxels
        Segments below ``min_size``, now background.
    largest
        The largest segments: ``id``, ``voxels``, ``fragments``. A merger shows here first.
    levels
        Levels of the pyramid.
    seconds
        Wall time of each step.
    reused
        Steps whose output existed already.
    """

    blocks: int = 0
    skipped: int = 0
    missing: int = 0
    fragments: int = 0
    contacts: int = 0
    merges: int = 0
    segments: int = 0
    small_segments: int = 0
    small_voxels: int = 0
    largest: list[dict[str, int]] = field(default_factory=list)
    levels: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    def end(self, step: Step) -> None:
        """Note that a step is over."""
        self.seconds[step.name] = round(time.monotonic() - step.begun, 3)
        if step.reused:
            self.reused.append(step.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return asdict(self)

    def facts(self) -> list[tuple[str, str]]:
        """Return the counts by name; a merger shows among the largest segments first."""
        rows = [
            ("fragments", f"{self.fragments:,} in {self.blocks:,} blocks"),
            ("segments", f"{self.segments:,} after {self.merges:,} merges"),
        ]
        if self.small_segments:
            small = f"{self.small_segments:,} of {self.small_voxels:,} voxels, now background"
            rows.append(("small segments", small))
        if self.missing:
            rows.append(("missing blocks", f"{self.missing:,} (background)"))
        largest = "\n".join(
            f"{s['id']}: {s['voxels']:,} voxels, {s['fragments']:,} fragment"
            + "s" * (s["fragments"] > 1)
            for s in self.largest
        )
        return [*rows, ("largest", largest)]

    def table(self, segmentation: Path | None = None) -> Text:
        """Return the report for a rich console, with the place of the segmentation if given."""
        from agq.terminal import facts

        rows, title = self.facts(), "Stitch"
        if self.reused:
            rows.append(("kept from before", ", ".join(self.reused)))
        if segmentation is not None:
            rows.append(("segmentation", str(segmentation)))
            title += f" of {segmentation.parents[1].name}"
        return facts(title, rows)


def find_blocks(spec: StitchSpec) -> tuple[NDArray[np.int64], NDArray[np.uint8], Journal]:
    """Find the blocks of the ROI and how their prediction ended.

    Quick, and without dask: callers check with it whether a cluster is worth starting.

    Returns
    -------
    selected
        Block numbers, int64.
    ranks
        State of each, as in :class:`agq.blockwise.journal.records.BlockState`.
    journal
        Of the prediction, as read.

    Raises
    ------
    InputError
        If the ROI holds no block, the journal is another grid's, or blocks failed or are missing
        and the spec does not allow that.
    """
    grid = spec.block_grid()
    selected = grid.select(spec.start or (0, 0, 0), spec.stop or grid.volume_shape)
    if not len(selected):
        raise InputError("stitch: the ROI holds no block of the volume")
    journal = Journal(spec.run_dir / "journal" / "predict")
    journal.require_grid(grid.n_blocks)
    ranks = journal.ranks(selected)
    bad = selected[ranks < BlockState.SKIPPED]
    if len(bad) and not spec.allow_missing:
        failed = int((ranks == BlockState.FAILED).sum())
        named = ", ".join(str(number) for number in bad[:_NAMED])
        raise InputError(
            f"stitch: of {len(selected)} blocks {failed} failed and {len(bad) - failed} are"
            f" missing (block {named}{', ...' if len(bad) > _NAMED else ''}): predict again,"
            " or leave them background with --allow-missing"
        )
    return selected, ranks, journal
