"""Checks that what a run says it has written is there, and is what was written."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.reader import Journal
from agq.blockwise.verify.blocks import BlockOutputs, done_blocks
from agq.blockwise.verify.report import Check, Problem, VerifyReport
from agq.blockwise.verify.stitched import WrittenFile, damaged_markers, written_files
from agq.blockwise.volumes.boxes import unordered

_STAGES = ("predict", "relabel", "pyramid")

Item: TypeAlias = tuple[int, int] | WrittenFile
"""A block that is done, with the digest of its checksums; or a file of the stitch."""


def verify(
    folder: Path,
    grid: BlockGrid,
    *,
    affinities: bool,
    sample: float = 1.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Compare what is on disk with the checksums that journal and stitch have recorded.

    It may run beside a command that works on the run. Nothing is written.

    Parameters
    ----------
    folder, grid
        The run folder, and the blocks of the whole volume.
    affinities
        Whether the run keeps affinities.
    sample
        Share of the files whose contents are read, chosen at random; the others must be there.
    on_progress
        Called with items done, and items in all.

    Raises
    ------
    OSError
        If a file is there and may not be read.
    """
    report = VerifyReport(str(folder))
    outputs = BlockOutputs.open(folder, grid, affinities=affinities)
    markers = damaged_markers(folder)
    blocks, files = list(done_blocks(outputs.journal)), list(written_files(folder, grid))
    total = len(blocks) + len(files)
    chosen = (np.random.default_rng().random(total) < sample).tolist()
    items: list[tuple[bool, Item]] = list(zip(chosen, [*blocks, *files], strict=True))
    report.problems += [*(outputs.problems if blocks else []), *markers.values()]
    tell = on_progress or (lambda done, total: None)
    tell(0, total)
    checks = unordered(partial(_check, folder, outputs), items)
    for done, (contents, check) in enumerate(checks, 1):
        (report.checked if contents else report.present).update(check.compared)
        report.unrecorded.update(check.unrecorded)
        report.problems += check.problems
        tell(done, total)
    for stage in _STAGES:
        if garbage := Journal(folder / "journal" / stage).garbage:
            report.damaged_lines[stage] = garbage
    report.problems.sort(key=lambda problem: (problem.kind, problem.block or 0, problem.path))
    return report


def _check(folder: Path, outputs: BlockOutputs, item: tuple[bool, Item]) -> tuple[bool, Check]:
    contents, what = item
    if isinstance(what, WrittenFile):
        problem = what.problem(folder, contents=contents)
        problems = [Problem(what.kind, what.path, problem, what.block)] if problem else []
        if contents and what.recorded is None:
            return contents, Check([], [what.kind], problems)
        return contents, Check([what.kind], [], problems)
    number, digest = what
    return contents, outputs.check(number, digest, contents=contents)
