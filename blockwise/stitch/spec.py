"""What a stitch is asked to do, and what it reports."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from agq.blockwise.blocks.spec import GridSpec
from agq.blockwise.journal.records import STATE_RANK
from agq.blockwise.journal.writer import Journal
from agq.blockwise.stitch.merge.rule import Thresholds
from agq.blockwise.stitch.settings import Downsampling, MergeSettings
from agq.blockwise.stitch.steps import Step
from agq.errors import InputError
from agq.tables import Tabled

if TYPE_CHECKING:
    from rich.table import Table

_NAMED = 10  # blocks listed in an error


class StitchSpec(MergeSettings, GridSpec):
    """What to stitch; JSON round trip."""

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
        return Thresholds(
            self.across,
            self.within,
            self.evidence,
            self.overlap,
            self.min_contact,
            self.margin if margin is None else margin,
        )


@dataclass
class StitchReport(Tabled):
    """What the stitch made.

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
        Steps whose output was there already.
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

    def largest_lines(self) -> str:
        """Return the largest segments, with the number of their fragments, one a line."""
        return "\n".join(
            f"{s['id']}: {s['voxels']:,} voxels, {s['fragments']:,} fragment"
            + "s" * (s["fragments"] > 1)
            for s in self.largest
        )

    def table(self, segmentation: Path | None = None) -> Table:
        """Return what the stitch made, for a rich console.

        Parameters
        ----------
        segmentation
            Where it is; None leaves that out.
        """
        from rich.markup import escape
        from rich.table import Table

        name = "" if segmentation is None else f" of {escape(segmentation.parents[1].name)}"
        table = Table(title=f"Stitch{name}", show_header=False, title_justify="left")
        table.add_row("fragments", f"{self.fragments:,} in {self.blocks:,} blocks")
        table.add_row("segments", f"{self.segments:,} after {self.merges:,} merges")
        if self.small_segments:
            small = f"{self.small_segments:,} of {self.small_voxels:,} voxels, now background"
            table.add_row("small segments", small)
        if self.missing:
            table.add_row("missing blocks", f"{self.missing:,} (background)")
        table.add_row("largest", self.largest_lines())
        if self.reused:
            table.add_row("kept from before", ", ".join(self.reused))
        if segmentation is not None:
            table.add_row("segmentation", escape(str(segmentation)))
        return table


def find_blocks(spec: StitchSpec) -> tuple[NDArray[np.int64], NDArray[np.uint8], Journal]:
    """Find the blocks of the ROI and how their prediction ended.

    Quick, and without dask: call it before a cluster is started for nothing.

    Returns
    -------
    selected
        Block numbers, int64.
    ranks
        State of each, as in :data:`agq.blockwise.journal.records.STATE_RANK`.
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
    bad = selected[ranks < STATE_RANK["skipped"]]
    if len(bad) and not spec.allow_missing:
        failed = int((ranks == STATE_RANK["failed"]).sum())
        named = ", ".join(str(number) for number in bad[:_NAMED])
        raise InputError(
            f"stitch: of {len(selected)} blocks {failed} failed and {len(bad) - failed} are"
            f" missing (block {named}{', ...' if len(bad) > _NAMED else ''}): predict again,"
            " or leave them background with --allow-missing"
        )
    return selected, ranks, journal
