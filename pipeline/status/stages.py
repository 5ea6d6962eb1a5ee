"""The parts of a run's status: stages and workers, from journal or ledger."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from agq.blockwise.journal.progress import RECENT_S, StageProgress
from agq.blockwise.journal.tail import WorkerState
from agq.blockwise.storage import locks
from agq.pipeline.status.failures import MAX_FAILURES, failure_groups, failure_of
from agq.pipeline.status.run_status import QueueStatus, RunState, StageStatus, WorkerStatus

Record = dict[str, Any]

_ORDER: Final = ("predict", "stitch", "relabel", "pyramid", "evaluate")
_PARTS: Final = ("relabel", "pyramid")
LEADERS: Final = {"predict": "coordinator", "stitch": "stitch"}
"""The batch job that does a stage, by stage."""

NEVER_STARTS: Final = frozenset(
    {
        *("DependencyNeverSatisfied", "BadConstraints", "PartitionConfig", "PartitionTimeLimit"),
        *("PartitionNodeLimit", "InvalidAccount", "InvalidQOS", "AccountNotAllowed"),
        *("QOSNotAllowed", "job_requeued_in_held_state", "launch_failed_requeued_held"),
        *("JobHeldAdmin", "JobHeldUser"),
    }
)
"""Reasons of jobs that wait which no time heals."""

_STILL: Final = 3.0
_STEP: Final = ("step", "step_done", "step_total")
_MAX_WORKERS: Final = 200
_MIN_DONE: Final = 3
_MIN_WORKERS: Final = 3


def coordinator_alive(run_dir: Path) -> bool | None:
    """Tell whether the process that works on the run lives; None if it runs on another machine."""
    return locks.is_held(run_dir / ".lock")


@dataclass(frozen=True)
class Batch:
    """The batch jobs of a run, as far as they are known.

    Attributes
    ----------
    jobs
        The last job of each stage that was submitted.
    queue
        What of the run is in the queue; None: not known.
    """

    jobs: Mapping[str, int] = field(default_factory=dict)
    queue: Iterable[QueueStatus] | None = None

    def entry(self, stage: str, said: Record, alive: bool | None) -> Record:
        """Return what a stage's entry means, given what it says and whether its process lives.

        What waits in the queue goes on by itself, whatever ended it before; what has no job there
        does not.
        """
        job = self.jobs.get(stage)
        if job is None:
            return said
        state = said.get("state", "waiting")
        said = said | {"state": state}
        if alive or self.queue is None or state in ("done", "failed"):
            return said
        leads = [q for q in self.queue if q.role == LEADERS[stage]]
        never = [q.reason for q in leads if q.reason in NEVER_STARTS]
        if leads and not never:
            works = state == "running" and any(q.state != "PENDING" for q in leads)
            return said if works and alive is None else said | {"state": "waiting"}
        if state == "stopped" and said.get("error"):
            return said
        why = (
            f"job {job} is not in the queue any more: cancelled, or ended without a word; agq logs "
            "shows what it said, agq resume goes on"
        )
        if never:
            why = (
                f"job {job} waits in the queue and can never start ({never[0]}); agq cancel "
                "removes it, agq resume goes on"
            )
        return said | {"state": "stopped", "error": said.get("error") or why}


def stage_entries(
    record: Record, begun: Iterable[str], batch: Batch | None = None, alive: bool | None = None
) -> dict[str, Record]:
    """Return what is so of each stage, in the order of work.

    Parameters
    ----------
    record
        Record of the run, or its document in the ledger.
    begun
        Stages of which blocks have been begun.
    batch
        Batch jobs of the run.
    alive
        Whether the process that works on it lives; None: not known.
    """
    begun, batch = set(begun), batch or Batch()
    told = {
        name: dict(entry) for name, entry in record.get("stages", {}).items() if "state" in entry
    }
    for name in {*told, *batch.jobs} & LEADERS.keys():
        told[name] = batch.entry(name, told.get(name, {}), alive)
    names = {*told, *begun, *(_PARTS if "stitch" in told else ())}
    known = [*(n for n in _ORDER if n in names), *sorted(names.difference(_ORDER))]
    entries = {name: told.get(name, {}) for name in known}
    stitch = entries.get("stitch", {})
    for name in _PARTS:
        if name in entries and "state" not in entries[name] and "state" in stitch:
            # They run and end with the stitch.
            ready = name in begun or stitch["state"] == "done"
            entries[name] = {"state": stitch["state"] if ready else "waiting"}
            if name == "relabel" and "blocks_total" in stitch:
                entries[name]["blocks_total"] = stitch["blocks_total"]
    return entries


def run_state_of(entries: Iterable[Record], alive: bool | None) -> RunState:
    """Return the state of a run from what its stages say and whether its coordinator lives."""
    entries = list(entries)
    states = [entry.get("state") for entry in entries]
    if alive:
        return "running"
    if "running" in states:
        return "running" if alive is None else "stopped"
    if "failed" in states:
        return "failed"
    if "stopped" in states:
        return "stopped"
    if states and all(s == "done" for s in states):
        return "done"
    begun = "done" in states or any(entry.get("started") for entry in entries)
    return "waiting" if begun else "new"


def stage_status(
    name: str,
    entry: Record,
    progress: StageProgress | None,
    run_state: RunState,
    run_dir: Path,
    now: float,
    *,
    brief: bool = False,
) -> StageStatus:
    """Put one stage together.

    Parameters
    ----------
    entry : dict
        What the coordinator says of it: state, blocks_total, started, finished.
    progress : StageProgress or None
        What its blocks and workers say; None if it has no journal.
    brief
        Leave out failed blocks and workers.
    """
    totals = progress.progress(entry.get("started"), now) if progress else {}
    state = _stage_state(entry, totals, run_state)
    total = entry.get("blocks_total")
    if total is None and state == "done":
        # A stage of which nobody has counted the chunks, such as the pyramid, ends with all.
        total = int(totals.get("done", 0) + totals.get("skipped", 0)) or None
    started = entry.get("started") or totals.get("started") or None
    finished = entry.get("finished") or (
        None if state == "running" else totals.get("finished") or None
    )
    rates: Record = {}
    if totals and started:
        seconds = max((finished or now) - started, 1e-3)
        rates["blocks_per_s"] = totals["session"]["blocks"] / seconds
        rates["voxels_per_s"] = totals["session"]["voxels"] / seconds
        if state == "running":
            recent = totals["recent"]
            window = max(min(recent["seconds"], seconds), 1e-3)
            rates["blocks_per_s_now"] = recent["blocks"] / window
            rates["voxels_per_s_now"] = recent["voxels"] / window
            rate = rates["blocks_per_s_now"] or rates["blocks_per_s"]
            left = None if total is None else total - totals["done"] - totals["skipped"]
            rates["still_since"] = _still_since(totals, started, now)
            if left is not None and rate > 0 and rates["still_since"] is None:
                rates["eta_s"] = max(left, 0) / rate
    failed = progress if progress and totals.get("failed") and not brief else None
    names = ("done", "skipped", "failed", "voxels", "duplicates", "conflicts")
    return StageStatus(
        name=name,
        state=state,
        blocks_total=total,
        **{n: int(totals.get(n, 0)) for n in names},
        running=int(totals.get("running", 0)) if state == "running" else 0,
        **rates,
        started=started,
        finished=finished,
        error=entry.get("error"),
        **({n: entry.get(n) for n in _STEP} if state == "running" else {}),
        failures=tuple(map(failure_of, failed.failed(MAX_FAILURES))) if failed else (),
        errors=failure_groups(failed, name, run_dir) if failed else (),
        workers=_newest(
            worker_status(worker, run_state, now)
            for worker in (progress.workers.values() if progress and not brief else ())
        ),
    )


def _still_since(totals: Record, started: float, now: float) -> float | None:
    """Return when a stage last moved, if that is longer ago than its blocks let expect."""
    moved = max(started, totals["finished"])
    blocks = totals["session"]["blocks"]
    usual = (moved - started) / blocks if blocks else 0.0
    return moved if now - moved > max(RECENT_S, _STILL * usual) else None


def _stage_state(
    entry: Record, totals: Record, run_state: RunState
) -> Literal["waiting", "running", "stopped", "failed", "done"]:
    state = entry.get("state")
    if state == "running":
        return "running" if run_state == "running" else "stopped"
    if state in ("waiting", "stopped", "failed", "done"):
        return state
    if not totals:
        return "waiting"
    return "running" if run_state == "running" else "stopped"


def worker_status(worker: WorkerState, run_state: RunState, now: float) -> WorkerStatus:
    """Say of a worker what a status shows."""
    info = worker.info
    return WorkerStatus(
        name=info.name,
        host=info.host,
        pid=info.pid,
        device=info.device,
        job=info.job,
        state=_worker_state(worker, run_state, now),
        started=info.started,
        last=worker.last,
        done=worker.done,
        failed=worker.failed,
        gpu=info.gpu,
        current=tuple(sorted(worker.current, key=lambda block: worker.current[block][1])),
    )


def _worker_state(
    worker: WorkerState, run_state: RunState, now: float
) -> Literal["running", "silent", "ended"]:
    if worker.exit is not None or run_state != "running":
        return "ended"
    return "silent" if worker.is_silent(now) else "running"


def _with_stragglers(workers: list[WorkerStatus]) -> list[WorkerStatus]:
    """Mark running workers that are much slower than the middle one."""
    speed = {
        i: w.blocks_per_s
        for i, w in enumerate(workers)
        if w.state == "running" and w.done >= _MIN_DONE
    }
    if len(speed) < _MIN_WORKERS:
        return workers
    limit = statistics.median(speed.values()) / 2
    return [
        w.model_copy(update={"slow": True}) if speed.get(i, limit) < limit else w
        for i, w in enumerate(workers)
    ]


def _newest(workers: Iterable[WorkerStatus]) -> tuple[WorkerStatus, ...]:
    """Workers that have not ended first; a long run on a cluster has thousands that have."""
    marked = _with_stragglers(list(workers))
    ranked = sorted(marked, key=lambda w: (w.state == "ended", -w.last))[:_MAX_WORKERS]
    return tuple(sorted(ranked, key=lambda w: (w.state == "ended", w.name, w.started)))
