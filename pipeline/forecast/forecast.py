"""What a run will take, from the number of its blocks, one timed block and measured rates.

Sizes and numbers of files are those of two finished runs with 2 workers, of 20 x 300 x 300 voxels
with the packaged weights and of the tests' 20 x 50 x 70; the time of the stitch is that of
``benchmarks/stitch/tables.py --waterz``, 105 Mvoxel on 2 cores, of pyramid and evaluation the CPU
time for 17 Mvoxel of labels. What a timed block wrote takes the place of the sizes.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from agq.blockwise.blocks import packs
from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.stitch.output.pyramid import Pyramid
from agq.blockwise.stitch.superblocks import leaf_shape
from agq.blockwise.storage.files import format_bytes
from agq.pipeline.forecast.timing import Timing
from agq.pipeline.status.text import duration, measure

# Compressed bytes per voxel where no block was timed; AC4, rounded up (docs/architecture.md).
_BYTES: Final = {"fragments": 0.25, "sidecars": 0.15, "affinities": 2.5}
_PYRAMID: Final = 0.8
"""Bytes of all coarse levels together, of those of the full one."""
_TABLES: Final = 2.5
"""Bytes of the tables of the stitch, of those of the sidecars (0.8 to 4.3)."""
_JOURNAL: Final = 1600
"""Bytes of journal lines for one block, all stages together."""

_PAGE: Final = 4096
"""What a file system gives a file at a time."""

_STITCH_S: Final = 0.1
_PYRAMID_S: Final = 0.03
_EVALUATE_S: Final = 0.04
"""Core seconds per Mvoxel; an evaluation uses one core."""
_BEGIN_S: Final = 10.0
"""To start dask's workers, and to go from step to step."""
_STEPS_S: Final = 2.0
"""To go from step to step."""

_GPU_S: Final = 0.5e-6
"""Assumed seconds of a GPU for a voxel that a block reads. The published network needs 0.73 MFLOP
for one (counted), 0.2 s of a block of 17 x 257 x 257 at 4 TFLOP/s; the rest is for its labels."""

ASSUMED: Final = f"assumed, not timed: {_GPU_S * 1e6:g} s per Mvoxel that a GPU reads"

_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Work:
    """What there is to do.

    Attributes
    ----------
    grid
        Blocks of the whole volume.
    selected
        Blocks of the ROI.
    blocks
        Of these, those that the run will hold: not those that the mask leaves out.
    todo
        Of these, those that are not done.
    levels
        Most levels of the pyramid, the full one included; None: down to one chunk.
    affinities, evaluated
        Whether affinities are kept, and the result is scored.
    """

    grid: BlockGrid
    selected: int
    blocks: int
    todo: int
    levels: int | None = None
    affinities: bool = False
    evaluated: bool = False

    @property
    def voxels(self) -> float:
        """Voxels that the blocks write."""
        written = self.blocks * float(math.prod(self.grid.write_shape))
        return min(written, float(math.prod(self.grid.volume_shape)))


@dataclass(frozen=True)
class Means:
    """Who does it.

    Attributes
    ----------
    processes
        Worker processes of the prediction.
    gpus
        Whether each of them has a GPU.
    cores
        Cores of the stitch, each with a process of its own; 0: the command itself does it.
    price
        Money for an hour of a GPU; None: not said.
    """

    processes: int
    gpus: bool
    cores: int
    price: float | None = None


class Forecast(BaseModel):
    """What a run will take; ``run.json`` keeps that of its beginning."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    selected: int
    """Blocks of the ROI."""

    blocks: int
    """Blocks that the run holds in the end."""

    todo: int
    """Blocks that were to be computed."""

    processes: int
    """Worker processes of the prediction."""

    gpus: bool
    """Whether `worker_hours` are hours of GPUs."""

    basis: str
    """How the seconds for a block are known."""

    block_s: _Amount | None
    """Seconds for a block; None: not known, and neither is what follows from it."""

    worker_hours: _Amount | None
    """Hours of all worker processes together."""

    cost: _Amount | None
    """Money for the hours of GPUs."""

    seconds: dict[str, _Amount]
    """Wall time of ``predict`` (if known), ``stitch``, ``pyramid``, ``evaluate`` (if scored)."""

    disk_bytes: dict[str, int]
    """Bytes on disk by kind of output."""

    files: dict[str, int]
    """Number of files by kind of output."""

    def line(self) -> str:
        """Return the whole run in one line."""
        kind = "GPU" if self.gpus else "worker"
        size, files = format_bytes(sum(self.disk_bytes.values())), sum(self.files.values())
        words = []
        if self.worker_hours is not None:
            words.append(f"{measure('worker_hours', self.worker_hours)} {kind} hours")
        words += [f"cost {self.cost:,.2f}"] if self.cost is not None else []
        words += [f"{name} {duration(seconds)}" for name, seconds in self.seconds.items()]
        return ", ".join([*words, f"{size} in {files:,} files"]) + f" (a block: {self.basis})"


def forecast(
    work: Work,
    means: Means,
    timing: Timing | None,
    *,
    assumed_s: float | None = None,
    assumption: str = "assumed, as you say",
) -> Forecast:
    """Work out what a run will take.

    Parameters
    ----------
    work, means
        What there is to do, and who does it.
    timing
        One timed block.
    assumed_s, assumption
        Seconds for a block where none was timed (None: nothing is assumed), and why.
    """
    block_s, load_s = assumed_s, 0.0
    basis = assumption if assumed_s is not None else "not timed"
    if timing is not None:
        block_s, load_s, basis = timing.seconds, timing.load_s, f"timed on {timing.where}"
    files = _files(work, means)
    hours, cost, seconds = None, None, {}
    if block_s is not None:
        processes = min(means.processes, work.todo)
        hours = (work.todo * block_s + processes * load_s) / 3600
        rounds = math.ceil(work.todo / max(processes, 1))
        seconds["predict"] = rounds * block_s + (load_s if work.todo else 0.0)
        if means.gpus and means.price is not None:
            cost = hours * means.price
    mvoxels = work.voxels / 1e6
    begin, cores = (_BEGIN_S, means.cores) if means.cores else (_STEPS_S, 1)
    seconds["stitch"] = begin + _STITCH_S * mvoxels / cores
    seconds["pyramid"] = _PYRAMID_S * mvoxels / cores
    if work.evaluated:
        seconds["evaluate"] = _EVALUATE_S * mvoxels
    return Forecast(
        selected=work.selected,
        blocks=work.blocks,
        todo=work.todo,
        processes=means.processes,
        gpus=means.gpus,
        basis=basis,
        block_s=block_s,
        worker_hours=hours,
        cost=cost,
        seconds=seconds,
        disk_bytes=_bytes(work, files, timing),
        files=files,
    )


def gpu_seconds(grid: BlockGrid) -> float:
    """Return the seconds that a GPU is assumed to need for a block; `ASSUMED` says it in words."""
    return _GPU_S * math.prod(grid.read_shape)


def disk_bytes(work: Work) -> dict[str, int]:
    """Return the bytes that a run is expected to take, where no block was timed."""
    return _bytes(work, _files(work, Means(1, gpus=False, cores=1)), None)


def _files(work: Work, means: Means) -> dict[str, int]:
    """Count files by kind of output."""
    grid, blocks = work.grid, work.blocks
    pyramid = Pyramid.planned(Path(), "", grid, max_levels=work.levels)
    levels = pyramid.levels
    share = blocks / grid.n_blocks
    shards = [math.ceil(share * math.prod(pyramid.shards(i))) for i in range(len(levels))]
    leaf = leaf_shape(grid.shape, max(blocks, 1), max(means.cores, 1), 512)
    leaves = min(blocks, math.prod(-(-n // side) for n, side in zip(grid.shape, leaf, strict=True)))
    files = {"fragments": blocks, "sidecars": math.ceil(blocks / packs.BLOCKS)}
    if work.affinities:
        files["affinities"] = blocks
    files["segmentation"], files["pyramid"] = shards[0], sum(shards[1:])
    # Contacts, merges by level, and the id map, of each leaf.
    files["tables"] = math.ceil(3.3 * leaves) + 6
    # A journal and a log of each process; metadata of arrays, records, checksums of tables.
    files["records"] = 3 * means.processes + len(levels) + 30
    return files


def _bytes(work: Work, files: dict[str, int], timing: Timing | None) -> dict[str, int]:
    """Estimate bytes by kind of output, with what the file system adds to a file."""
    voxels = float(math.prod(work.grid.write_shape))
    block = {name: voxels * rate for name, rate in _BYTES.items()}
    if timing is not None:
        block |= timing.file_bytes
    # Blocks at the end of the volume write less: whole ones, as many as there are voxels.
    content = {name: work.voxels / voxels * block[name] for name in _BYTES if name in files}
    content["segmentation"] = content["fragments"]
    content["pyramid"] = _PYRAMID * content["fragments"]
    content["tables"] = _TABLES * content["sidecars"]
    content["records"] = _JOURNAL * work.blocks
    return {
        name: int(max(_PAGE * files[name], size + _PAGE / 2 * files[name]))
        for name, size in content.items()
    }
