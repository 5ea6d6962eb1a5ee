"""Updates that make ledger documents say what the journal says, unless they say newer things."""

from collections.abc import Sequence
from typing import Any, Final

from pymongo import UpdateOne

from agq.blockwise.journal.records import BlockRecord, BlockState, Order, WorkerInfo
from agq.blockwise.ledger.settings import storable

_I64: Final = 2**63 - 1
_MAX_ERROR: Final = 4096
_STATES: Final = 8
"""More than there are states."""

Document = dict[str, Any]
Attempt = tuple[BlockRecord, WorkerInfo | None]


def block_update(
    run: str,
    stage: str,
    record: BlockRecord,
    worker: WorkerInfo | None = None,
    *,
    earlier: Sequence[Attempt] = (),
) -> UpdateOne:
    """Update that brings a block's document to a record, unless it is newer already.

    Parameters
    ----------
    record : BlockRecord
        End of an attempt; a failed one is also kept among the block's ``attempts``.
    earlier : sequence of (BlockRecord, WorkerInfo or None)
        Further failed attempts, to keep.
    """
    if record.state == "failed":
        earlier = [*earlier, (record, worker)]
    fields: Document = {
        "state": "queued" if record.state == BlockState.OPEN.word else record.state,
        "reason": record.reason and storable(record.reason),
        "error": record.error and storable(record.error),
        "roi": record.roi and {"offset": list(record.roi[0]), "shape": list(record.roi[1])},
        "sums": {k.replace(".", "_"): v for k, v in record.sums.items()},
    }
    for name in ("started", "finished", "read_s", "compute_s", "write_s"):
        fields[name] = float(getattr(record, name))
    for name in ("labels", "components", "dropped", "voxels"):
        fields[name] = min(int(getattr(record, name)), _I64)
    return _block(run, stage, record.block, record.order, worker, fields, earlier)


def begin_update(
    run: str,
    stage: str,
    block: int,
    begun: Order,
    worker: WorkerInfo | None = None,
    *,
    earlier: Sequence[Attempt] = (),
) -> UpdateOne:
    """Update that marks a block as running, unless it has ended; `earlier` as in `block_update`."""
    fields: Document = {"state": "running", "started": begun.time}
    return _block(run, stage, block, begun, worker, fields, earlier)


def _block(
    run: str,
    stage: str,
    block: int,
    order: Order,
    worker: WorkerInfo | None,
    fields: Document,
    earlier: Sequence[Attempt],
) -> UpdateOne:
    name = f"{run}/{stage}/{block}"
    # Documents count from 1: 0 is for a block that is queued. A later revision comes first.
    key = [
        _STATES * order.revision + order.state + 1,
        float(order.time),
        min(order.attempt, _I64),
        order.token,
    ]
    document = fields | {
        "_id": name,
        "run": run,
        "stage": stage,
        "block": block,
        "attempt": key[2],
        "token": order.token,
        "worker": worker and storable(worker.name),
        "host": worker and storable(worker.host),
        "device": worker and worker.device,
        "job": worker and worker.job,
        "order": key,
    }
    # In a pipeline a value such as "$5 off" would be a field path: hence $literal. A missing
    # order is smaller than any array, so the first write of a block always counts.
    newer = {"$gt": [{"$literal": key}, "$order"]}
    kept = {"$cond": [newer, {"$literal": document}, "$$ROOT"]}
    # By a key of its own for each attempt, so that their order and repetition do not matter.
    kept_attempts = {"$ifNull": ["$attempts", {"$literal": {}}]}
    added = {f"{r.token}-{min(r.attempt, _I64)}": _attempt(r, w) for r, w in earlier}
    history = {"attempts": {"$mergeObjects": [kept_attempts, {"$literal": added}]}}
    whole = {"$mergeObjects": [kept, history]}
    return UpdateOne({"_id": name}, [{"$replaceWith": whole}], upsert=True)


def _attempt(record: BlockRecord, worker: WorkerInfo | None) -> Document:
    """Return what is kept of a failed attempt."""
    return {
        "attempt": min(record.attempt, _I64),
        "worker": worker and storable(worker.name),
        "host": worker and storable(worker.host),
        "job": worker and worker.job,
        "device": worker and worker.device,
        "gpu": worker and worker.gpu,
        **{n: float(getattr(record, n)) for n in ("started", "finished")},
        "reason": record.reason and storable(record.reason),
        "error": record.error and storable(record.error)[-_MAX_ERROR:],
    }


def worker_update(
    run: str, stage: str, file: str, fields: Document, *, read: int, delivered: int
) -> UpdateOne:
    """Update of a worker's document.

    Parameters
    ----------
    fields : dict
        What the first `read` bytes of the file say.
    read, delivered : int
        Bytes of the file read, and of them delivered to the blocks collection.
    """
    key = f"{run}/{stage}/{file}"
    document = fields | {"_id": key, "run": run, "stage": stage, "file": file, "read": read}
    newer = {"$gte": [read, {"$ifNull": ["$read", -1]}]}
    merged = [
        "$$ROOT",
        {"$cond": [newer, {"$literal": document}, {}]},
        {"delivered": {"$max": ["$delivered", delivered]}},
    ]
    return UpdateOne({"_id": key}, [{"$replaceWith": {"$mergeObjects": merged}}], upsert=True)
