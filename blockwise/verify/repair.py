"""Takes back from "done" what is missing or damaged, so that the next run makes just that again.

Nothing that is right is removed: lines are added to journals, markers of stitch steps say that
they are not done, and damaged files that would otherwise be taken for good ones are deleted.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.packs import remove_unreadable
from agq.blockwise.journal.writer import take_back
from agq.blockwise.stitch.steps import Step
from agq.blockwise.verify.report import Problem
from agq.blockwise.verify.stitched import TABLES, pyramid_of

_REASON = "missing or damaged"
_OUTPUTS = ("fragments", "affinities", "sidecars")
_STEP_OF = {folder: step for step, folder in TABLES.items()}


def repair(folder: Path, grid: BlockGrid, problems: Sequence[Problem]) -> dict[str, int]:
    """Take back what has problems, and what was made of it block by block.

    No other process may work on the run.

    Parameters
    ----------
    folder, grid
        The run folder, and the blocks of the whole volume.
    problems
        As `verify` found them.

    Returns
    -------
    dict
        How many blocks, chunks and files the next run makes again.
    """
    taken: Counter[str] = Counter()
    blocks = {p.block for p in problems if p.kind in _OUTPUTS}
    relabelled = _whole_files(
        folder, grid, blocks | {p.block for p in problems if p.kind == "segmentation"}
    )
    chunks = {p.block for p in problems if p.kind == "pyramid"}
    journals = folder / "journal"
    taken["blocks"] = take_back(journals / "predict", _numbers(blocks), _REASON)
    if relabelled:
        taken["segmentation"] = take_back(journals / "relabel", _numbers(relabelled), _REASON)
        Step.take_back(folder, "relabel")
    if relabelled or chunks:
        numbers = _above(folder, grid, _numbers(relabelled), _numbers(chunks))
        taken["pyramid"] = take_back(journals / "pyramid", numbers, _REASON)
        Step.take_back(folder, "pyramid")
    for path in {p.path for p in problems if p.path.endswith(".agqp")}:
        remove_unreadable(folder / path)
    for problem in problems:
        if problem.kind in ("tables", "metadata"):
            taken["files"] += 1
            _remove(folder, problem.path)
    return {name: count for name, count in taken.items() if count}


def _numbers(numbers: set[int | None]) -> np.ndarray:
    return np.array(sorted(n for n in numbers if n is not None), np.int64)


def _whole_files(folder: Path, grid: BlockGrid, blocks: set[int | None]) -> set[int | None]:
    """Return the blocks that share a file of the segmentation with some."""
    if not blocks:
        return blocks
    pyramid = pyramid_of(folder, grid)
    index = np.array([grid.index(n) for n in _numbers(blocks).tolist()], np.int64)
    files = pyramid.shards_of(0, index)
    return {
        int(np.ravel_multi_index(chunk, grid.shape))
        for place in files.tolist()
        for chunk in pyramid.chunks_of(0, place)
    }


def _above(folder: Path, grid: BlockGrid, blocks: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """Return the numbers of files of the pyramid, and of all above them and above some blocks."""
    pyramid = pyramid_of(folder, grid)
    by_level: list[list[np.ndarray]] = [[] for _ in pyramid.levels]
    if len(blocks):
        index = np.stack(np.unravel_index(blocks, grid.shape), axis=1)
        by_level[0] = list(pyramid.shards_of(0, index))
    for level, place in pyramid.places(chunks):
        by_level[level].append(np.array(place))
    numbers = [chunks]
    for level in range(1, len(pyramid.levels)):
        if by_level[level - 1]:
            above = pyramid.above(level - 1, np.unique(by_level[level - 1], axis=0))
            by_level[level] += list(above)
            numbers.append(pyramid.numbers(level, above))
    return np.unique(np.concatenate(numbers))


def _remove(folder: Path, path: str) -> None:
    """Remove a file that the next run writes anew, and take back the step that does."""
    file = folder / path
    file.unlink(missing_ok=True)
    top = Path(path).parts[0]
    if top == "stitch":
        file.with_suffix(".sums").unlink(missing_ok=True)
    elif top == "data.zarr":
        # Every level's metadata are looked after by both steps; the prediction does the rest.
        if "segmentation" in path or path == "data.zarr/zarr.json":
            Step.take_back(folder, "relabel")
            Step.take_back(folder, "pyramid")
    else:
        Step.take_back(folder, _STEP_OF[top])
        if top == "agglomeration":
            _remove_merges_below(file)


def _remove_merges_below(file: Path) -> None:
    """Remove the merges of all superblocks inside one: it is made of their residual graphs.

    These graphs were removed when the root was done.
    """
    level = int(file.parent.name)
    index = [int(part) for part in file.stem.split("-")]
    for lower in range(level):
        for other in (file.parents[1] / str(lower)).glob("*.npz"):
            place = [int(part) >> (level - lower) for part in other.stem.split("-")]
            if place == index:
                other.unlink()
