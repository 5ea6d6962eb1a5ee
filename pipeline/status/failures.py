"""The failed blocks of a stage by error."""

import re
from collections import Counter
from pathlib import Path
from typing import Any, Final

from agq.blockwise.journal.progress import StageProgress
from agq.blockwise.journal.records import BlockRecord
from agq.blockwise.predict.paths import TASK, log_name, log_path
from agq.blockwise.volumes.triples import show_voxel, triple, voxel_at
from agq.pipeline.status.run_status import Failure, FailureGroup, StageStatus

MAX_FAILURES: Final = 20
MAX_GROUPS: Final = 10
_NUMBER: Final = re.compile(r"\d+(?:\.\d+)?")


def failure_groups(progress: StageProgress, stage: str, run_dir: Path) -> tuple[FailureGroup, ...]:
    """Group all failed blocks by error, the most frequent errors first."""
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for reason, count, block in progress.reasons():
        kind = error_kind(reason)
        counts[kind] += count
        first[kind] = min(block, first.get(kind, block))
    # By block where two are as many, so that journal and ledger give the same order.
    kinds = sorted(counts, key=lambda kind: (-counts[kind], first[kind]))[:MAX_GROUPS]
    examples = ((kind, progress.record(first[kind])) for kind in kinds)
    return tuple(
        _group(failure_of(record), counts[kind], stage, run_dir)
        for kind, record in examples
        if record is not None
    )


def failure_of(record: BlockRecord) -> Failure:
    """Return what a status shows of a failed block."""
    offset, shape = record.roi or (None, None)
    return Failure(
        block=record.block,
        attempt=record.attempt,
        reason=record.reason,
        error=record.error,
        offset=offset,
        shape=shape,
        worker=record.worker or None,
    )


def placed(stage: StageStatus, record: dict[str, Any]) -> StageStatus:
    """Return a stage whose failures say where they are, if the record of the run has its grid."""
    if not stage.errors or stage.name == "pyramid":  # its numbers are no blocks
        return stage
    try:
        grid = (record.get("identity") or record)["grid"]
        where = triple(grid["voxel_size"]), triple(grid["offset"])
        unit = str(record["config"]["input"]["raw"].get("unit", "nm"))
    except (KeyError, TypeError, AttributeError, ValueError):
        return stage

    def at(failure: Failure) -> Failure:
        if failure.offset is None or failure.shape is None:
            return failure
        middle = [o + n // 2 for o, n in zip(failure.offset, failure.shape, strict=True)]
        place = show_voxel(voxel_at(middle, *where), where[0], unit, where[1])
        return failure.model_copy(update={"place": place})

    groups = [g.model_copy(update={"example": at(g.example)}) for g in stage.errors]
    failures = tuple(map(at, stage.failures))
    return stage.model_copy(update={"errors": tuple(groups), "failures": failures})


def error_kind(summary: str) -> str:
    """Return what the errors of many blocks have in common: not their numbers."""
    return _NUMBER.sub("#", summary)


def _group(example: Failure, count: int, stage: str, run_dir: Path) -> FailureGroup:
    # Only workers of the prediction have logs of their own.
    has_log = example.worker and stage == TASK
    log = log_path(run_dir, log_name(example.worker or "")) if has_log else None
    return FailureGroup(
        summary=example.summary, count=count, example=example, log=None if log is None else str(log)
    )
