"""The failed blocks of a stage, listed and by error, from journal or ledger."""

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agq.blockwise.predict.paths import TASK, log_name, log_path
from agq.pipeline.status.run_status import Failure, FailureGroup, error_line

if TYPE_CHECKING:
    from agq.blockwise.journal.writer import BlockRecord, Journal
    from agq.blockwise.ledger.database import Ledger

MAX_FAILURES: Final = 20
MAX_GROUPS: Final = 10
_NUMBER: Final = re.compile(r"\d+(?:\.\d+)?")

Record = dict[str, Any]
Failures = tuple[tuple[Failure, ...], tuple[FailureGroup, ...]]


def failure_of_record(record: "BlockRecord") -> Failure:
    """Failure of a journal record."""
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


def failure_of_document(document: Record) -> Failure:
    """Failure of a ledger document."""
    roi: Record = document.get("roi") or {}
    return Failure(
        **{k: document.get(k) for k in ("block", "attempt", "reason", "error", "worker")},
        offset=roi.get("offset"),
        shape=roi.get("shape"),
    )


def failures_of_journal(journal: "Journal", stage: str, run_dir: Path) -> Failures:
    """Return the first failed blocks of a journal, and all of them by error."""
    records = journal.failed()
    first = tuple(failure_of_record(r) for r in records[:MAX_FAILURES])
    counts: Counter[str] = Counter()
    examples: dict[str, BlockRecord] = {}
    for record in records:
        key = error_kind(record.reason or error_line(record.error))
        counts[key] += 1
        examples.setdefault(key, record)
    kinds = counts.most_common(MAX_GROUPS)
    return first, tuple(
        _group(failure_of_record(examples[key]), count, stage, run_dir) for key, count in kinds
    )


def failures_of_ledger(ledger: "Ledger", run: str, stage: str, run_dir: Path) -> Failures:
    """Return the same from the ledger, which groups them: there may be a million."""
    first = ledger.find_blocks(run, stage, "failed", MAX_FAILURES)
    counts: Counter[str] = Counter()
    blocks: dict[str, int] = {}
    for reason, count, block in ledger.failure_reasons(run, stage):
        key = error_kind(reason)
        counts[key] += count
        blocks[key] = min(block, blocks.get(key, block))
    # By block where two are as many: the ledger has no order, a journal this one.
    kinds = sorted(counts.items(), key=lambda item: (-item[1], blocks[item[0]]))[:MAX_GROUPS]
    examples = ledger.blocks_of(run, stage, [blocks[key] for key, _ in kinds])
    groups = [
        _group(failure_of_document(examples[blocks[key]]), count, stage, run_dir)
        for key, count in kinds
        if blocks[key] in examples
    ]
    return tuple(failure_of_document(d) for d in first), tuple(groups)


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
