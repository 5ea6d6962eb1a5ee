"""Journals and ledgers for tests: what each says of the blocks, in one form."""

import threading
import time
import uuid

from pydantic import SecretStr

from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.ledger.database import Ledger
from agq.blockwise.ledger.settings import LedgerSettings

WORKER = WorkerInfo(name="w0", host="node1", pid=12, device="cuda:0", job="77", started=1.5)
PASSWORD = "p@ss/w0rd %$x"
QUOTED = "p%40ss%2Fw0rd%20%25%24x"


def settings_for(uri: str, **kwargs) -> LedgerSettings:
    kwargs = {"timeout_s": 1.0, "interval_s": 0.05, "database": f"t{uuid.uuid4().hex}"} | kwargs
    return LedgerSettings(uri=SecretStr(uri), **kwargs)


def record(block: int, state: str = "done", **kwargs) -> BlockRecord:
    values = {"finished": 2.0, "voxels": 10, "labels": 3, "sums": {"fragments": f"{block:x}"}}
    values |= {"roi": ((0, 60, 120), (30, 6, 6)), "error": "boom" if state == "failed" else None}
    return BlockRecord(block, state, **(values | kwargs))


NUMBERS = ("started", "finished", "read_s", "labels", "dropped", "voxels")


def in_ledger(ledger: Ledger, run: str, stage: str = "predict") -> dict[int, tuple]:
    return {
        doc["block"]: (
            doc["state"], doc["attempt"], doc["token"], *(doc.get(n, 0) for n in NUMBERS),
            doc.get("error"),
        )
        for doc in ledger.find_blocks(run, stage)
        if doc["state"] != "running"
    }  # fmt: skip


def in_journal(folder) -> dict[int, tuple]:
    return {
        r.block: (r.state, r.attempt, r.token, *(getattr(r, n) for n in NUMBERS), r.error)
        for r in Journal(folder).records()
    }  # fmt: skip


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def journal_slowly(
    folder, n: int, pause: float, first: int = 0
) -> tuple[threading.Thread, list[float]]:
    """A worker that journals n blocks; the longest times of one block come out in the list."""
    times: list[float] = []

    def work() -> None:
        with JournalWriter(folder, WORKER) as writer:
            for block in range(first, first + n):
                start = time.perf_counter()
                writer.begin(block)
                writer.finish(record(block, "failed" if block % 9 == 0 else "done"))
                if block % 18 == 0:
                    writer.finish(record(block, attempt=2))
                times.append(time.perf_counter() - start)
                time.sleep(pause)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, times
