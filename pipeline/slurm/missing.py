"""What of a submitted run is missing, so that no job has nothing to do and none is there twice."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import get_args

from agq.blockwise.journal.reader import Journal
from agq.blockwise.predict.spec import Session
from agq.errors import InputError
from agq.pipeline.config.schema import Config
from agq.pipeline.run.identity import mask_changed
from agq.pipeline.run.prepare import Prepared, prepare, prepare_stitch
from agq.pipeline.slurm import client, jobs

_AGAIN_S = 1.0
_END_S = 20.0
_POLL_S = 0.5


@dataclass(frozen=True)
class Missing:
    """What to submit so that a run goes on.

    Attributes
    ----------
    stages
        Stages that no job in the queue does; empty: nothing is missing.
    workers
        Worker jobs to submit with the prediction, or to it if its coordinator is in the queue.
    behind
        Coordinator in the queue that a stitch alone waits for.
    idle
        Jobs in the queue for which there is nothing to do.
    notes
        What is left alone, one line each.
    """

    stages: tuple[jobs.Stage, ...]
    workers: int = 0
    behind: int | None = None
    idle: tuple[client.QueueEntry, ...] = ()
    notes: tuple[str, ...] = ()


def blocks_left(prepared: Prepared) -> int:
    """Count the selected blocks that are to be computed; all of them if the mask has changed."""
    run, selected = prepared.run, prepared.selected
    if not run.exists() or mask_changed(prepared):
        return int(selected.size)
    done = Journal(run.journal("predict")).done(prepared.grid.n_blocks)
    return int((~done[selected]).sum())


def prediction_is_done(prepared: Prepared, left: int) -> bool:
    """Tell whether a coordinator would find nothing to do."""
    run = prepared.run
    stage = run.record()["stages"].get("predict", {}) if run.exists() else {}
    return left == 0 and stage.get("state") == "done"


def of_run(
    config: Config,
    record: jobs.Jobs,
    stages: Collection[jobs.Stage],
    workers: int,
    *,
    trust: bool = False,
) -> Missing:
    """Compare some stages of a run with the queue and with what is on disk.

    Parameters
    ----------
    config, record
        What was submitted.
    workers
        How many worker jobs the run should have.
    trust
        As for `prepare`.

    Raises
    ------
    InputError
        If SLURM does not answer, or the run cannot go on with its inputs.
    """
    limit = jobs.section_of(config).limit
    entries = _present(record)
    if not entries["coordinator"]:
        # squeue does not show a job for a moment while it is requeued: ask twice.
        time.sleep(_AGAIN_S)
        entries = _present(record)
    notes = [
        f"{role}: job {entry.job} is in the queue ({entry.state}) and goes on"
        for role in ("coordinator", "stitch")
        for entry in entries[role]
        if not entry.reason.startswith("Dependency") or entries["coordinator"]
    ]
    if entries["coordinator"]:
        # Behind a coordinator that has failed: SLURM is about to take it away.
        dead = [e for e in entries["stitch"] if e.reason == "DependencyNeverSatisfied"]
        stitch = "stitch" in stages and len(dead) == len(entries["stitch"])
        alive = sum(entry.count for entry in entries["workers"])
        return Missing(
            ("stitch",) if stitch else (),
            jobs.lacking(workers, alive, limit) if "predict" in stages else 0,
            entries["coordinator"][-1].job,
            idle=tuple(dead) if stitch else (),
            notes=tuple(notes),
        )
    prepared = prepare_stitch(config, trust=trust)
    left = blocks_left(prepared)
    if not left and config.input.mask is not None:
        left = blocks_left(prepare(config, workers_here=False, trust=trust).as_begun())
    predict = "predict" in stages and not prediction_is_done(prepared, left)
    # Without its coordinator, a stitch that waits for one never starts, or finds blocks missing.
    waits = [
        entry
        for entry in entries["stitch"]
        if entry.reason.startswith("Dependency") or (predict and entry.state == "PENDING")
    ]
    if predict and (works := [e for e in entries["stitch"] if e not in waits]):
        raise InputError(
            f"{left} blocks of {prepared.run.path} are left, and its stitch is in the queue (job "
            f"{jobs.numbers(works)}, {works[0].state}): agq attach follows it; then agq resume"
        )
    # Workers of dask whose stitch has gone, too.
    orphans = () if entries["stitch"] else tuple(entries["dask"])
    idle = (*entries["workers"], *orphans)
    if predict:
        session = Session.load(prepared.run.path)
        alive = 0
        if session is None or session.state == "open":
            # They wait for the next coordinator with their network loaded.
            alive, idle = sum(entry.count for entry in entries["workers"]), orphans
        more = jobs.lacking(workers, alive, limit) if left else 0
        chosen: tuple[jobs.Stage, ...] = (
            ("predict", "stitch") if "stitch" in stages else ("predict",)
        )
        return Missing(chosen, more, idle=(*idle, *waits), notes=tuple(notes))
    if "predict" in stages:
        notes.append("predict: done")
    if "stitch" not in stages or (entries["stitch"] and not waits):
        return Missing((), idle=idle, notes=tuple(notes))
    if not waits and _stitch_is_done(prepared, record):
        return Missing((), idle=idle, notes=(*notes, "stitch: done"))
    return Missing(("stitch",), idle=(*idle, *waits), notes=tuple(notes))


def _present(record: jobs.Jobs) -> dict[str, list[client.QueueEntry]]:
    roles = {job.id: job.role for job in record.jobs}
    entries: dict[str, list[client.QueueEntry]] = {role: [] for role in get_args(jobs.Role)}
    for entry in jobs.live(record):
        if entry.state not in jobs.ENDING:
            entries[roles[entry.job]].append(entry)
    return entries


def _stitch_is_done(prepared: Prepared, record: jobs.Jobs) -> bool:
    """Tell whether a stitch, begun after the last submission and prediction, has ended well."""
    stages = prepared.run.record()["stages"]
    before = [job.submitted for job in record.jobs if job.role == "stitch"]
    before.append(stages.get("predict", {}).get("finished") or 0.0)
    names = ("stitch", "evaluate") if prepared.config.evaluate is not None else ("stitch",)
    return all(
        stages.get(name, {}).get("state") == "done" and stages[name]["started"] >= max(before)
        for name in names
    )


def end(record: jobs.Jobs, entries: Collection[client.QueueEntry]) -> None:
    """End jobs, running ones gently, and wait until they have left the queue.

    Raises
    ------
    SlurmError
        If SLURM does not answer or refuses.
    """
    wanted = {entry.job for entry in entries}
    running = [e.target for e in entries if e.state == "RUNNING"]
    client.cancel([e.target for e in entries if e.state != "RUNNING"])
    client.cancel(running, "--batch", "--signal=TERM")
    deadline = time.monotonic() + _END_S
    while left := [e for e in jobs.live(record) if e.job in wanted]:
        if time.monotonic() > deadline:
            client.cancel([e.target for e in left])
            deadline += _END_S
        time.sleep(_POLL_S)
