"""What runs in the stitch job: stitch, pyramid, scores and picture.

Steps that are done stay done, so a requeued job goes on. Ends with 75 before its time limit
(SIGUSR1): the batch script then requeues the job.
"""

import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed import Client

from blockwise.errors import InputError, RunStoppedError
from model.errors import ModelInputError
from pipeline import stages
from pipeline.config import Config
from pipeline.prepare import prepare
from pipeline.run_folder import RunLockedError
from pipeline.session import open_session
from pipeline.slurm.coordinator import listen_address
from pipeline.slurm.jobs import load_config, section_of
from pipeline.slurm.scripts import EXIT_REQUEUE, folder, log_folder
from pipeline.slurm.section import SlurmSection

_LOCKED_S = 5.0

_logger = logging.getLogger(__name__)


def jobqueue_options(section: SlurmSection, run_dir: Path) -> dict[str, Any]:
    """Return what dask-jobqueue needs to know to submit worker jobs of the stitch."""
    job, qos = section.stitch, section.stitch.qos or section.qos
    extra = ["--open-mode=append", *([f"--qos={qos}"] if qos else [])]
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
        # As in `blockwise.cluster`: a task near the root may need more than an equal share.
        "worker_extra_args": ["--memory-limit", "0"],
        "walltime": job.time,
        # Its default of half an hour is for nobody: without a time, the partition's.
        "job_directives_skip": [] if job.time else ["#SBATCH -t "],
        "python": shlex.quote(section.python or sys.executable),
        "job_extra_directives": extra,
        "job_script_prologue": list(section.prologue),
        "log_directory": str(log_folder(run_dir)),
    }


@contextmanager
def jobqueue_client(section: SlurmSection, run_dir: Path) -> Iterator[Client]:
    """Yield a dask client whose workers are SLURM jobs, on TLS with certificates of this run.

    dask's protocol runs what it is sent, so a scheduler on a network without TLS would let anybody
    run programs as this user.
    """
    from dask_jobqueue import SLURMCluster

    secrets = folder(run_dir) / "dask"
    secrets.mkdir(mode=0o700, exist_ok=True)
    with SLURMCluster(
        **jobqueue_options(section, run_dir),
        security=True,
        shared_temp_directory=str(secrets),
        scheduler_options={"host": listen_address(section), "dashboard_address": "127.0.0.1:0"},
    ) as cluster:
        cluster.scale(jobs=section.stitch.jobs)
        with Client(cluster) as client:
            yield client


def _with_own_cores(config: Config) -> Config:
    """Let the local cluster have the cores of the job, not those of the node."""
    dask = config.stitch.dask
    cores = os.environ.get("SLURM_CPUS_PER_TASK")
    if dask.workers is not None or dask.address is not None or cores is None:
        return config
    section = config.stitch.model_copy(
        update={"dask": dask.model_copy(update={"workers": int(cores)})}
    )
    return config.model_copy(update={"stitch": section})


def _stitch(run_dir: Path) -> None:
    config = _with_own_cores(load_config(run_dir))
    section = section_of(config)
    prepared = prepare(config, workers_here=False)
    while True:
        try:
            with open_session(prepared) as session:
                client = jobqueue_client(section, run_dir) if section.stitch.jobs else None
                stages.stitch(session, client=client)
                stages.score(session)
                stages.picture(session)
            return
        except RunLockedError as error:
            _logger.warning("%s", error)
            time.sleep(_LOCKED_S)


def _requeue_before_limit(signum: int, _frame: Any) -> None:
    raise SystemExit(EXIT_REQUEUE)


def main(arguments: list[str]) -> int:
    """Stitch; see the module."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGUSR1, _requeue_before_limit)
    try:
        _stitch(Path(arguments[0]))
    except (InputError, ModelInputError, RunStoppedError) as error:
        _logger.error("%s", " ".join(str(error).split()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
