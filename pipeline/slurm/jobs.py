"""The jobs of a run: which were submitted, which are in the queue; submit, scale, cancel."""

import fcntl
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from agq.blockwise.predict.paths import session_path
from agq.blockwise.storage.files import make_folder, write_atomic
from agq.errors import InputError
from agq.pipeline.folder import RunFolder
from agq.pipeline.slurm import client
from agq.pipeline.slurm.scripts import (
    Script,
    coordinator_script,
    folder,
    log_folder,
    stitch_script,
    submit_arguments,
    worker_script,
)
from agq.pipeline.status.run_status import QueueStatus

# Whoever only asks for the queue, such as a status, needs no configuration.
if TYPE_CHECKING:
    from agq.pipeline.config.schema import Config
    from agq.pipeline.slurm.settings import SlurmSection

Role = Literal["coordinator", "workers", "stitch"]
Stage = Literal["predict", "stitch"]

_POLL_S = 0.5


class Job(BaseModel):
    """One submission."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int
    role: Role
    count: int = 1
    submitted: float


class Jobs(BaseModel):
    """``slurm/jobs.json``: what the run has asked of SLURM."""

    model_config = ConfigDict(extra="forbid")

    here: str
    """Folder that relative paths of the configuration start from."""

    grace_s: int
    """Seconds that a worker has between SIGTERM and SIGKILL."""

    workers: int
    """How many worker jobs the user wants."""

    cancelled: bool = False
    """The user has ended the run: a coordinator that is terminated does not expect to come back."""

    jobs: list[Job] = []
    """Every submission, the oldest first."""

    def ids(self, *roles: Role) -> list[int]:
        """Return the job ids of some roles (none given: all)."""
        return [job.id for job in self.jobs if not roles or job.role in roles]

    def latest(self, role: Role) -> int | None:
        """Return the last job of a role."""
        return next((job.id for job in reversed(self.jobs) if job.role == role), None)


def record_path(run_dir: Path) -> Path:
    """Return the file that holds `Jobs`."""
    return folder(run_dir) / "jobs.json"


def load(run_dir: Path) -> Jobs:
    """Read what was submitted for a run.

    Raises
    ------
    InputError
        If nothing was, or the file is damaged.
    """
    path = record_path(run_dir)
    try:
        return Jobs.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{run_dir} was not submitted to SLURM (no {path})") from None
    except ValidationError:
        raise InputError(f"{path} is damaged or of another release") from None


@contextmanager
def changing(run_dir: Path) -> Iterator[Jobs]:
    """Load the record, alone, and save what was changed."""
    make_folder(folder(run_dir))
    with (folder(run_dir) / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobs = load(run_dir)
        yield jobs
        write_atomic(record_path(run_dir), jobs.model_dump_json(indent=1).encode())


def live(jobs: Jobs, *roles: Role) -> list[client.QueueEntry]:
    """Return what is in the queue of some roles (none given: all).

    Raises
    ------
    SlurmError
        If squeue cannot be asked.
    """
    return client.queue(jobs.ids(*roles))


def queue_status(run_dir: Path) -> tuple[QueueStatus, ...] | None:
    """Count the jobs of a run in the queue; None where there is no submission or no SLURM."""
    try:
        jobs = load(run_dir)
        entries = live(jobs)
    except InputError:
        return None
    roles = {job.id: job.role for job in jobs.jobs}
    counts: Counter[tuple[str, str, str | None]] = Counter()
    for entry in entries:
        waits = entry.reason if entry.state == "PENDING" and entry.reason != "None" else None
        counts[roles[entry.job], entry.state, waits] += entry.count
    return tuple(
        QueueStatus(role=role, state=state, reason=reason, count=n)
        for (role, state, reason), n in counts.items()
    )


def config_path(run_dir: Path) -> Path:
    """Return the configuration that the jobs read."""
    return folder(run_dir) / "config.json"


def save_config(config: "Config") -> None:
    """Write the resolved configuration for the jobs.

    A database URI may hold a password: it goes into a file of its own that only its owner can
    read, and is needed there because jobs may start hours later, from any environment.
    """
    run_dir = Path(config.run_dir)
    data: dict[str, Any] = config.model_dump(mode="json")
    ledger = config.ledger
    uri = None if ledger is None else ledger.resolve()
    if ledger is None:
        from agq.blockwise.ledger.settings import LedgerSettings

        uri = LedgerSettings().resolve()
    if uri is not None and (ledger is None or ledger.uri_file is None or ledger.uri is not None):
        file = folder(run_dir) / "ledger-uri"
        write_atomic(file, uri.get_secret_value().encode(), mode=0o600)
        given = {} if data["ledger"] is None else data["ledger"]
        data["ledger"] = given | {"uri": None, "uri_file": str(file)}
    write_atomic(config_path(run_dir), json.dumps(data, indent=1).encode())


def save_stitch_config(config: "Config") -> None:
    """Write the configuration for a stitch that waits for a prediction in the queue.

    The prediction's jobs read the same file, and those that start later or are requeued have not
    done so yet: only what the stitch alone needs is taken from the new configuration.

    Raises
    ------
    InputError
        If the stitch is to be of another part of the volume.
    """
    run_dir = Path(config.run_dir)
    kept = load_config(run_dir)
    if config.input.roi != kept.input.roi:
        raise InputError(
            "input.roi: the prediction in the queue has another one; submit the stitch with that, "
            "or when the prediction has ended"
        )
    slurm = section_of(kept).model_copy(update={"stitch": section_of(config).stitch})
    own = {name: getattr(config, name) for name in ("stitch", "pyramid", "evaluate")}
    data = kept.model_copy(update={**own, "slurm": slurm}).model_dump(mode="json")
    write_atomic(config_path(run_dir), json.dumps(data, indent=1).encode())


def load_config(run_dir: Path) -> "Config":
    """Read the configuration that `save_config` wrote.

    Raises
    ------
    InputError
        If it is missing or damaged.
    """
    from agq.pipeline.config.schema import Config

    path = config_path(run_dir)
    try:
        return Config.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())[:300]}") from None


def section_of(config: "Config") -> "SlurmSection":
    """Return the `slurm` section; its defaults where the configuration has none."""
    from agq.pipeline.slurm.settings import SlurmSection

    return config.slurm or SlurmSection()


def scripts(config: "Config", stages: Sequence[Stage], here: Path) -> list[Script]:
    """Return the scripts of some stages in the order in which they are submitted."""
    section, run_dir = section_of(config), Path(config.run_dir)
    found = []
    if "predict" in stages:
        found += [coordinator_script(section, run_dir, here), worker_script(section, run_dir, here)]
    if "stitch" in stages:
        found.append(stitch_script(section, run_dir, here))
    return found


def array(count: int, limit: int | None) -> str:
    """Return the array option of some worker jobs."""
    return f"0-{count - 1}" + (f"%{limit}" if limit else "")


def refuse_live(run_dir: Path, jobs: Jobs, stages: Sequence[Stage]) -> None:
    """Refuse a submission that would do what jobs in the queue do already.

    Raises
    ------
    InputError
        Naming them; a stitch may be added to a prediction.
    """
    waiting = live(jobs) if "predict" in stages else live(jobs, "stitch")
    if waiting:
        raise InputError(
            f"{run_dir} has jobs in the queue ({', '.join(e.target for e in waiting[:4])}); "
            "agq attach follows them, agq scale changes their number, agq cancel ends them"
        )


def prediction_in_queue(run_dir: Path) -> int | None:
    """Return the job of the coordinator that is in the queue; None if the prediction is done.

    Raises
    ------
    InputError
        If it is neither.
    """
    job = load(run_dir).latest("coordinator") if record_path(run_dir).exists() else None
    if job is not None and client.queue([job]):
        return job
    run = RunFolder(run_dir)
    if run.exists() and run.record()["stages"].get("predict", {}).get("state") == "done":
        return None
    raise InputError("--after predict: no prediction of this run is in the queue")


def submit_all(config: "Config", stages: Sequence[Stage], *, after_predict: bool = False) -> Jobs:
    """Submit the scripts that lie in the run folder, chained by dependencies.

    Parameters
    ----------
    config
        The run.
    stages
        What to do.
    after_predict
        Let the stitch wait for a prediction that is in the queue already.

    Raises
    ------
    InputError
        If jobs of the run are in the queue, or SLURM refuses.
    """
    from agq.blockwise.predict.spec import Session

    run_dir, section = Path(config.run_dir), section_of(config)
    make_folder(log_folder(run_dir))
    with changing(run_dir) as jobs:
        refuse_live(run_dir, jobs, stages)
        jobs.cancelled = False
        before = None
        if "predict" in stages:
            session = Session.load(run_dir)
            if session is not None and session.state == "closed":
                # Workers would take the end of the last submission for that of this one.
                session_path(run_dir).unlink(missing_ok=True)
            before = _submit(jobs, run_dir, "coordinator")
            submit_workers(jobs, run_dir, section, jobs.workers, after=f"after:{before}")
        elif after_predict:
            before = prediction_in_queue(run_dir)
        if "stitch" in stages:
            _submit(jobs, run_dir, "stitch", after=f"afterok:{before}" if before else None)
    return jobs


def submit_workers(
    jobs: Jobs, run_dir: Path, section: "SlurmSection", count: int, *, after: str | None = None
) -> None:
    """Submit an array of worker jobs."""
    if count > 0:
        _submit(jobs, run_dir, "workers", array=array(count, section.limit), after=after, n=count)


def _submit(
    jobs: Jobs,
    run_dir: Path,
    role: Role,
    *,
    array: str | None = None,
    after: str | None = None,
    n: int = 1,
) -> int:
    script = Script(role, "")
    number = client.submit(submit_arguments(script, run_dir, array=array, after=after))
    jobs.jobs.append(Job(id=number, role=role, count=n, submitted=time.time()))
    # At once: a job that nobody knows of could not be cancelled.
    write_atomic(record_path(run_dir), jobs.model_dump_json(indent=1).encode())
    return number


def scale(run_dir: Path, count: int) -> tuple[int, int]:
    """Change the number of worker jobs.

    Workers that are too many take no more blocks, finish those in hand and end; waiting ones are
    cancelled first.

    Returns
    -------
    before, now
        Worker jobs in the queue, waiting or running.

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
        entries = live(jobs, "workers")
        entries = [e for e in entries if e.state not in ("COMPLETING", "CANCELLED", "COMPLETED")]
        before = sum(e.count for e in entries)
        jobs.workers = count
        if count > before:
            submit_workers(
                jobs, run_dir, section, count - before, after=f"after:{coordinator[0].job}"
            )
        surplus = before - count
        for entry in sorted(entries, key=lambda e: (e.state == "RUNNING", -e.job)):
            for target in reversed(_tasks(entry)):
                if surplus <= 0:
                    break
                surplus -= 1
                if entry.state == "RUNNING":
                    client.cancel([target], "--batch", "--signal=USR2")
                else:
                    client.cancel([target])
    return before, count


def _tasks(entry: client.QueueEntry) -> list[str]:
    """Every array task of an entry as a target of its own."""
    if not entry.task.startswith("["):
        return [entry.target]
    found = []
    for part in entry.task.strip("[]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        found += [f"{entry.job}_{n}" for n in range(int(first), int(last or first) + 1)]
    return found


def cancel(run_dir: Path, *, wait_s: float = 30.0) -> int:
    """End all jobs of a run: waiting ones at once, running ones gracefully, then hard.

    Parameters
    ----------
    run_dir
        Run folder.
    wait_s
        Seconds for running jobs to finish the blocks in hand.

    Returns
    -------
    killed
        Jobs that had to be cancelled hard.
    """
    with changing(run_dir) as jobs:
        jobs.cancelled = True
    everything = [str(n) for n in sorted({e.job for e in live(jobs)})]
    client.cancel(everything, "--state=PENDING")
    first = {str(e.job) for e in live(jobs, "coordinator", "stitch") if e.state == "RUNNING"}
    client.cancel(sorted(first), "--batch", "--signal=TERM")
    deadline = time.monotonic() + wait_s
    while (left := live(jobs)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    left = [e for e in left if e.state != "COMPLETING"]
    client.cancel(sorted({str(e.job) for e in left}))
    return sum(e.count for e in left)
