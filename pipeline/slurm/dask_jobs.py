"""Run dask workers of the stitch as SLURM jobs (dask-jobqueue), and replace lost jobs."""

import asyncio
import logging
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from dask_jobqueue.slurm import SLURMCluster, SLURMJob
from distributed import Client, Status
from distributed.security import Security

from agq import caches
from agq.blockwise.stitch.cluster import QuietScheduler
from agq.blockwise.storage.files import write_atomic
from agq.blockwise.threads import start_aside
from agq.errors import InputError, RunStoppedError
from agq.pipeline.slurm import client as slurm
from agq.pipeline.slurm import dask_worker
from agq.pipeline.slurm import jobs as records
from agq.pipeline.slurm.coordinator import listen_address
from agq.pipeline.slurm.scripts import folder, log_folder
from agq.pipeline.slurm.settings import SlurmSettings

UNKNOWN_ADDRESS = "tls://STITCH_NODE:PORT"
"""What is shown as the address of a scheduler that does not run yet."""

_CHECK_S = 15.0
_PAUSE_S = 10.0
_TELL_S = 300.0

_logger = logging.getLogger(__name__)


def jobqueue_options(section: SlurmSettings, run_dir: Path) -> dict[str, Any]:
    """Return dask-jobqueue's options for the worker jobs of the stitch."""
    job, qos = section.stitch, section.stitch.qos or section.qos
    logs = [f"--{name}=dask-worker-%J.{name[:3]}" for name in ("error", "output")]
    extra = ["--open-mode=append", *logs, *([f"--qos={qos}"] if qos else [])]
    if job.constraint:
        extra.append(f"--constraint={job.constraint}")
    return {
        "queue": job.partition or section.partition,
        "account": section.account,
        "cores": job.cpus,
        "processes": job.cpus,
        "job_cpu": job.cpus,
        "memory": f"{job.mem if job.mem[-1].isalpha() else job.mem + 'M'}iB",
        "job_mem": job.mem,
        # As in `stitch.cluster`: a task near the root may need more than an equal share.
        "worker_command": dask_worker.__name__,
        "worker_extra_args": ["--memory-limit", "0", "--nworkers", str(job.cpus)],
        "walltime": job.time,
        # Without a time, the limit of the partition instead of dask-jobqueue's half hour.
        "job_directives_skip": [] if job.time else ["#SBATCH -t "],
        "python": f"{shlex.quote(section.python or sys.executable)} -P",
        "job_extra_directives": extra,
        "job_script_prologue": list(section.prologue),
        "run_dir": run_dir,
        "sbatch_options": list(section.extra_of("stitch")),
    }


class WorkerJob(SLURMJob):
    """A job of dask workers, for any run folder.

    dask-jobqueue quotes no path, and it writes the script to a name in the temporary folder that
    was free a moment before, which somebody else could take. Its sbatch would take options from the
    environment, and nobody else would know of the job.

    Parameters
    ----------
    certificates
        Folder with the files that `write_certificates` makes.
    run_dir
        Run folder, whose record of jobs has this one.
    sbatch_options
        Further options of sbatch.
    """

    def __init__(
        self,
        *arguments: Any,
        certificates: str,
        run_dir: Path,
        sbatch_options: Sequence[str],
        **options: Any,
    ) -> None:
        words = ["--certificates", shlex.quote(certificates)]
        options["worker_extra_args"] = [*options["worker_extra_args"], *words]
        super().__init__(*arguments, **options)
        self.run_dir = run_dir
        self.sbatch_arguments = [f"--chdir={log_folder(run_dir)}", *sbatch_options]

    async def _submit_job(self, script_filename: str) -> str:
        arguments = [*self.sbatch_arguments, script_filename]
        try:
            return str(await asyncio.to_thread(records.submit_dask, self.run_dir, arguments))
        except InputError as error:
            raise RuntimeError(str(error)) from None  # what dask-jobqueue expects

    @classmethod
    async def _close_job(cls, job_id: str | None, _cancel_command: str) -> None:
        if job_id:
            with suppress(slurm.SlurmError):
                await asyncio.to_thread(slurm.cancel, [job_id])

    @contextmanager
    def job_file(self) -> Iterator[str]:
        """Yield the name of a file with the script."""
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(self.job_script())
            file.flush()
            yield file.name


def shown_job(section: SlurmSettings, run_dir: Path) -> WorkerJob:
    """Return such a job with words for what is known only when the stitch runs."""
    return WorkerJob(
        UNKNOWN_ADDRESS,
        "NAME",
        certificates=str(folder(run_dir) / "dask" / "CERTIFICATES"),
        **jobqueue_options(section, run_dir),
    )


class WorkerCluster(SLURMCluster):
    """A scheduler here, and its jobs."""

    job_cls = WorkerJob  # type: ignore[assignment]  # its constructor takes more

    def _get_worker_security(self, _security: Security) -> None:
        """Write no certificates (where $ and ~ in a path are expanded): jobs have theirs."""


def write_certificates(security: Security, folder: Path) -> None:
    """Write what workers need to be let in; only their owner can read it."""
    for name, text in security.get_tls_config_for_role("worker").items():
        if name in dask_worker.CERTIFICATES:
            write_atomic(folder / name, text.encode(), mode=0o600)


class WorkerJobs:
    """Keeps a number of worker jobs in the queue.

    dask-jobqueue submits a job once: after a time limit, an ``scancel`` or a crash the stitch would
    wait for workers that never come. (A job that SLURM requeues stays in the queue.)

    Parameters
    ----------
    logs
        Folder of the jobs' logs, which messages name.
    """

    def __init__(self, cluster: SLURMCluster, count: int, logs: Path) -> None:
        self.cluster = cluster
        self.count = count
        self.logs = logs
        self.in_vain = 0
        self._joined: set[str] = set()
        self._told = time.monotonic()
        self._not_before = 0.0

    def check(self) -> None:
        """Submit a job for each that has left the queue; warn if no worker is connected.

        Raises
        ------
        RunStoppedError
            If no worker is connected, and job after job ended before its workers connected.
        SlurmError
            If squeue cannot be asked.
        """
        jobs, here = self.cluster.sync(self._seen)
        # A job of several processes names its workers by its own name and a number.
        joined = {n for n in jobs if any(w == n or w.startswith(f"{n}-") for w in here)}
        if joined - self._joined:
            self._joined |= joined
            self.in_vain = 0
        entries = slurm.queue(job for job in jobs.values() if job is not None)
        queued = {entry.job for entry in entries}
        lost = {name: job for name, job in jobs.items() if job not in queued}
        if lost and time.monotonic() >= self._not_before:
            self._replace(lost, alone=not here)
        if here:
            self._told = time.monotonic()
        elif time.monotonic() - self._told > _TELL_S:
            self._told = time.monotonic()
            states = ", ".join(f"{e.job} {e.state} ({e.reason})" for e in entries)
            _logger.warning("the stitch waits for its dask workers; jobs: %s", states or "none")

    def _replace(self, lost: dict[str, int | None], *, alone: bool) -> None:
        for name, job in lost.items():
            self.in_vain += name not in self._joined
            what = "was refused" if job is None else f"{job} has left the queue"
            _logger.warning("dask worker job %s; submitting another", what)
        if alone and self.in_vain >= 3 * self.count:
            raise RunStoppedError(
                f"{self.in_vain} dask worker jobs were refused, or ended before their workers "
                f"joined; see {self.logs} (stitch-*.log, dask-worker-*.err), then resume"
            )
        # A pause: other workers may go on while jobs fail at once on one bad node.
        self._not_before = time.monotonic() + min(_PAUSE_S * self.in_vain, _TELL_S)
        self.cluster.sync(self._forget, lost)
        self.cluster.scale(jobs=self.count)

    def close(self) -> None:
        """Forget jobs that were refused: closing the cluster would fail because of them."""
        jobs, _ = self.cluster.sync(self._seen)
        self.cluster.sync(self._forget, [name for name, job in jobs.items() if job is None])

    async def _seen(self) -> tuple[dict[str, int | None], set[str]]:
        """Return the jobs by name and the names of workers; dask changes both in its own thread."""
        # A job is listed once sbatch has ended; without a number it was refused.
        listed = self.cluster.workers.items()
        jobs = {str(name): int(job.job_id) if job.job_id else None for name, job in listed}
        workers = self.cluster.scheduler_info["workers"].values()
        return jobs, {str(worker["name"]) for worker in workers}

    async def _forget(self, names: Collection[str]) -> None:
        # Out of both, so that the next job gets a new name: the scheduler refuses a worker with the
        # name of one that it has not yet given up.
        for name in [key for key in self.cluster.workers if str(key) in names]:
            self.cluster.worker_spec.pop(name, None)
            self.cluster.workers.pop(name).status = Status.closed


@contextmanager
def _watched(jobs: WorkerJobs) -> Iterator[None]:
    """Check the jobs every `_CHECK_S`; raise in the main thread if all end without working."""
    over = threading.Event()
    errors: list[RunStoppedError] = []

    def watch() -> None:
        while not over.wait(_CHECK_S):
            try:
                jobs.check()
            except RunStoppedError as error:
                errors.append(error)
                os.kill(os.getpid(), signal.SIGUSR2)
                return
            # Whatever SLURM or dask say now, lost jobs must still be replaced later.
            except Exception as error:
                _logger.warning("dask worker jobs: %s: %s", type(error).__name__, error)

    def stop(_signum: int, _frame: FrameType | None) -> None:
        if errors:
            raise errors[0]

    before = signal.signal(signal.SIGUSR2, stop)
    thread = start_aside("dask-worker-jobs", watch)
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR2, before)


@contextmanager
def jobqueue_client(section: SlurmSettings, run_dir: Path) -> Iterator[Client]:
    """Yield a dask client whose workers are SLURM jobs, on TLS with certificates of this run.

    dask runs the code that it is sent, so a scheduler on a network without TLS would let any other
    user run programs as this one. Only for the main thread.

    Raises
    ------
    RunStoppedError
        In the block, if job after job ends before its workers connect.
    """
    # Those of a stitch that was killed: their scheduler has gone.
    slurm.cancel([entry.target for entry in records.live(records.load(run_dir), "dask")])
    secrets = folder(run_dir) / "dask"
    secrets.mkdir(exist_ok=True)
    secrets.chmod(0o700)
    security = Security.temporary()
    with ExitStack() as stack:
        certificates = stack.enter_context(tempfile.TemporaryDirectory(dir=secrets))
        write_certificates(security, Path(certificates))
        cluster = stack.enter_context(
            WorkerCluster(
                **jobqueue_options(section, run_dir),
                certificates=certificates,
                security=security,
                scheduler_cls=QuietScheduler,
                scheduler_options={
                    "host": listen_address(section),
                    "dashboard": False,
                    "local_directory": str(caches.temporary_folder()),
                },
            )
        )
        cluster.scale(jobs=section.stitch.jobs)
        jobs = WorkerJobs(cluster, section.stitch.jobs, log_folder(run_dir))
        try:
            with _watched(jobs), Client(cluster) as client:
                yield client
        finally:
            jobs.close()
