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

_TIMES: Final = ("started", "finished")

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
    fields: Document = {
        "state": "queued" if record.state == BlockState.OPEN.word else record.state,
        "started": float(record.started),
        "finished": float(record.finished),
        "reason": record.reason and storable(record.reason),
    }
    for name in ("read_s", "compute_s", "write_s"):
        fields[name] = float(getattr(record, name))
    for name in ("labels", "dropped", "voxels"):
        fields[name] = min(int(getattr(record, name)), _I64)
    if record.state == "failed":
        earlier = [*earlier, (record, worker)]
        fields["error"] = record.error and storable(record.error)
        fields["roi"] = record.roi and {
            "offset": list(record.roi[0]),
            "shape": list(record.roi[1]),
        }
    return _block(run, stage, record.block, record.order, fields, earlier)


def begin_update(
    run: str,
    stage: str,
    block: int,
    begun: Order,
    *,
    earlier: Sequence[Attempt] = (),
) -> UpdateOne:
    """Update that marks a block as running, unless it has ended; `earlier` as in `block_update`."""
    fields: Document = {"state": "running", "started": float(begun.time)}
    return _block(run, stage, block, begun, fields, earlier)


def _block(
    run: str,
    stage: str,
    block: int,
    order: Order,
    fields: Document,
    earlier: Sequence[Attempt],
) -> UpdateOne:
    name = f"{run}/{stage}/{block}"
    # Documents count from 1: 0 is for a block that is queued. A later revision comes first.
    rank = _STATES * order.revision + order.state + 1
    attempt = min(order.attempt, _I64)
    document = {
        "_id": name,
        "run": run,
        "stage": stage,
        "block": block,
        "attempt": attempt,
        "token": order.token,
        # An array, as in the documents of earlier releases: those held the whole key.
        "order": [rank],
        # There are millions of them: what is not there takes no room.
        **{name: value for name, value in fields.items() if value or name in _TIMES},
    }
    # In a pipeline a value such as "$5 off" would be a field path: hence $literal. What is missing
    # is smaller than any number, so the first write of a block always counts.
    key = [rank, float(order.time), attempt, order.token]
    time = {"$ifNull": ["$finished", {"$ifNull": ["$started", 0.0]}]}
    present = [{"$arrayElemAt": ["$order", 0]}, time, "$attempt", "$token"]
    newer = {"$gt": [{"$literal": key}, present]}
    merged: list[Document] = [{"$cond": [newer, {"$literal": document}, "$$ROOT"]}]
    # By a key of its own for each attempt, so that their order and repetition do not matter.
    added = {f"{r.token}-{min(r.attempt, _I64)}": _attempt(r, w) for r, w in earlier}
    kept = {"attempts": {"$mergeObjects": ["$attempts", {"$literal": added}]}}
    merged.append(kept if added else {"$cond": [{"$gt": ["$attempts", None]}, kept, {}]})
    return UpdateOne({"_id": name}, [{"$replaceWith": {"$mergeObjects": merged}}], upsert=True)


def give_back_update(run: str, stage: str, block: int, token: str) -> UpdateOne:
    """Update that marks a block as queued, if it says that a process works on it that has ended."""
    begun = {"_id": f"{run}/{stage}/{block}", "state": "running", "token": token}
    return UpdateOne(begun, {"$set": {"state": "queued"}})


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
