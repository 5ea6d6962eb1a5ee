"""What `agq status` knows of a run, as plain data; its JSON form is stable."""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from agq.blockwise.journal.records import error_line
from agq.pipeline.status.notices import Notice
from agq.tables import Tabled

if TYPE_CHECKING:
    from rich.console import RenderableType

RunState = Literal["new", "waiting", "running", "stopped", "failed", "done"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Failure(_Model):
    """A block that is failed now."""

    block: int
    attempt: int
    """The attempt that failed last."""
    reason: str | None = None
    """One line, if the worker gave one."""
    error: str | None = None
    offset: tuple[float, ...] | None = None
    """First corner of the write ROI in world units, z, y, x."""
    shape: tuple[float, ...] | None = None
    """Extent of the write ROI in world units, z, y, x."""
    worker: str | None = None
    place: str | None = None
    """The middle of the block, in voxels and world units."""

    @property
    def summary(self) -> str:
        """The error in one line."""
        return self.reason or error_line(self.error)


class FailureGroup(_Model):
    """Blocks that are failed now by one kind of error: texts that differ in numbers alone."""

    summary: str
    """The error in one line, as in the example."""
    count: int
    example: Failure
    """The first of them by number."""
    log: str | None = None
    """Log of the worker of the example, where it has one of its own."""


class WorkerStatus(_Model):
    """One process that works, or has worked, on a stage."""

    name: str
    host: str
    pid: int
    device: str
    job: str | None = None
    state: Literal["running", "silent", "ended"]
    """Silent: not ended, but without a word for longer than its blocks take."""
    started: float
    """Seconds since the epoch."""
    last: float
    """Time of its last journal line, seconds since the epoch."""
    done: int
    failed: int
    current: tuple[int, ...] = ()
    """Blocks begun and not ended, the oldest first."""
    gpu: str | None = None
    slow: bool = False
    """A straggler: less than half as many blocks per second as the middle one of the workers."""

    @property
    def blocks_per_s(self) -> float:
        """Blocks done per second since it started."""
        return self.done / max(self.last - self.started, 1e-3)


class QueueStatus(_Model):
    """Batch jobs of a run that wait or run, by kind."""

    role: str
    """coordinator, workers, stitch, or dask (workers of the stitch)."""
    state: str
    """As the batch system says: PENDING, RUNNING, COMPLETING, ...; MISSING: workers that are wanted
    and not in the queue, which the coordinator submits again."""
    reason: str | None = None
    """Why they wait, as the batch system says: Resources, Priority, ..."""
    count: int
    wanted: int | None = None
    """How many worker jobs the run should have; None for other jobs, or without a coordinator."""
    excluded: tuple[str, ...] = ()
    """Nodes that worker jobs do not get any more, because they ended there at their start."""


class StageStatus(_Model):
    """One stage of a run."""

    name: str
    state: Literal["waiting", "running", "stopped", "failed", "done"]
    """Stopped: it was under way when its process ended."""
    blocks_total: int | None = None
    """Blocks of the whole stage; None if unknown."""
    done: int = 0
    skipped: int = 0
    """Blocks skipped (no tissue, constant raw)."""
    failed: int = 0
    """Blocks failed at their last attempt."""
    running: int = 0
    """Blocks begun and not ended."""
    voxels: int = 0
    blocks_per_s: float | None = None
    """Blocks done per second since the stage was started last."""
    blocks_per_s_now: float | None = None
    """The same over the last minute."""
    voxels_per_s: float | None = None
    """Voxels per second since the stage was started last."""
    voxels_per_s_now: float | None = None
    """The same over the last minute."""
    eta_s: float | None = None
    """Seconds left at the present rate; None if unknown or over."""
    still_since: float | None = None
    """When the last block ended, or the stage began, if none has ended for a minute and three times
    as long as usual: nobody knows then how much time is left. Seconds since the epoch."""
    started: float | None = None
    """When it was started last, seconds since the epoch."""
    finished: float | None = None
    """When it ended, seconds since the epoch."""
    duplicates: int = 0
    """Blocks done by two processes."""
    conflicts: int = 0
    """Of those, blocks whose results differ: a fault to report."""
    error: str | None = None
    """The error that stopped the stage, if it recorded one."""
    failures: tuple[Failure, ...] = ()
    """The first failed blocks by number; `failed` counts all of them."""
    workers: tuple[WorkerStatus, ...] = ()
    """Workers that have not ended, and the latest of those that have."""
    errors: tuple[FailureGroup, ...] = ()
    """All failed blocks by kind of error, the most frequent kinds first."""
    step: str | None = None
    """What a running stage is at, such as ``contacts`` of the stitch."""
    step_done: int | None = None
    """Items of the step that are done, of `step_total`."""
    step_total: int | None = None

    @property
    def ended_blocks(self) -> int:
        """Blocks that need no more work."""
        return self.done + self.skipped


class ForecastStatus(_Model):
    """One measure of a run: what was expected of it when it was begun, and what it was."""

    name: str
    """gpu_hours (worker_hours: of processes without GPUs), cost, predict_s (from the first block to
    the last), stitch_s (with the pyramid), evaluate_s, disk_bytes or files."""
    forecast: float
    fact: float | None = None
    """None as long as it is not known."""


class RunStatus(_Model, Tabled):
    """A run at one moment."""

    format: Literal[1] = 1
    """Version of this form."""
    id: str
    name: str
    run_dir: str
    state: RunState
    """Running while a coordinator lives; stopped if it ended in the middle of a stage, or if the
    batch job of a stage has gone without doing it. Waiting: stages are done, and the next one was
    submitted and has not begun. New: none has begun."""
    source: Literal["ledger", "journal"]
    """Where the numbers are from."""
    note: str | None = None
    """Anything that a reader should know of the source."""
    created: float | None = None
    """When the run was made, seconds since the epoch."""
    updated: float
    """When the numbers were true, seconds since the epoch."""
    stages: tuple[StageStatus, ...] = ()
    """In the order of work."""
    queue: tuple[QueueStatus, ...] | None = None
    """Its batch jobs; None for a run that was not submitted, without a batch system, or if
    `queue_error` is set."""
    queue_error: str | None = None
    """Why its batch jobs are not known now."""
    notices: tuple[Notice, ...] = ()
    """Messages of the last command or submission, the section `notify` of its configuration."""
    user: str | None = None
    """Who gave the last command on it."""
    heard: float | None = None
    """When it was heard of last, by a line of its journals or in the ledger, seconds since the
    epoch."""

    forecast: tuple[ForecastStatus, ...] = ()
    """The forecast that the run was begun with beside the facts; empty without one."""

    @property
    def has_jobs(self) -> bool:
        """Whether batch jobs of the run are in the queue, or may be for all that is known."""
        if self.queue_error is None:
            return bool(self.queue)
        return self.state != "done" or all(stage.name != "stitch" for stage in self.stages)

    @property
    def may_go_on(self) -> bool:
        """Whether jobs may go on with the run, for all that is known of the queue."""
        return self.queue_error is not None and self.state != "done"

    def table(self) -> "RenderableType":
        """Return the status for a rich console."""
        from agq.pipeline.status.text import render

        return render(self)
