"""The dry run: what a run will do, what it will cost, and what would stop it."""

import multiprocessing
import resource
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.text import Text

from agq.blockwise.blocks.mask import mask_blocks
from agq.blockwise.journal.reader import Journal
from agq.blockwise.predict.local_processes import OWN_END
from agq.blockwise.predict.predictor import load_predictor
from agq.blockwise.predict.raw_blocks import RawBlocks
from agq.blockwise.predict.spec import PredictSpec
from agq.blockwise.spawn import spawning_apart
from agq.blockwise.storage.files import format_bytes, free_space
from agq.blockwise.volumes.sections import read_sections
from agq.blockwise.volumes.triples import Triple, triple
from agq.errors import InputError
from agq.pipeline.config.resolved import Origins, told
from agq.pipeline.run.fit import Size, show
from agq.pipeline.run.greys import READS, contrast_of_volume, suggestion
from agq.pipeline.run.identity import require_same
from agq.pipeline.run.prepare import Prepared
from agq.pipeline.run.stages import predict_spec, worker_count
from agq.tables import Tabled
from agq.terminal import facts


@dataclass(frozen=True)
class Plan(Tabled):
    """What a run would do.

    Attributes
    ----------
    blocks, done, masked, todo
        Selected blocks; those done already; those without tissue; those that would be computed.
    disk_bytes, free_bytes
        Estimated output by kind, and what the disk has.
    voxel_size, unit
        Of the volume, (z, y, x).
    trained_voxel_size
        Of the checkpoint, in nanometres; None if nothing says it.
    settings
        Where settings come from (`agq.pipeline.config.resolved.resolve`).
    seconds_per_block, worker_bytes, hours
        From one block computed in a process of its own; None without it.
    """

    run_dir: str
    volume_shape: Triple
    voxel_size: Triple
    unit: str
    trained_voxel_size: Size | None
    notes: tuple[str, ...]
    settings: Origins
    grid_shape: Triple
    read_shape: Triple
    write_shape: Triple
    workers: int
    blocks: int
    done: int
    masked: int
    todo: int
    disk_bytes: dict[str, int]
    free_bytes: int
    seconds_per_block: float | None
    worker_bytes: int | None
    hours: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        return asdict(self)

    def table(self) -> Text:
        """Return the plan for the terminal."""
        size = f"{_sizes(self.voxel_size)} {self.unit}"
        trained = self.trained_voxel_size
        rows = [
            ("volume", f"{_sizes(self.volume_shape)} voxels of {size}"),
            ("block", f"reads {_sizes(self.read_shape)}, writes {_sizes(self.write_shape)}"),
            ("blocks", f"{self.blocks:,} selected of a {_sizes(self.grid_shape)} grid"),
            ("  done already", f"{self.done:,}"),
            ("  skipped by the mask", f"{self.masked:,}"),
            ("  to compute", f"{self.todo:,}"),
            ("workers", str(self.workers)),
        ]
        if trained is not None:
            rows.insert(1, ("network", f"trained at {show(trained)}"))
        rows += [(f"from {origin}", line) for origin, line in told(self.settings)]
        for name, count in self.disk_bytes.items():
            rows.append((f"disk: {name}", f"about {format_bytes(count)}"))
        rows.append(("disk: free", format_bytes(self.free_bytes)))
        if self.seconds_per_block is not None and self.worker_bytes is not None:
            rows.append(("one block", f"{self.seconds_per_block:.2f} s"))
            rows.append(("memory per worker", format_bytes(self.worker_bytes)))
        if self.hours is not None:
            rows.append(("predict", f"about {_duration(self.hours * 3600)}"))
        rows += [("note", note) for note in self.notes]
        return facts(f"Plan for {self.run_dir}", rows)


def make_plan(prepared: Prepared, *, time_block: bool = True) -> Plan:
    """Work out the plan of a checked run.

    Parameters
    ----------
    prepared
        The checked run.
    time_block
        Load the model in a process of its own and compute one block from the middle of the
        selection, for the time and the memory per worker.

    Raises
    ------
    InputError
        If the block cannot be computed: what would fail in the run fails here.
    """
    grid, selected = prepared.grid, prepared.selected
    done = np.zeros(selected.size, dtype=bool)
    if prepared.run.exists():
        require_same(prepared.as_begun())
        journal = Journal(prepared.run.journal("predict"))
        journal.refresh()
        done = journal.done(grid.n_blocks)[selected]
    rest = selected[~done]
    masked = 0
    if prepared.mask is not None and rest.size:
        tissue = mask_blocks(prepared.mask, grid, rest)
        masked = int((~tissue).sum())
        rest = rest[tissue]
    # Of the workers of other machines, if only they take part, a plan knows nothing.
    workers = worker_count(prepared) or 1
    notes = [*prepared.notes]
    contrast = None
    try:
        sections = read_sections(prepared.opened_raw(), within=prepared.box, most_reads=READS)
    except InputError as error:
        notes.append(f"sections were not looked at: {error}")
    else:
        start, stop = prepared.box or ((0, 0, 0), grid.volume_shape)
        bad = suggestion(sections, stop[0] - start[0], prepared.config.input.bad_sections)
        notes += [] if bad is None else [bad]
        if prepared.config.model.normalise in ("volume", "section"):
            # Near enough for the time of a block; a run measures what it uses.
            contrast = (contrast_of_volume(sections),)
    seconds = memory = None
    if time_block and rest.size:
        spec = predict_spec(prepared, contrast)
        seconds, memory = _time_one(prepared, spec, int(rest[rest.size // 2]))
    return Plan(
        run_dir=str(prepared.run.path),
        volume_shape=grid.volume_shape,
        voxel_size=triple(grid.voxel_size),
        unit=prepared.unit,
        trained_voxel_size=prepared.trained_voxel_size,
        notes=tuple(notes),
        settings=prepared.origins,
        grid_shape=grid.shape,
        read_shape=grid.read_shape,
        write_shape=grid.write_shape,
        workers=workers,
        blocks=int(selected.size),
        done=int(done.sum()),
        masked=masked,
        todo=int(rest.size),
        disk_bytes=prepared.disk_estimate(),
        free_bytes=free_space(prepared.run.path),
        seconds_per_block=seconds,
        worker_bytes=memory,
        hours=None if seconds is None else seconds * rest.size / workers / 3600,
    )


def _time_one(prepared: Prepared, spec: PredictSpec, number: int) -> tuple[float, int]:
    # A process of its own: its peak memory is that of a worker, and CUDA stays out of this one.
    context = multiprocessing.get_context("spawn")
    # Ctrl-C, which reaches it too, ends it without a word.
    quiet: dict[str, Any] = {
        "initializer": signal.signal,
        "initargs": (signal.SIGINT, signal.SIG_DFL),
    }
    with spawning_apart(), ProcessPoolExecutor(1, mp_context=context, **quiet) as pool:
        try:
            return pool.submit(_measure, spec, number).result()
        except (InputError, *OWN_END):
            raise
        # What a user's predictor raised in the other process comes back as it is.
        except BaseException as error:
            raise InputError(
                f"block {number} at {prepared.grid.write_roi(number)} could not be computed: "
                f"{type(error).__name__}: {error}"
            ) from error


def _measure(spec: PredictSpec, number: int) -> tuple[float, int]:
    """Return seconds for the second of two equal blocks, and the peak bytes of this process."""
    predictor = load_predictor(spec.factory, spec.options, 0)
    block = RawBlocks.open(spec).read(number)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        predictor.predict([block])
        seconds = time.perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _sizes(values: Triple) -> str:
    return " x ".join(str(v) for v in values)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
