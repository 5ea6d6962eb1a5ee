"""The settings of a run on SLURM."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator

from agq.settings import Host, Settings


def _like(pattern: str, expected: str) -> AfterValidator:
    """Return a check that a whole text has a form; `expected` says in the error which."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(expected)
        return value

    return AfterValidator(check)


_one_word = _like(r"[^\s'\"\\#$`;]+", "one word without spaces, quotes, # or $")
Word = Annotated[str, _one_word]
Memory = Annotated[str, _like(r"\d+[KMGT]?", "a number with K, M, G or T behind it, such as 32G")]
TimeLimit = Annotated[
    str,
    _like(
        r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}",
        "minutes, H:MM:SS or D-HH:MM:SS, in quotes, such as '4:00:00'",
    ),
]
Line = Annotated[str, _like(r"[^\n\0]*", "one line per entry")]

# By the field of a job that says it: what the scripts and the submission set. Without a field:
# what no field may change, and what makes sbatch do something else than submit.
_OWN_OPTIONS = {
    "account": "account",
    "constraint": "constraint",
    "cpus": "cpus-per-task",
    "gpus": "gres gpus gpus-per-node gpus-per-socket gpus-per-task",
    "lead_s": "signal",
    "mem": "mem mem-per-cpu mem-per-gpu",
    "partition": "partition",
    "qos": "qos",
    "requeue": "requeue no-requeue",
    "time": "time",
    "workers": "array",
    "": "chdir clusters dependency error help input job-name kill-on-invalid-dep nodes ntasks "
    "open-mode output parsable test-only usage version wait wrap",
}


def _extra_option(value: str) -> str:
    """Check one option of sbatch: none that agq sets itself, in full or shortened."""
    found = re.fullmatch(r"--([a-z][a-z0-9-]*)(=[^\n\0]*)?", value)
    if found is None:
        raise ValueError(
            "one long option of sbatch per entry, with = before its value, such as --reservation=x"
        )
    for field, names in _OWN_OPTIONS.items():
        # sbatch takes every beginning of a name.
        if own := next((name for name in names.split() if name.startswith(found[1])), None):
            raise ValueError(f"agq sets --{own} itself" + (f": use `{field}`" if field else ""))
    return value


ExtraOption = Annotated[str, AfterValidator(_extra_option)]
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

    extra: tuple[ExtraOption, ...] | None = None
    """Further options of sbatch, as `slurm.extra`, in its place; `[]`: none."""


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

    extra: tuple[ExtraOption, ...] = ()
    """Further options of sbatch, such as `--reservation=x`, `--exclude=n12`, `--mail-type=END`, for
    jobs that have no `extra` of their own. Those that agq sets itself are refused."""

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

    address: Annotated[Host, _one_word] | None = None
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

    price_per_gpu_hour: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Money for an hour of one GPU, in any currency: `agq plan` then says what a run will cost."""

    coordinator: CpuJobSettings = CpuJobSettings()
    """The job that hands out the blocks."""

    stitch: StitchJobSettings = StitchJobSettings()
    """The job that stitches."""

    def extra_of(self, role: Literal["coordinator", "workers", "stitch"]) -> tuple[str, ...]:
        """Return the further options of sbatch for one kind of job."""
        job = {"coordinator": self.coordinator, "stitch": self.stitch}.get(role)
        return self.extra if job is None or job.extra is None else job.extra

    @model_validator(mode="after")
    def _no_jobs_from_a_container(self) -> Self:
        if self.container is not None and self.stitch.jobs:
            raise ValueError(
                "stitch.jobs cannot be had with a container, which has no sbatch: give the stitch "
                "more cpus instead"
            )
        return self
