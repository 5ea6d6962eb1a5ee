"""The settings of a run on SLURM."""

import re
from typing import Annotated, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator

from agq.settings import Settings


def _like(pattern: str, expected: str) -> AfterValidator:
    """Return a check that a whole text has a form; `expected` says in the error which."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(expected)
        return value

    return AfterValidator(check)


Word = Annotated[str, _like(r"[^\s'\"\\#$`;]+", "one word without spaces, quotes, # or $")]
Memory = Annotated[str, _like(r"\d+[KMGT]?", "a number with K, M, G or T behind it, such as 32G")]
TimeLimit = Annotated[
    str,
    _like(
        r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}",
        "minutes, H:MM:SS or D-HH:MM:SS, in quotes, such as '4:00:00'",
    ),
]
Line = Annotated[str, _like(r"[^\n\0]*", "one line per entry")]
Container = Annotated[str, _like(r"(apptainer|singularity)://.+", "apptainer://path/to/image.sif")]


class CpuJobSettings(Settings):
    """A job without GPUs; what is left out is as for the workers."""

    partition: Word | None = None
    """Partition."""

    qos: Word | None = None
    """Quality of service."""

    constraint: Word | None = None
    """Features that the node must have."""

    cpus: PositiveInt = 2
    """CPU cores."""

    mem: Memory = "8G"
    """Memory."""

    time: TimeLimit | None = None
    """Time limit; the job is requeued before it is reached."""


class StitchJobSettings(CpuJobSettings):
    """The job that stitches, scores and draws."""

    cpus: PositiveInt = 8
    """CPU cores: one dask worker each, unless `jobs` is set."""

    mem: Memory = "32G"
    """Memory."""

    jobs: NonNegativeInt = 0
    """Further jobs of this size for dask's workers (dask-jobqueue, TLS); 0: this job's own
    cores."""


class SlurmSettings(Settings):
    """How `agq submit` asks SLURM for workers; it compares with what the cluster has."""

    workers: PositiveInt = 1
    """Worker jobs, each on one node; `agq scale` changes it later."""

    limit: PositiveInt | None = None
    """How many of them run at a time (%N of a job array); default: all."""

    gpus: NonNegativeInt = 1
    """GPUs per worker job, with one worker process each; 0: one process on CPUs."""

    gres: Word | None = None
    """Kind of GPU where the cluster has several: gpu:a100 (the count is `gpus`)."""

    cpus: PositiveInt = 4
    """CPU cores per worker process."""

    mem: Memory = "16G"
    """Memory per worker job."""

    time: TimeLimit | None = None
    """Time limit of a worker job; default: the partition's. A worker that reaches it is requeued
    and goes on."""

    partition: Word | None = None
    """Partition; default: the cluster's."""

    account: Word | None = None
    """Account."""

    qos: Word | None = None
    """Quality of service."""

    constraint: Word | None = None
    """Features that the node must have."""

    requeue: bool = True
    """Let jobs be requeued after a pre-emption, a node failure or their time limit."""

    lead_s: Annotated[int, Field(ge=10, le=3600)] = 120
    """Seconds before the time limit at which jobs are told (SIGUSR1): longer than one block takes,
    so that a worker can finish the blocks in hand."""

    grace_s: PositiveInt | None = None
    """Seconds between SIGTERM and SIGKILL; default: as the cluster says (KillWait, GraceTime)."""

    wait_s: PositiveInt = 900
    """How long workers wait for a coordinator that has gone, before they leave."""

    drain_after: NonNegativeInt = 5
    """Failures in a row after which a worker tests itself on a block that was computed before, and
    leaves if it cannot compute it; 0: never."""

    address: Word | None = None
    """Address, or name, of the coordinator's node on the network that the workers reach, for
    example its InfiniBand address; default: the address by which SLURM knows the node."""

    prologue: tuple[Line, ...] = ()
    """Shell lines at the start of every job, such as `module load cuda`."""

    container: Container | None = None
    """`apptainer://image.sif`: run inside this image."""

    container_options: tuple[Line, ...] = ()
    """Options of apptainer, such as `--bind=/scratch`; --nv is given where there are GPUs."""

    python: Line | None = None
    """Python that has agq-pipeline; default: the one that runs `agq submit`, or `python` in a
    container."""

    coordinator: CpuJobSettings = CpuJobSettings()
    """The job that hands out the blocks."""

    stitch: StitchJobSettings = StitchJobSettings()
    """The job that stitches."""

    @model_validator(mode="after")
    def _no_jobs_from_a_container(self) -> Self:
        if self.container is not None and self.stitch.jobs:
            raise ValueError(
                "stitch.jobs cannot be had with a container, which has no sbatch: give the stitch "
                "more cpus instead"
            )
        return self
