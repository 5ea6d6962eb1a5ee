"""The parts of a run's status: stages and workers, from journal or ledger."""

import fcntl
import socket
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from agq.pipeline.status.run_status import (
    Failure,
    FailureGroup,
    RunState,
    StageStatus,
    WorkerStatus,
)

if TYPE_CHECKING:
    from agq.blockwise.journal.writer import Journal, WorkerState

_ORDER: Final = ("predict", "stitch", "relabel", "pyramid", "evaluate")
_RECENT_S: Final = 60.0
_SILENT_S: Final = 120.0
_MAX_WORKERS: Final = 200
_MIN_DONE: Final = 3
_MIN_WORKERS: Final = 3

Record = dict[str, Any]


def coordinator_alive(run_dir: Path) -> bool | None:
    """Tell whether the process that works on the run lives; None if it runs on another machine.

    The run's lock is tried only if the process that took it last lives: a coordinator that starts
    at this moment may want a free lock.
    """
    try:
        with (run_dir / ".lock").open(encoding="utf-8") as lock:
            host, pid = lock.read().removeprefix("host ").split(", pid ")
            if host != socket.gethostname():
                return None
            import psutil

            if not psutil.pid_exists(int(pid)):
                return False
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except (OSError, ValueError):
        return None


def stage_entries(record: Record, journals: Iterable[str]) -> dict[str, Record]:
    """Stages that were begun, in the order of work, with what the coordinator says of them."""
    stages: Record = record.get("stages", {})
    names = {*stages, *journals}
    entries = {n: dict(stages.get(n, {})) for n in sorted(names, key=_place)}
    stitch = entries.get("stitch", {})
    for name in ("relabel", "pyramid"):
        if name in entries and "state" not in entries[name]:
            # Parts of the stitch: they run and end with it.
            entries[name] = {k: v for k, v in stitch.items() if k == "state"}
            if name == "relabel" and "blocks_total" in stitch:
                entries[name]["blocks_total"] = stitch["blocks_total"]
    return entries


def _place(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)


def run_state_of(entries: Iterable[Record], alive: bool | None) -> RunState:
    """Return the state of a run from what its stages say and whether its coordinator lives."""
    states = [entry.get("state") for entry in entries]
    if alive:
        return "running"
    if "running" in states:
        return "running" if alive is None else "stopped"
    if "failed" in states:
        return "failed"
    if "stopped" in states:
        return "stopped"
    return "done" if states and all(s == "done" for s in states) else "new"


def journal_totals(journal: "Journal", entry: Record, now: float) -> Record:
    """Add up a journal, in the form in which the ledger keeps totals."""
    totals: Record = {**journal.counts(), **journal.totals()}
    since = entry.get("started") or totals["started"]
    blocks, voxels = journal.recent(since)
    recent_blocks, recent_voxels = journal.recent(now - _RECENT_S)
    return totals | {
        "running": len(journal.running()),
        "duplicates": len(journal.duplicates),
        "conflicts": len(journal.conflicts),
        "session": {"blocks": blocks, "voxels": voxels},
        "recent": {"seconds": _RECENT_S, "blocks": recent_blocks, "voxels": recent_voxels},
    }


def ledger_totals(totals: Record, entry: Record, now: float) -> Record:
    """Totals of the ledger; a minute that has passed since then is a minute without blocks."""
    if not totals:
        return {}
    if now - totals.get("updated", 0.0) > _RECENT_S:
        totals = totals | {"recent": {"seconds": _RECENT_S, "blocks": 0, "voxels": 0}}
    return totals


def stage_status(
    name: str,
    entry: Record,
    totals: Record,
    run_state: RunState,
    *,
    failures: tuple[Failure, ...],
    errors: tuple[FailureGroup, ...],
    workers: tuple[WorkerStatus, ...],
    now: float,
) -> StageStatus:
    """Put one stage together.

    Parameters
    ----------
    name : str
        Stage.
    entry : dict
        What the coordinator says of it: state, blocks_total, started, finished.
    totals : dict
        What its journal adds up to; empty where it has none.
    run_state : str
        State of the run.
    failures, errors, workers
        The first of its failed blocks, all of them by error, and its workers.
    now : float
        Seconds since the epoch.
    """
    state = _stage_state(entry, totals, run_state)
    total = entry.get("blocks_total")
    started = entry.get("started") or totals.get("started") or None
    finished = entry.get("finished") or (
        None if state == "running" else totals.get("finished") or None
    )
    rates: Record = {}
    if totals and started:
        seconds = max((finished or now) - started, 1e-3)
        session: Record = totals["session"]
        rates["blocks_per_s"] = session.get("blocks", 0) / seconds
        rates["voxels_per_s"] = session.get("voxels", 0) / seconds
        if state == "running":
            recent = totals["recent"]
            window = max(min(recent["seconds"], seconds), 1e-3)
            rates["blocks_per_s_now"] = recent["blocks"] / window
            rates["voxels_per_s_now"] = recent["voxels"] / window
            rate = rates["blocks_per_s_now"] or rates["blocks_per_s"]
            left = None if total is None else total - totals["done"] - totals["skipped"]
            if left is not None and rate > 0:
                rates["eta_s"] = max(left, 0) / rate
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
        failures=failures,
        errors=errors,
        workers=workers,
    )


def _stage_state(
    entry: Record, totals: Record, run_state: RunState
) -> Literal["waiting", "running", "stopped", "failed", "done"]:
    state = entry.get("state")
    if state == "running":
        return "running" if run_state == "running" else "stopped"
    if state in ("stopped", "failed", "done"):
        return state
    if not totals:
        return "waiting"
    return "running" if run_state == "running" else "stopped"


def workers_of_states(
    workers: "Iterable[WorkerState]", run_state: RunState, now: float
) -> tuple[WorkerStatus, ...]:
    """Workers of a journal."""
    return _newest(
        WorkerStatus(
            name=w.info.name,
            host=w.info.host,
            pid=w.info.pid,
            device=w.info.device,
            job=w.info.job,
            state=_worker_state(w.exit, w.last, w.info.started, w.done, run_state, now),
            started=w.info.started,
            last=w.last,
            done=w.done,
            failed=w.failed,
            gpu=w.info.gpu,
            current=tuple(sorted(w.current, key=lambda b: w.current[b][1])),
        )
        for w in workers
    )


def workers_of_documents(
    documents: Iterable[Record], run_state: RunState, now: float
) -> tuple[WorkerStatus, ...]:
    """Workers of ledger documents."""
    names = ("name", "host", "pid", "device", "job", "started", "last", "done", "failed")
    return _newest(
        WorkerStatus(
            **{n: d.get(n) for n in names},
            gpu=d.get("gpu"),
            state=_worker_state(d["exit"], d["last"], d["started"], d["done"], run_state, now),
            current=tuple(c["block"] for c in d.get("current", ())),
        )
        for d in documents
        if "last" in d
    )


def _worker_state(
    exit_reason: str | None, last: float, started: float, done: int, run_state: RunState, now: float
) -> Literal["running", "silent", "ended"]:
    if exit_reason is not None or run_state != "running":
        return "ended"
    usual = (last - started) / done if done else 0.0
    return "silent" if now - last > max(_SILENT_S, 5 * usual) else "running"


def _with_stragglers(workers: list[WorkerStatus]) -> list[WorkerStatus]:
    """Mark running workers that are much slower than the middle one."""
    speed = {
        i: w.done / max(w.last - w.started, 1e-3)
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
