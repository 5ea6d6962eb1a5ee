"""How far a stage is, as the ledger says it."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from pydantic import TypeAdapter

from agq.blockwise.journal.progress import RECENT_S
from agq.blockwise.journal.records import BlockRecord, BlockState, require_time
from agq.blockwise.journal.tail import WorkerState
from agq.blockwise.ledger.database import Ledger
from agq.blockwise.ledger.updates import Document
from agq.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

_INFO: Final = ("name", "host", "pid", "device", "job", "started", "gpu", "gpu_bytes")
_STATE: Final = ("token", "last", "done", "skipped", "failed", "voxels", "exit")
_ROW: Final = ("block", "started", "finished", "labels", "dropped", "voxels")
#: All rows are read again after so many seconds.
_ROWS_S: Final = 15.0
_MAX_FAILURES: Final = 10_000
_UNENDED: Final = ("queued", "running")
_WORKER: Final = TypeAdapter(WorkerState)


class LedgerStage:
    """The documents of one stage; a `StageProgress`, as the `Journal` is.

    Attributes
    ----------
    workers : dict of str to WorkerState
        By token, as of the last call of `refresh`.

    Raises
    ------
    PyMongoError
        From every method, if the database is away.
    InputError
        If the document of a worker or a failed block is none that a run has written.
    """

    def __init__(
        self, ledger: Ledger, run: str, stage: str, totals: Document | None = None
    ) -> None:
        self.workers: dict[str, WorkerState] = {}
        self._ledger = ledger
        self._key = run, stage
        self._totals = totals or {}
        self._rows: npt.NDArray[Any] | None = None
        self._rows_read = 0.0

    def refresh(self, totals: Document) -> None:
        """Take the totals that the document of the run has now, and read the workers."""
        self._totals = totals
        documents = self._ledger.find_workers(*self._key)
        workers = [_worker(document) for document in documents if "last" in document]
        self.workers = {worker.token: worker for worker in workers}

    def progress(self, since: float | None, now: float) -> Document:
        """Return the totals as they are now.

        A minute that has passed since they were sent is one without blocks, and where all workers
        are silent or have ended, nobody works on one.
        """
        totals = self._totals
        if now - totals.get("updated", 0.0) > RECENT_S:
            totals = totals | {"recent": {"seconds": RECENT_S, "blocks": 0, "voxels": 0}}
        if not any(w.exit is None and not w.is_silent(now) for w in self.workers.values()):
            totals = totals | {"running": 0}
        return totals

    def failed(self, limit: int | None = None) -> list[BlockRecord]:
        """Return the records of the first failed blocks."""
        documents = self._ledger.find_blocks(*self._key, "failed", limit or _MAX_FAILURES)
        return [self._record(document) for document in documents]

    def reasons(self) -> Iterable[tuple[str, int, int]]:
        """Yield the errors as the database groups them: a million blocks may have failed."""
        with _reading("blocks of", "/".join(self._key)):
            yield from self._ledger.failure_reasons(*self._key)

    def record(self, block: int) -> BlockRecord | None:
        """Return the record of a block that has ended."""
        document = self._ledger.find_block(*self._key, block)
        if document is None or document["state"] in _UNENDED:
            return None
        return self._record(document)

    def running(self, now: float) -> list[int]:
        """Return the blocks begun and not ended, of workers that are not silent."""
        alive = [worker for worker in self.workers.values() if not worker.is_silent(now)]
        return [block for worker in alive for block in worker.current]

    @property
    def rows(self) -> "npt.NDArray[Any]":
        """What the documents of ended blocks say, as rows of a journal's table."""
        import numpy as np

        from agq.blockwise.journal.table import ROW

        if self._rows is None or time.monotonic() - self._rows_read >= _ROWS_S:
            documents = list(self._ledger.ended_blocks(*self._key, (*_ROW, "state")))
            self._rows = np.zeros(len(documents), ROW)
            for row, document in zip(self._rows, documents, strict=True):
                row["rank"] = BlockState.of(document["state"])
                for name in _ROW:
                    row[name] = document.get(name) or 0
            self._rows_read = time.monotonic()
        return self._rows

    def _record(self, document: Document) -> BlockRecord:
        """Return what a document says; the worker is named in a document of its own."""
        with _reading("block", document["_id"]):
            roi = document.get("roi")
            values = {k: v for k, v in document.items() if v is not None}
            worker = self.workers.get(document["token"])
            if worker is not None:
                values["worker"] = worker.info.name
            return BlockRecord.from_dict(values | {"roi": roi and (roi["offset"], roi["shape"])})

    @property
    def version(self) -> float:
        """When the rows were read."""
        return self._rows_read


def _worker(document: Document) -> WorkerState:
    with _reading("worker", document["_id"]):
        current = {c["block"]: (c["attempt"], c["begun"]) for c in document.get("current", ())}
        for _, begun in current.values():
            require_time(begun)
        info = {n: document[n] for n in _INFO if n in document}
        state = {n: document[n] for n in _STATE if n in document}
        return _WORKER.validate_python(state | {"info": info, "current": current})


@contextmanager
def _reading(what: str, name: object) -> Iterator[None]:
    """Name the document that is none of ours: whoever may write to the database writes anything."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"{what} {str(name)[:200]} of the database is damaged ({reason})"
        ) from None
