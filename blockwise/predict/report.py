"""How far a prediction is, and how it ended."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PredictProgress:
    """Where a run is.

    Attributes
    ----------
    total
        Blocks that this call was given.
    done, skipped, failed
        Of those: computed, skipped (constant raw), and failed at the last attempt so far.
    voxels
        Voxels written.
    workers
        Worker processes of this machine.
    seconds
        Since the start of this call.
    """

    total: int
    done: int
    skipped: int
    failed: int
    voxels: int
    workers: int
    seconds: float


@dataclass(frozen=True)
class PredictReport:
    """How a run ended.

    Attributes
    ----------
    blocks
        Blocks that this call was given.
    done, skipped
        Blocks computed, and blocks skipped because their raw is constant.
    failed
        Numbers of the blocks that failed for good; their records are in the journal.
    voxels
        Voxels written.
    labels, dropped
        Labels found, and objects dropped by a limit of the predictor, in the blocks computed.
    retries
        Attempts that failed or were lost with their worker.
    workers_lost
        Worker processes that died and were replaced.
    read_s, compute_s, write_s
        Sums over the blocks; they overlap.
    wall_s
        Seconds from start to end.
    """

    blocks: int
    done: int
    skipped: int
    failed: tuple[int, ...]
    voxels: int
    labels: int
    dropped: int
    retries: int
    workers_lost: int
    read_s: float
    compute_s: float
    write_s: float
    wall_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return asdict(self) | {"failed": list(self.failed)}
