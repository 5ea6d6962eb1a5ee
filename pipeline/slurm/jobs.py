"""The jobs of a run: the record of all submissions; submit, scale and cancel."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from agq.blockwise.ledger.settings import LedgerSettings
from agq.blockwise.predict.paths import session_path
from agq.blockwise.storage import locks
from agq.blockwise.storage.addresses import put_away, put_back
from agq.blockwise.storage.files import make_folder, write_atomic
from agq.blockwise.storage.portable import from_portable, to_portable
from agq.errors import InputError
from agq.owners import require_closed, stranger
from agq.pipeline.folder import RunFolder, RunLockedError
from agq.pipeline.notify.kept import begin_attempt, keep_address
from agq.pipeline.slurm import client
from agq.pipeline.slurm.scripts import (
    Script,
    ScriptName,
    coordinator_script,
    folder,
    log_folder,
    stitch_script,
    submit_arguments,
    worker_script,
)
from agq.pipeline.status.run_status import QueueStatus
from agq.pipeline.status.stages import Batch, coordinator_alive
from agq.reading import DOCUMENT_BYTES, read_file, read_json

# `queue_status` needs no configuration: agq status does not wait for its import.
if TYPE_CHECKING:
    from agq.pipeline.config.schema import Config
    from agq.pipeline.slurm.settings import SlurmSettings

Role = Literal[ScriptName, "dask"]
"""Kinds of jobs; `dask` are workers of the stitch, which submits them itself."""
Stage = Literal["predict", "stitch"]

ENDING = ("COMPLETING", "CANCELLED", "COMPLETED")
"""States of jobs that are still in the queue, and do no more."""

_POLL_S = 0.5
_AGAIN_S = 1.0


class Job(BaseModel):
    """One submission."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int
    role: Role
    count: int = 1
    submitted: float

    user: int | None = None
    """Id of the user who submitted it; an earlier release did not say."""


class Jobs(BaseModel):
    """``slurm/jobs.json``: the submissions of a run."""

    model_config = ConfigDict(extra="forbid")

    here: str
    """Folder that relative paths of the configuration start from."""

    grace_s: int
    """Seconds that a worker has between SIGTERM and SIGKILL."""

    workers: int
    """How many worker jobs the user wants."""

    limit: int | None = None
    """How many of them may run at a time."""

    excluded: list[str] = []
    """Nodes that no further worker job gets, because those that it has had ended at their start."""

    cancelled: bool = False
    """Whether the user ended the run; its coordinator then does not come back."""

    jobs: list[Job] = []
    """Every submission, the oldest first."""

    def ids(self, *roles: Role) -> list[int]:
        """Return the job ids of some roles (none given: all)."""
        return [job.id for job in self.jobs if not roles or job.role in roles]

    def users(self) -> set[int]:
        """Return the user ids of those who submitted them."""
        return {job.user for job in self.jobs if job.user is not None}

    def latest(self, role: Role) -> int | None:
        """Return the last job of a role; None if there is none."""
        return next((job.id for job in reversed(self.jobs) if job.role == role), None)


def record_path(run_dir: Path) -> Path:
    """Return the file that holds `Jobs`."""
    return folder(run_dir) / "jobs.json"


def are_of_another(run_dir: Path) -> bool:
    """Tell whether the jobs are those of a run that this folder is a copy of."""
    run = RunFolder(run_dir)
    return run.exists() and not run.has_own_id(run.record())


def _not_submitted(run_dir: Path, path: Path) -> InputError:
    return InputError(
        f"{run_dir} was not submitted to SLURM ({path} does not exist); start it: agq submit"
    )


def load(run_dir: Path) -> Jobs:
    """Read what was submitted for a run.

    Raises
    ------
    InputError
        If nothing was submitted, or the file is damaged.
    """
    path = record_path(run_dir)
    try:
        jobs = Jobs.model_validate_json(read_file(path, most=DOCUMENT_BYTES, within=run_dir))
        owner = path.stat().st_uid
    except FileNotFoundError:
        raise _not_submitted(run_dir, path) from None
    except ValidationError:
        raise InputError(
            f"{path} is damaged, or another release wrote it; submit the run again: agq submit"
        ) from None
    jobs.jobs = [
        job if job.user is not None else job.model_copy(update={"user": owner}) for job in jobs.jobs
    ]
    return jobs


def save(run_dir: Path, jobs: Jobs) -> None:
    """Write the record, whole, for its owner alone to change."""
    write_atomic(record_path(run_dir), jobs.model_dump_json(indent=1).encode(), mode=0o644)


@contextmanager
def changing(run_dir: Path) -> Iterator[Jobs]:
    """Lock and load the record; save it at the end of the block."""
    make_folder(folder(run_dir), own=True)
    with locks.hold(folder(run_dir) / ".lock", wait=True):
        jobs = load(run_dir)
        yield jobs
        save(run_dir, jobs)


def live(jobs: Jobs, *roles: Role) -> list[client.QueueEntry]:
    """Return the entries in the queue of some roles (none given: all).

    Raises
    ------
    SlurmError
        If squeue cannot be asked.
    """
    return client.queue(jobs.ids(*roles), jobs.users())


def queue_status(run_dir: Path) -> tuple[QueueStatus, ...] | None:
    """Count the jobs of a run in the queue; None without a submission or without SLURM.

    Raises
    ------
    SlurmError
        If SLURM is here, and does not say.
    """
    try:
        jobs = load(run_dir)
    except InputError:
        return None
    if are_of_another(run_dir):
        return None
    try:
        entries = live(jobs)
    except client.SlurmMissingError:
        return None
    roles = {job.id: job.role for job in jobs.jobs}
    counts: Counter[tuple[str, str, str | None]] = Counter()
    for entry in entries:
        waits = entry.reason if entry.state == "PENDING" and entry.reason != "None" else None
        counts[roles[entry.job], entry.state, waits] += entry.count
    wanted = None
    if any(role == "coordinator" for role, _, _ in counts):
        wanted = jobs.workers
        alive = sum(n for (role, _, _), n in counts.items() if role == "workers")
        if lost := lacking(wanted, alive, jobs.limit):
            counts["workers", "MISSING", None] = lost
    return tuple(
        QueueStatus(
            role=role,
            state=state,
            reason=reason,
            count=n,
            wanted=wanted if role == "workers" else None,
            excluded=tuple(jobs.excluded) if role == "workers" else (),
        )
        for (role, state, reason), n in counts.items()
    )


def record_gone(run_dir: Path) -> None:
    """Record stages as stopped whose job can never do them: it has left the queue, or cannot start.

    So they are for those too who cannot ask the queue: on another machine, or from the ledger.
    Nothing is recorded if this user may not, if a process works on the run, or if SLURM does not
    say.
    """
    run, begun = RunFolder(run_dir), time.time()
    with suppress(InputError, OSError):
        if not os.access(run.record_path, os.W_OK) or stranger(run.record_path):
            return
        if not _gone(run):
            return
        # squeue does not show a job for a moment while it is requeued: ask twice.
        time.sleep(_AGAIN_S)
        _record_stopped(run, _gone(run), begun)


def _gone(run: RunFolder) -> dict[str, str]:
    """Return why stages cannot be done, by name, of which the record does not say so."""
    left = _open_stages(run)
    if not left or (queue := queue_status(run.path)) is None:
        return {}
    batch, alive = Batch(run.submitted(), queue), coordinator_alive(run.path)
    entries = {name: batch.entry(name, said, alive) for name, said in left.items()}
    return {name: str(e["error"]) for name, e in entries.items() if e["state"] == "stopped"}


def _open_stages(run: RunFolder) -> dict[str, dict[str, Any]]:
    """Return what the record says of the stages that were submitted and have not ended."""
    said = run.record()["stages"]
    entries = {name: said.get(name, {}) for name in run.submitted()}
    return {n: e for n, e in entries.items() if e.get("state") in (None, "waiting", "running")}


def _record_stopped(run: RunFolder, why: Mapping[str, str], since: float) -> None:
    from agq.pipeline.run.session import record_stop

    for stage, reason in why.items():
        record_stop(run, stage, reason, since, load_config(run.path).ledger)


def config_path(run_dir: Path) -> Path:
    """Return the configuration that the jobs read."""
    return folder(run_dir) / "config.json"


def save_config(config: "Config") -> None:
    """Write the resolved configuration for the jobs.

    Jobs may start hours later, from any environment, so the URI of the database is saved too. It
    may hold a password: it goes into a separate file that only its owner can read.
    """
    run_dir = Path(config.run_dir)
    data = _as_written(config)
    ledger = config.ledger or LedgerSettings()
    uri = ledger.resolve()
    if uri is not None and (ledger.uri_file is None or ledger.uri is not None):
        file = folder(run_dir) / "ledger-uri"
        write_atomic(file, uri.get_secret_value().encode(), mode=0o600)
        data["ledger"] = (data.get("ledger") or {}) | {"uri": None, "uri_file": str(file)}
    if (address := keep_address(run_dir, config.notify)) is not None:
        data["notify"] |= {"webhook": None, "webhook_file": str(address)}
    _write_config(run_dir, data)


def save_stitch_config(config: "Config") -> None:
    """Write the configuration for a stitch that waits for a prediction in the queue.

    Jobs of the prediction read the same file when they start or are requeued, so the new
    configuration replaces only the settings that the stitch alone uses.

    Raises
    ------
    InputError
        If the new configuration names another part of the volume.
    """
    run_dir = Path(config.run_dir)
    kept = load_config(run_dir)
    if config.input.roi != kept.input.roi:
        raise InputError(
            "input.roi: the prediction in the queue has another one; give the stitch the same, or "
            "submit it when the prediction has ended"
        )
    slurm = section_of(kept).model_copy(update={"stitch": section_of(config).stitch})
    of_stitch = {name: getattr(config, name) for name in ("stitch", "pyramid", "evaluate")}
    kept = kept.model_copy(update=of_stitch | {"slurm": slurm})
    _write_config(run_dir, _as_written(kept))


def _as_written(config: "Config") -> dict[str, Any]:
    """Return a configuration as plain data that leaves open what it leaves open."""
    return config.model_dump(mode="json", exclude_unset=True)


def _write_config(run_dir: Path, data: dict[str, Any]) -> None:
    path = config_path(run_dir)
    text = json.dumps(put_away(path, to_portable(data, run_dir)), indent=1)
    write_atomic(path, text.encode(), mode=0o644)


def load_config(run_dir: Path, *, trust: bool = False) -> "Config":
    """Read the configuration that `save_config` wrote.

    Raises
    ------
    InputError
        If it is missing or damaged, or somebody else's: it says what jobs run. With `trust` the
        owner does not matter.
    """
    from agq.pipeline.config.schema import Config

    path = config_path(run_dir)
    if not trust and (owner := stranger(path)):
        raise InputError(
            f"{path} belongs to {owner}, and decides what jobs run under your name; if you trust "
            f"them: agq resume {run_dir} --trust"
        )
    try:
        data = from_portable(
            read_json(path, within=run_dir, check=require_closed), run_dir.absolute()
        )
        data = put_back(path, data)
        # The folder may have been moved since an earlier release wrote this.
        return Config.model_validate(data | {"run_dir": str(run_dir.absolute())})
    except InputError:
        raise
    except FileNotFoundError:
        raise _not_submitted(run_dir, path) from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())[:300]}") from None


def adopt_config(run_dir: Path) -> None:
    """Make the configuration of jobs that a trusted user has written one's own."""
    if stranger(config_path(run_dir)):
        _write_config(run_dir, _as_written(load_config(run_dir, trust=True)))


def section_of(config: "Config") -> "SlurmSettings":
    """Return the `slurm` section; its defaults where the configuration has none."""
    from agq.pipeline.slurm.settings import SlurmSettings

    return config.slurm or SlurmSettings()


def scripts(config: "Config", stages: Sequence[Stage], here: Path) -> list[Script]:
    """Return the scripts of some stages in the order in which they are submitted."""
    section, run_dir = section_of(config), Path(config.run_dir)
    chosen = []
    if "predict" in stages:
        chosen += [
            coordinator_script(section, run_dir, here),
            worker_script(section, run_dir, here),
        ]
    if "stitch" in stages:
        chosen.append(stitch_script(section, run_dir, here))
    return chosen


def array(count: int, limit: int | None) -> str:
    """Return the array option of some worker jobs."""
    return f"0-{count - 1}" + (f"%{limit}" if limit else "")


def lacking(wanted: int, alive: int, limit: int | None) -> int:
    """Count the worker jobs to submit where some are in the queue.

    SLURM holds `limit` within one array; the jobs of another one would run beside it. So there are
    `limit` jobs at most then.
    """
    return max(0, (wanted if limit is None or not alive else min(wanted, limit)) - alive)


def numbers(entries: Sequence[client.QueueEntry]) -> str:
    """List the job ids of some entries."""
    return ", ".join(str(job) for job in sorted({entry.job for entry in entries}))


def refuse_live(run_dir: Path, jobs: Jobs, *roles: Role) -> None:
    """Refuse a submission while jobs of some roles (none given: all) are in the queue.

    Raises
    ------
    InputError
        Naming those jobs.
    """
    waiting = live(jobs, *roles)
    if waiting:
        raise InputError(
            f"{run_dir} has jobs in the queue ({numbers(waiting)}); "
            "agq attach follows them, agq scale changes their number, agq cancel ends them"
        )


def prediction_in_queue(run_dir: Path) -> int | None:
    """Return the job of the coordinator that is in the queue; None if the prediction is done.

    Raises
    ------
    InputError
        If the prediction is neither in the queue nor done.
    """
    if record_path(run_dir).exists() and (entries := live(load(run_dir), "coordinator")):
        return entries[-1].job
    run = RunFolder(run_dir)
    if run.exists() and run.record()["stages"].get("predict", {}).get("state") == "done":
        return None
    raise InputError(
        f"--after predict: no prediction of {run_dir} is in the queue or done; to submit both, "
        "leave out --after and --stage"
    )


def submit_all(
    config: "Config",
    stages: Sequence[Stage],
    *,
    wanted: int | None = None,
    workers: int | None = None,
    behind: int | None = None,
) -> list[Job]:
    """Submit the scripts of some stages in the run folder, chained by dependencies: all or none.

    Parameters
    ----------
    wanted
        How many worker jobs the run should have; default: as recorded.
    workers
        How many of them to submit now; default: all.
    behind
        Job of a prediction in the queue that a stitch alone waits for.

    Returns
    -------
    jobs
        What was submitted.

    Raises
    ------
    InputError
        If jobs for one of the stages are in the queue, or SLURM refuses.
    """
    from agq.blockwise.predict.spec import Session

    run_dir, section = Path(config.run_dir), section_of(config)
    make_folder(log_folder(run_dir))
    leads: dict[Stage, Role] = {"predict": "coordinator", "stitch": "stitch"}
    with changing(run_dir) as jobs:
        refuse_live(run_dir, jobs, *(leads[stage] for stage in stages))
        before = jobs.model_copy(deep=True)
        session = Session.load(run_dir) if "predict" in stages else None
        closed = session is not None and session.state == "closed"
        said = _mark_waiting(run_dir, stages)
        try:
            begin_attempt(run_dir)
            jobs.cancelled = False
            jobs.workers = jobs.workers if wanted is None else wanted
            jobs.limit = section.limit
            if "predict" in stages:
                jobs.excluded = []
            if closed:
                # Workers would read the end of the last submission as the end of this one.
                session_path(run_dir).unlink(missing_ok=True)
            count = jobs.workers if workers is None else workers
            for step in steps(section, stages, count):
                after = f"{step.after}:{behind}" if step.after and behind else None
                number = _submit(jobs, run_dir, section, step, after)
                behind = number if step.role == "coordinator" else behind
        except BaseException as error:
            _take_back(run_dir, before, jobs.jobs[len(before.jobs) :], error)
            _unmark(run_dir, said)
            if closed:
                Session(id="", state="closed").save(run_dir)
            raise
        return jobs.jobs[len(before.jobs) :]


def _take_back(run_dir: Path, before: Jobs, submitted: Sequence[Job], error: BaseException) -> None:
    """Cancel the jobs of a submission that failed half-way, and restore the record.

    Raises
    ------
    SlurmError
        Naming the jobs that are in the queue, if SLURM does not cancel them.
    """
    ids = [str(job.id) for job in submitted]
    try:
        client.cancel(ids)
    except client.SlurmError as refused:
        raise client.SlurmError(
            f"{error}; of this submission jobs {', '.join(ids)} are in the queue and could not be "
            f"cancelled ({refused}): scancel {' '.join(ids)}"
        ) from None
    save(run_dir, before)


@dataclass(frozen=True)
class Step:
    """One script of a submission.

    Attributes
    ----------
    count, array
        Number of jobs, and the option of sbatch for it; None for a single job.
    after
        Kind of the dependency on the coordinator: ``after`` its start, or ``afterany``.
    """

    role: ScriptName
    count: int = 1
    array: str | None = None
    after: str | None = None


def steps(section: "SlurmSettings", stages: Sequence[Stage], workers: int) -> list[Step]:
    """Return what is submitted for some stages, in this order."""
    chosen = []
    if "predict" in stages:
        chosen.append(Step("coordinator"))
        if workers > 0:
            chosen.append(Step("workers", workers, array(workers, section.limit), "after"))
    if "stitch" in stages:
        chosen.append(Step("stitch", after="afterany"))
    return chosen


def _mark_waiting(run_dir: Path, stages: Sequence[Stage]) -> dict[str, Any] | None:
    """Record that stages are to be done: what an earlier job said of them counts no more.

    Return what the record said of all stages; None if a prediction in the queue owns it. (That a
    stitch waits for that one is said by `Jobs`.)
    """
    run = RunFolder(run_dir)
    with suppress(RunLockedError), run.lock():
        said: dict[str, Any] = run.record()["stages"]
        for stage in stages:
            run.update_stage(stage, state="waiting", finished=None, error=None)
        return said
    return None


def _unmark(run_dir: Path, said: dict[str, Any] | None) -> None:
    """Restore what the record said before a submission that failed."""
    run = RunFolder(run_dir)
    if said is not None:
        with suppress(RunLockedError), run.lock():
            run.update(stages=said)


def submit_workers(
    jobs: Jobs, run_dir: Path, section: "SlurmSettings", count: int, *, after: str | None = None
) -> None:
    """Submit an array of worker jobs."""
    if count > 0:
        step = Step("workers", count, array(count, section.limit))
        _submit(jobs, run_dir, section, step, after)


def _submit(
    jobs: Jobs, run_dir: Path, section: "SlurmSettings", step: Step, after: str | None
) -> int:
    exclude = jobs.excluded if step.role == "workers" else ()
    arguments = submit_arguments(
        step.role, run_dir, section, array=step.array, after=after, exclude=exclude
    )
    number = client.submit(arguments)
    _record(jobs, step.role, number, step.count)
    # Saved at once: agq cancel ends only the jobs in this record.
    save(run_dir, jobs)
    return number


def _record(jobs: Jobs, role: Role, number: int, count: int = 1) -> None:
    now, user = time.time(), os.getuid()
    jobs.jobs.append(Job(id=number, role=role, count=count, submitted=now, user=user))


def submit_dask(run_dir: Path, arguments: Sequence[str | Path]) -> int:
    """Submit a job of dask workers with these arguments of sbatch; return its number.

    Raises
    ------
    InputError
        If SLURM refuses, or the run is cancelled.
    """
    with changing(run_dir) as jobs:
        if jobs.cancelled:
            raise InputError("the run is cancelled: no further dask workers")
        number = client.submit(arguments)
        _record(jobs, "dask", number)
        return number


def scale(run_dir: Path, count: int) -> tuple[int, int]:
    """Change the number of worker jobs.

    Surplus jobs that wait are cancelled first; surplus workers that run finish the blocks in hand
    and end.

    Returns
    -------
    before, now
        Worker jobs in the queue, waiting or running; with `slurm.limit`, none are added beyond it.

    Raises
    ------
    InputError
        If no prediction of the run is in the queue, or SLURM refuses.
    """
    config = load_config(run_dir)
    section = section_of(config)
    with changing(run_dir) as jobs:
        coordinator = live(jobs, "coordinator")
        if not coordinator:
            raise InputError(f"no prediction of {run_dir} is in the queue; start it: agq resume")
        entries = [e for e in live(jobs, "workers") if e.state not in ENDING]
        before = sum(e.count for e in entries)
        jobs.workers = count
        more = lacking(count, before, section.limit)
        submit_workers(jobs, run_dir, section, more, after=f"after:{coordinator[0].job}")
        surplus = before - count
        waiting: list[str] = []
        running: list[str] = []
        for entry in sorted(entries, key=lambda e: (e.state == "RUNNING", -e.job)):
            if surplus <= 0:
                break
            left = max(0, entry.count - surplus)
            surplus -= entry.count - left
            targets = running if entry.state == "RUNNING" else waiting
            targets.append(client.target(entry.job, entry.tasks[left:]))
        client.cancel(waiting)
        client.cancel(running, "--batch", "--signal=USR2")
    return before, min(before, count) + more


def cancel(run_dir: Path, *, wait_s: float = 30.0) -> int:
    """Cancel waiting jobs at once, let running ones finish their blocks, then kill the rest.

    Return how many jobs had not ended after `wait_s` seconds.

    Raises
    ------
    InputError
        If nothing was submitted, or SLURM does not answer or refuses: the run then goes on.
    """
    queued = sorted({str(entry.job) for entry in live(load(run_dir))})
    _set_cancelled(run_dir, True)
    try:
        client.cancel(queued, "--state=PENDING")
        entries = live(load(run_dir), "coordinator", "stitch")
        leading = {str(entry.job) for entry in entries if entry.state == "RUNNING"}
        client.cancel(sorted(leading), "--batch", "--signal=TERM")
    except BaseException:
        # The coordinator would take the next signal, as before its time limit, for the last one.
        _set_cancelled(run_dir, False)
        raise
    deadline = time.monotonic() + wait_s
    while (left := live(load(run_dir))) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    left = [e for e in left if e.state != "COMPLETING"]
    client.cancel(sorted({str(e.job) for e in left}))
    run = RunFolder(run_dir)
    with suppress(InputError, OSError):
        why = dict.fromkeys(_open_stages(run), "agq cancel has ended its job; agq resume goes on")
        _record_stopped(run, why, time.time())
    return sum(e.count for e in left)


def _set_cancelled(run_dir: Path, cancelled: bool) -> None:
    with changing(run_dir) as jobs:
        jobs.cancelled = cancelled
