"""The dry run: what a run will do, what it will cost, and what would stop it."""

import multiprocessing
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from textwrap import fill
from typing import Any, Final

import numpy as np
from rich.text import Text

from agq.blockwise.blocks.mask import mask_blocks
from agq.blockwise.journal.reader import Journal
from agq.blockwise.predict.local_processes import OWN_END
from agq.blockwise.predict.spec import PredictSpec
from agq.blockwise.spawn import spawning_apart
from agq.blockwise.storage.files import format_bytes, free_space
from agq.blockwise.volumes.sections import read_sections
from agq.blockwise.volumes.triples import Triple, triple
from agq.credentials import hide_address
from agq.errors import InputError
from agq.pipeline.config.resolved import Origins, told
from agq.pipeline.forecast.forecast import Forecast
from agq.pipeline.forecast.measure import measure
from agq.pipeline.forecast.scale import DENSE, DENSITIES, SPARSE, Scale, scale
from agq.pipeline.forecast.timing import Timing
from agq.pipeline.run.fit import Size, show
from agq.pipeline.run.greys import READS, contrast_of_volume, suggestion
from agq.pipeline.run.identity import require_same
from agq.pipeline.run.prepare import Prepared
from agq.pipeline.run.stages import forecast_of, predict_spec, timing_key_of
from agq.pipeline.status.text import duration
from agq.pipeline.status.text import measure as measure_text
from agq.tables import Tabled
from agq.terminal import facts

_NOW_S: Final = 10.0
_VALUE: Final = 56
"""Width of a value, so that 80 columns hold it beside its name."""


Measure = Callable[[PredictSpec, int, str], Timing]
"""Times a block of a prediction, given by number, somewhere; the text is the key of the timing."""


@dataclass(frozen=True)
class Plan(Tabled):
    """What a run would do.

    Attributes
    ----------
    raw, checkpoint, pieces
        What is read; the network's file and what it cuts blocks into, None for other predictors.
    blocks, done, masked, todo
        Selected blocks; those done already; those without tissue; those that would be computed.
    forecast
        What that takes: time for what is to be done, disk and files of the whole run.
    scale
        What single processes must bear, for a volume that is cut up little, and much.
    ledger
        Whether a database follows the run.
    free_bytes
        What the disk has.
    voxel_size, unit
        Of the volume, (z, y, x).
    trained_voxel_size
        Of the checkpoint, in nanometres; None if nothing says it.
    settings
        Where settings come from (`agq.pipeline.config.resolved.resolve`).
    timing
        One timed block; None without it.
    on_cluster
        Whether the forecast is for jobs of a cluster.
    """

    run_dir: str
    raw: str
    checkpoint: str | None
    pieces: str | None
    volume_shape: Triple
    voxel_size: Triple
    unit: str
    trained_voxel_size: Size | None
    notes: tuple[str, ...]
    settings: Origins
    grid_shape: Triple
    read_shape: Triple
    write_shape: Triple
    blocks: int
    done: int
    masked: int
    todo: int
    forecast: Forecast
    scale: tuple[Scale, Scale]
    ledger: bool
    free_bytes: int
    timing: Timing | None
    on_cluster: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        expected, timing = self.forecast, self.timing
        predict_s = expected.seconds.get("predict")
        return own | {
            "forecast": expected.model_dump(),
            "scale": {d.name: s.model_dump() for d, s in zip(DENSITIES, self.scale, strict=True)},
            "timing": timing and timing.model_dump(),
            "workers": expected.processes,
            "disk_bytes": expected.disk_bytes,
            "seconds_per_block": expected.block_s,
            "worker_bytes": timing and timing.worker_bytes,
            "hours": None if predict_s is None else predict_s / 3600,
        }

    def table(self) -> Text:
        """Return the plan for the terminal."""
        size = f"{_sizes(self.voxel_size)} {self.unit}"
        trained = self.trained_voxel_size
        rows = [("input", self.raw), ("volume", f"{_sizes(self.volume_shape)} voxels of {size}")]
        if self.checkpoint is not None:
            rows.append(("checkpoint", self.checkpoint))
        if trained is not None:
            rows.append(("network", f"trained at {show(trained)}"))
        if self.pieces is not None:
            rows.append(("pieces", self.pieces))
        rows += [
            ("block", f"reads {_sizes(self.read_shape)}, writes {_sizes(self.write_shape)}"),
            ("blocks", f"{self.blocks:,} selected of a {_sizes(self.grid_shape)} grid"),
            ("  done already", f"{self.done:,}"),
            ("  skipped by the mask", f"{self.masked:,}"),
            ("  to compute", f"{self.todo:,}"),
            *((f"from {origin}", fill(line, _VALUE)) for origin, line in told(self.settings)),
            *self._cost(),
            ("disk: free", format_bytes(self.free_bytes)),
            *self._single(),
            *(("note", note) for note in self.notes),
            *(("limit", fill(limit, _VALUE)) for limit in self.scale[1].limits()),
        ]
        return facts(f"Plan for {self.run_dir}", rows)

    def _single(self) -> list[tuple[str, str]]:
        """Return what single processes and the database must bear, for the terminal."""
        sparse, dense = self.scale
        rows = [
            ("memory: coordinator", format_bytes(dense.coordinator_bytes)),
            ("memory: stitch", format_bytes(dense.client_bytes)),
            ("leaves of the stitch", f"{dense.leaves:,}, of {dense.leaf_blocks:,} blocks"),
            (
                "memory: last merge",
                f"{format_bytes(sparse.root_bytes)} to {format_bytes(dense.root_bytes)}",
            ),
        ]
        if self.ledger:
            rows.append(("database", format_bytes(dense.ledger_bytes)))
        return [(name, f"about {value}") for name, value in rows]

    def _cost(self) -> list[tuple[str, str]]:
        """Return the forecast for the terminal."""
        expected, timing = self.forecast, self.timing
        kind = "GPU" if expected.gpus else "worker"
        rows = [("workers", f"{expected.processes:,}" + " with a GPU each" * expected.gpus)]
        if expected.block_s is None:
            way = "--submit times a block in a job" if self.on_cluster else "--time computes one"
            rows.append(("one block", f"not timed (agq plan {way})"))
        elif timing is None:
            rows += [("one block", f"{expected.block_s:.3g} s"), ("", expected.basis)]
            if self.on_cluster:
                rows.append(("", "agq plan --submit times one in a short job"))
        else:
            age = max(0.0, time.time() - timing.time)
            when = "now" if age < _NOW_S else f"{duration(age)} ago"
            rows += [
                ("one block", f"{timing.seconds:.3g} s, timed {when} on"),
                ("", timing.where),
                ("memory per worker", format_bytes(timing.worker_bytes)),
            ]
        rows += [(name, f"about {duration(s)}") for name, s in expected.seconds.items()]
        if "predict" in expected.seconds:
            rows.append(("all of it", f"about {duration(sum(expected.seconds.values()))}"))
        if expected.worker_hours is not None:
            hours = measure_text("worker_hours", expected.worker_hours)
            rows.append((f"{kind} hours", f"about {hours}"))
        if expected.cost is not None:
            rows.append(("cost", f"about {expected.cost:,.2f}"))
        for name, count in expected.disk_bytes.items():
            text = f"about {format_bytes(count)} in {expected.files[name]:,} files"
            rows.append((f"disk: {name}", text))
        size, files = sum(expected.disk_bytes.values()), sum(expected.files.values())
        return [*rows, ("disk: all", f"about {format_bytes(size)} in {files:,} files")]


def make_plan(
    prepared: Prepared,
    *,
    time_block: bool | None = None,
    on_cluster: bool = False,
    assumed_s: float | None = None,
    measure_there: Measure | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> Plan:
    """Work out the plan of a checked run.

    Parameters
    ----------
    prepared
        The checked run.
    time_block
        Load the model in a process of its own and compute one block from the middle of the
        selection, for the time and the memory per worker. Default: if the run folder has no timing
        of such a block, and this machine is to do the work or nodes without GPUs are.
    on_cluster
        Whether the jobs of `slurm` do the work.
    assumed_s
        Seconds for a block, in the place of a timing.
    measure_there
        Times a block somewhere else.
    tell
        Called with what is being done.

    Raises
    ------
    InputError
        If the block cannot be computed: what would fail in the run fails here.
    """
    grid, selected = prepared.grid, prepared.selected
    done = np.zeros(selected.size, dtype=bool)
    if prepared.run.exists():
        tell("reading what is done")
        require_same(prepared.as_begun())
        journal = Journal(prepared.run.journal("predict"))
        journal.refresh()
        done = journal.done(grid.n_blocks)[selected]
    rest = selected[~done]
    masked = 0
    if prepared.mask is not None and rest.size:
        tell("reading the mask")
        tissue = mask_blocks(prepared.mask, grid, rest)
        masked = int((~tissue).sum())
        rest = rest[tissue]
    notes = [*prepared.notes]
    contrast = None
    tell("looking at sections of the raw volume")
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
    run_dir, key = prepared.run.path, timing_key_of(prepared, on_cluster=on_cluster)
    timing = None if assumed_s is not None else Timing.load(run_dir, key)
    if time_block is None and measure_there is None:
        section = prepared.config.slurm
        elsewhere = on_cluster and (section is None or section.gpus > 0)
        time_block = timing is None and assumed_s is None and not elsewhere
    if rest.size and (time_block or measure_there is not None):
        spec, number = predict_spec(prepared, contrast), int(rest[rest.size // 2])
        if measure_there is None:
            tell("computing one block: loading the predictor, then twice the block")
        timing = (measure_there or partial(_time_here, prepared))(spec, number, key)
        if measure_there is not None or not on_cluster:
            # On a login node it says little about other machines, and is of this plan alone.
            timing.save(run_dir)
    expected = forecast_of(
        prepared,
        int(selected.size) - masked,
        int(rest.size),
        timing=timing,
        assumed_s=assumed_s,
        on_cluster=on_cluster,
    )
    if expected.gpus and timing is not None and timing.device == "cpu":
        notes.append("the block was timed without a GPU, and the workers have GPUs")
    of_density = partial(
        scale,
        grid,
        int(selected.size),
        int(selected.size) - masked,
        affinities=prepared.config.output.affinities,
    )
    raw, model = prepared.config.input.raw, prepared.identity["model"]
    assert raw is not None  # or there would be nothing to predict
    ours = "checkpoint_sha256" in model
    return Plan(
        run_dir=str(run_dir),
        raw=hide_address(raw.path) + (f"::{raw.dataset}" if raw.dataset else ""),
        checkpoint=prepared.config.model.checkpoint if ours else None,
        pieces=model.get("pieces", "masks") if ours else None,
        volume_shape=grid.volume_shape,
        voxel_size=triple(grid.voxel_size),
        unit=prepared.unit,
        trained_voxel_size=prepared.trained_voxel_size,
        notes=tuple(notes),
        settings=prepared.origins,
        grid_shape=grid.shape,
        read_shape=grid.read_shape,
        write_shape=grid.write_shape,
        blocks=int(selected.size),
        done=int(done.sum()),
        masked=masked,
        todo=int(rest.size),
        forecast=expected,
        scale=(of_density(SPARSE), of_density(DENSE)),
        ledger=prepared.config.ledger is not None,
        free_bytes=free_space(run_dir),
        timing=timing,
        on_cluster=on_cluster,
    )


def _time_here(prepared: Prepared, spec: PredictSpec, number: int, key: str) -> Timing:
    # A process of its own: its peak memory is that of a worker, and CUDA stays out of this one.
    context = multiprocessing.get_context("spawn")
    # Ctrl-C, which reaches it too, ends it without a word.
    quiet: dict[str, Any] = {
        "initializer": signal.signal,
        "initargs": (signal.SIGINT, signal.SIG_DFL),
    }
    with spawning_apart(), ProcessPoolExecutor(1, mp_context=context, **quiet) as pool:
        try:
            return pool.submit(measure, spec, number, key).result()
        except (InputError, *OWN_END):
            raise
        # What a user's predictor raised in the other process comes back as it is.
        except BaseException as error:
            raise InputError(
                f"block {number} at {prepared.grid.write_roi(number)} could not be computed: "
                f"{type(error).__name__}: {error}"
            ) from error


def _sizes(values: Triple) -> str:
    return " x ".join(str(v) for v in values)
