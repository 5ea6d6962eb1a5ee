"""The stages of a run as functions of an open session: predict, stitch, score, picture."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil

from agq import waiting
from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.mask import mask_blocks
from agq.blockwise.blocks.pack_arrays import require_unpacked
from agq.blockwise.blocks.writer import BlockWriter
from agq.blockwise.journal.reader import Journal, compact
from agq.blockwise.journal.records import BlockRecord, BlockState, this_worker
from agq.blockwise.journal.writer import JournalWriter, take_back
from agq.blockwise.predict.coordinator import (
    PredictProgress,
    PredictReport,
    PredictSpec,
    run_predict,
)
from agq.blockwise.predict.settings import AttemptSettings
from agq.blockwise.stitch.edits import MOST_BYTES, read_edits
from agq.blockwise.stitch.run import StitchReport, StitchSpec, find_blocks, run_stitch
from agq.blockwise.stitch.settings import OutputType, PyramidSettings, StitchSettings
from agq.blockwise.stitch.workers import is_small, lazy_client, stitch_processes
from agq.blockwise.storage.files import disk_usage, write_atomic
from agq.blockwise.volumes.content import require_content
from agq.blockwise.volumes.open import Volume, open_volume
from agq.errors import InputError, RunStoppedError
from agq.pipeline.config.schema import DEFAULT_FACTORY
from agq.pipeline.evaluate.plausibility import assess
from agq.pipeline.evaluate.scores import EvaluationReport
from agq.pipeline.folder import EDITS
from agq.pipeline.forecast.forecast import ASSUMED, Forecast, Means, forecast, gpu_seconds
from agq.pipeline.forecast.timing import Timing, timing_key
from agq.pipeline.run.fragments import import_missing
from agq.pipeline.run.greys import Contrast, contrast_of_run
from agq.pipeline.run.identity import changed_truth, new_makers, recorded_contents
from agq.pipeline.run.masks import apply_mask, require_applied
from agq.pipeline.run.prepare import Prepared
from agq.pipeline.run.session import Session
from agq.pipeline.slurm.settings import SlurmSettings
from agq.reading import read_file

if TYPE_CHECKING:
    from distributed import Client

_logger = logging.getLogger(__name__)

# Seconds for counting the files of a run: on shared storage a million of them take minutes.
_COUNT_S = 20.0

# Failures in a row after which a worker that joined tests itself.
_DRAIN_AFTER = 5

# What a CPU worker holds at its peak for a block of 17 x 257 x 257, with room to spare
# (benchmarks/forward.py prints it).
_CPU_WORKER_BYTES = 2.5 * 2**30


@dataclass(frozen=True)
class Cluster:
    """How workers of other machines take part; without it, this machine's do all.

    Attributes
    ----------
    listen
        Address of this machine that they reach.
    drain_after
        See `PredictSpec.drain_after`.
    workers
        Workers of this machine that take part too.
    """

    listen: str
    drain_after: int
    workers: int = 0


def _others(prepared: Prepared) -> Cluster | None:
    """Return how workers of other machines join this one, if the configuration lets them.

    Raises
    ------
    InputError
        If this machine has no such address.
    """
    host = prepared.config.workers.host
    if host is None:
        return None
    try:
        address = socket.gethostbyname(host)
        socket.create_server((address, 0)).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"workers.host: {host!r} is no address of this machine ({reason}); name the one by "
            "which the machines of the workers reach it"
        ) from None
    return Cluster(listen=address, drain_after=_DRAIN_AFTER, workers=worker_count(prepared))


def predict(
    session: Session,
    *,
    only_failed: bool = False,
    again: npt.NDArray[np.int64] | None = None,
    cluster: Cluster | None = None,
    on_progress: Callable[[PredictProgress], object] | None = None,
) -> PredictReport:
    """Label every selected block that is not done.

    Parameters
    ----------
    session
        The open run.
    only_failed
        Leave blocks that were never tried alone.
    again
        Numbers of blocks to compute, and only them, whatever the journal says of them.
    cluster
        How workers of other machines join; default: as `workers.host` says.
    on_progress
        Called now and then; what it raises stops the run.

    Returns
    -------
    report
        Its `failed` lists the blocks that failed in the end.
    """
    prepared = session.prepared
    on_cluster = cluster is not None
    cluster = cluster or _others(prepared)
    BlockWriter.create(
        prepared.run.path,
        prepared.grid,
        prepared.unit,
        affinities=prepared.config.output.affinities,
    )
    folder = prepared.run.journal("predict")
    compact(folder)
    if concerned := apply_mask(prepared):
        session.progress.note(f"input.mask has changed: {concerned:,} blocks are chosen anew")
    if again is not None:
        require_unpacked(prepared.run.path)
        take_back(folder, again, "asked for")
    journal = Journal(folder)
    journal.refresh()
    revision = journal.revision
    todo = prepared.selected[~journal.done(prepared.grid.n_blocks)[prepared.selected]]
    if again is not None:
        todo = np.intersect1d(todo, again)
    if only_failed:
        todo = np.intersect1d(todo, [record.block for record in journal.failed()])
    if todo.size:
        require_unpacked(prepared.run.path)
    total = int(prepared.selected.size)
    started = time.time()
    with session.stage("predict", total) as record:
        if prepared.mask is not None and todo.size and not prepared.hides_voxels:
            session.progress.note(
                "input.mask: this run was begun by a release whose mask left out whole blocks only,"
                " and goes on so; start over with --overwrite to hide voxels"
            )
        left = int(todo.size)
        todo = _skip_masked(prepared, todo, revision)
        skipped = journal.ranks(prepared.selected) == BlockState.SKIPPED
        held = total - int(skipped.sum()) - (left - int(todo.size))
        _record_forecast(session, held, on_cluster=on_cluster)
        if todo.size:
            _warn_of_new_makers(prepared, journal, prepared.device)
        session.progress.start("predict", total, done=total - int(todo.size))

        def tell(progress: PredictProgress) -> None:
            session.show_blocks(progress)
            if on_progress is not None:
                on_progress(progress)

        contrast = contrast_of_run(
            prepared.run.path,
            prepared.opened_raw(),
            prepared.config.model.normalise,
            lambda done, total: session.show_step("contrast", done, total),
        )
        spec = predict_spec(prepared, contrast, cluster=cluster, revision=revision)
        try:
            report = run_predict(spec, todo, on_progress=tell)
        except (InputError, RunStoppedError):
            _require_unchanged(prepared, spec, todo)
            raise
        # A later status reads this snapshot instead of all lines.
        compact(folder)
        if report.done:
            record["device"] = _devices(folder, since=started)
            if prepared.device is None:
                _warn_of_new_makers(prepared, journal, record["device"])
            _require_unchanged(prepared, spec, todo)
        if report.blocks or not session.has_report("predict"):
            record["report"] = report.to_dict()
        if report.failed:
            record["state"] = "failed"
    return report


def forecast_of(
    prepared: Prepared,
    blocks: int,
    todo: int | None = None,
    *,
    timing: Timing | None = None,
    assumed_s: float | None = None,
    on_cluster: bool = False,
) -> Forecast:
    """Work out what a run will take.

    Parameters
    ----------
    prepared
        The checked run.
    blocks, todo
        As of `Prepared.work`.
    timing, assumed_s
        As of `forecast`; default: the timing that the run folder holds, if it is of this run here.
    on_cluster
        Whether the jobs of `slurm` do the work, and not this machine.
    """
    config = prepared.config
    dask, model = config.stitch.dask, config.model
    if timing is None and assumed_s is None:
        timing = Timing.load(prepared.run.path, timing_key_of(prepared, on_cluster=on_cluster))
    assumption: dict[str, Any] = {"assumed_s": assumed_s}
    if on_cluster:
        section = config.slurm or SlurmSettings()
        jobs = min(section.workers, section.limit or section.workers)
        means = Means(
            processes=jobs * max(1, section.gpus),
            gpus=section.gpus > 0,
            cores=section.stitch.cpus * max(1, section.stitch.jobs),
            price=section.price_per_gpu_hour,
        )
        if timing is None and assumed_s is None and means.gpus and model.factory == DEFAULT_FACTORY:
            assumption = {"assumed_s": gpu_seconds(prepared.grid), "assumption": ASSUMED}
    else:
        # Of the workers of other machines, if only they take part, nothing is known.
        processes = worker_count(prepared) or 1
        small = is_small(prepared.grid, int(prepared.selected.size))
        cores = stitch_processes(dask, small=small)
        means = Means(processes, gpus=prepared.device == "cuda", cores=cores)
    return forecast(prepared.work(blocks, todo), means, timing, **assumption)


def timing_key_of(prepared: Prepared, *, on_cluster: bool) -> str:
    """Return the key of a timing of this run's blocks, on this machine or on nodes of a cluster."""
    where: Any = socket.gethostname()
    if on_cluster:
        section = prepared.config.slurm or SlurmSettings()
        # Another partition or feature may mean another kind of GPU.
        where = section.model_dump(include={"partition", "gres", "constraint"})
        where["gpu"] = section.gpus > 0
    model = {name: v for name, v in prepared.identity["model"].items() if name != "device"}
    return timing_key(model, prepared.config.model.device, prepared.grid.read_shape, where)


def blocks_with_tissue(prepared: Prepared) -> int:
    """Count the selected blocks that the mask does not leave out."""
    if prepared.mask is None:
        return int(prepared.selected.size)
    return int(mask_blocks(prepared.mask, prepared.grid, prepared.selected).sum())


def _record_forecast(session: Session, blocks: int, *, on_cluster: bool) -> None:
    """Record what the run is expected to take, unless that is there for the same ROI."""
    told = session.prepared.run.record()["stages"].get("predict", {}).get("forecast")
    if told is None or told.get("selected") != int(session.prepared.selected.size):
        expected = forecast_of(session.prepared, blocks, on_cluster=on_cluster)
        session.update_stage("predict", forecast=expected.model_dump())


def _require_unchanged(prepared: Prepared, spec: PredictSpec, todo: npt.NDArray[np.int64]) -> None:
    """Refuse inputs that have changed meanwhile; take back the blocks that may have read them so.

    Raises
    ------
    InputError
        Naming the input and what differs.
    """
    try:
        for name, volume in (("raw", prepared.opened_raw()), ("mask", prepared.mask)):
            if volume is not None and (recorded := spec.contents.get(name)):
                require_content(volume, recorded, f"input.{name}")
    except InputError:
        take_back(prepared.run.journal("predict"), todo, "input changed")
        raise


def _devices(folder: Path, since: float) -> str:
    """Return the kinds of device of the workers that have computed blocks since a time."""
    workers = Journal(folder).workers.values()
    found = {w.info.device.partition(":")[0] for w in workers if w.done and w.last >= since}
    return ", ".join(sorted(found))


def _warn_of_new_makers(prepared: Prepared, journal: Journal, device: str | None) -> None:
    """Say what other software or device computes blocks now than before."""
    changed = new_makers(prepared, device)
    if changed and journal.counts()["done"]:
        _logger.warning(
            "%s: blocks computed from now on may differ in single voxels from the %d that were done"
            " before; they fit together, but no other run will have the same bytes",
            ", ".join(changed),
            journal.counts()["done"],
        )


def _skip_masked(
    prepared: Prepared, todo: npt.NDArray[np.int64], revision: int
) -> npt.NDArray[np.int64]:
    """Record blocks without tissue as skipped; return the others."""
    if prepared.mask is None or not todo.size:
        return todo
    tissue = mask_blocks(prepared.mask, prepared.grid, todo)
    now = time.time()
    with JournalWriter(prepared.run.journal("predict"), this_worker("coordinator")) as journal:
        journal.revision = revision
        journal.finish_many(
            BlockRecord(
                block=number,
                state="skipped",
                reason="mask",
                started=now,
                finished=now,
                **prepared.grid.place(number),
            )
            for number in todo[~tissue].tolist()
        )
    return todo[tissue]


def predict_spec(
    prepared: Prepared,
    contrast: Contrast | None,
    *,
    cluster: Cluster | None = None,
    revision: int = 0,
) -> PredictSpec:
    """Return what the workers of a run are told.

    Parameters
    ----------
    prepared
        The checked run.
    contrast
        See `contrast_of_run`.
    cluster
        How workers of other machines take part.
    revision
        See `PredictSpec.revision`.
    """
    config = prepared.config
    return PredictSpec(
        run_dir=str(prepared.run.path),
        raw=reopen_options(prepared.opened_raw()),
        mask=reopen_options(prepared.mask) if prepared.mask and prepared.hides_voxels else None,
        bad_sections=config.input.bad_sections,
        hide_bad_sections=config.input.bad_sections_fill == "mask",
        contrast=contrast,
        grid=prepared.grid.to_dict(),
        contents=recorded_contents(prepared) if prepared.run.exists() else {},
        factory=config.model.factory,
        options=prepared.predictor_options,
        files=prepared.files,
        affinities=config.output.affinities,
        workers=cluster.workers if cluster else worker_count(prepared),
        **config.workers.model_dump(include=set(AttemptSettings.model_fields)),
        listen=cluster and cluster.listen,
        drain_after=cluster.drain_after if cluster else 0,
        revision=revision,
    )


def reopen_options(volume: Volume) -> dict[str, Any]:
    """Return the arguments with which `open_volume` opens the same volume in a worker."""
    return {
        "path": volume.address,
        "dataset": volume.dataset or None,
        "voxel_size": [int(v) for v in volume.voxel_size],
        "offset": [int(v) for v in volume.offset],
        "unit": volume.unit,
    }


def worker_count(prepared: Prepared) -> int:
    """Return how many prediction workers this machine gets."""
    wanted = prepared.config.workers.count
    if wanted != "auto":
        return wanted
    device = prepared.config.model.device
    if device in ("auto", "cuda"):
        import torch  # takes seconds to load; only here

        if torch.cuda.is_available():
            return torch.cuda.device_count()
    if device == "mps":
        return 1
    share = float(np.prod(prepared.grid.read_shape)) / (17 * 257 * 257)
    by_memory = psutil.virtual_memory().available / (_CPU_WORKER_BYTES * max(share, 0.25))
    by_cores = len(os.sched_getaffinity(0)) // prepared.config.workers.threads
    return max(1, min(by_cores, int(by_memory)))


def stitch_spec(
    section: StitchSettings,
    pyramid: PyramidSettings,
    run_dir: Path,
    grid: BlockGrid,
    box: tuple[Any, Any] | None = None,
    classes: Volume | None = None,
    dtype: OutputType = "auto",
) -> StitchSpec:
    """Return what to stitch of a run folder, from its settings and the voxel box of its ROI."""
    start, stop = box or (None, None)
    return StitchSpec(
        run_dir=run_dir,
        grid=grid.to_dict(),
        **section.model_dump(exclude={"dask"}),
        start=start,
        stop=stop,
        classes=classes and reopen_options(classes),
        levels=None if pyramid.levels == "auto" else pyramid.levels + 1,
        downsampling=pyramid.downsampling,
        dtype=dtype,
    )


def stitch(
    session: Session,
    *,
    client: AbstractContextManager[Client] | None = None,
    cores: int | None = None,
) -> StitchReport:
    """Join the fragments of all selected blocks into one segmentation with its pyramid.

    Parameters
    ----------
    session
        The open run.
    client
        dask's client; default: as the configuration says.
    cores
        Cores for the stitch where the configuration names no number of workers; default: all that
        this process may use.
    """
    prepared = session.prepared
    require_applied(prepared)
    config = prepared.config
    section = config.stitch.model_copy(update={"edits": keep_edits(prepared)})
    spec = stitch_spec(
        section,
        config.pyramid,
        prepared.run.path,
        prepared.grid,
        prepared.box,
        prepared.opened_classes(),
        config.output.dtype,
    )
    if config.input.fragments is None:
        find_blocks(spec)
    blocks = int(prepared.selected.size)
    small = is_small(prepared.grid, blocks)
    with (
        session.stage("stitch", blocks) as record,
        client or lazy_client(section.dask, small=small, cores=cores) as dask,
    ):
        if config.input.fragments is not None:
            import_missing(session, dask)
        tell = partial(session.update_step, "stitch")
        wait_s = section.dask.wait_s
        report = run_stitch(spec, dask, tell, session.progress.note, wait_s=wait_s)
        if len(report.reused) < len(report.seconds) or not session.has_report("stitch"):
            record["report"] = report.to_dict()
        plausible = assess(prepared.run.path, section, truth=config.evaluate is not None)
        record["plausibility"] = plausible and plausible.to_dict()
    # Image files made into zarr are input.
    usage = disk_usage(prepared.run.path, without=("imported",), most_s=_COUNT_S)
    session.update_stage("stitch", disk=usage._asdict())
    return report


def keep_edits(prepared: Prepared) -> Path | None:
    """Copy the edits of the stitch into the run folder, whose record names the copy from then on.

    Raises
    ------
    InputError
        If they cannot be read.
    """
    given = prepared.config.stitch.edits
    if given is None:
        return None
    read_edits(given)
    kept = prepared.run.path / EDITS
    if given != kept:
        write_atomic(kept, read_file(given, most=MOST_BYTES))
        config = prepared.run.record()["config"]
        config["stitch"]["edits"] = str(kept)
        prepared.run.update(config=config)
    return kept


def segmentation(prepared: Prepared) -> Volume:
    """Open the full resolution of the run's segmentation."""
    return open_volume(
        prepared.run.container, "segmentation", level=0, kind="labels", unit=prepared.unit
    )


def score(session: Session) -> EvaluationReport | None:
    """Compare the segmentation with the ground truth, if the configuration names one."""
    waiting.doing("opening the truth")
    prepared = session.prepared
    truth = prepared.scored_truth()
    settings = prepared.config.evaluate
    if truth is None or settings is None:
        return None
    from agq.pipeline.evaluate.evaluate import BorderRule, evaluate  # loads scipy

    if changed := changed_truth(prepared):
        session.progress.note(f"evaluate.truth has changed since the last scores: {changed}")
    with session.stage("evaluate", 1) as record:
        report = evaluate(
            segmentation(prepared),
            truth,
            ignore=BorderRule(labels=settings.ignore_labels),
            on_progress=lambda done, total: session.show_step("evaluate", done, total),
        )
        record["report"] = report.to_dict()
    file = prepared.run.path / "evaluation.json"
    write_atomic(file, json.dumps(report.to_dict(), indent=1).encode())
    return report


def picture(session: Session) -> Path:
    """Draw the result of a finished run and return the path of the picture."""
    from agq.pipeline.view.picture import snapshot  # loads matplotlib

    waiting.doing("drawing the picture")
    prepared = session.prepared
    file = prepared.run.path / f"{prepared.run.path.name}.png"
    raw, truth = prepared.opened_raw(), prepared.opened_truth()
    snapshot(file, raw, segmentation(prepared), truth=truth)
    return file
