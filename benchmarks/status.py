"""How long `agq status` takes on a run of 10^7 blocks, without a database and with one.

Without: the run folder holds a compacted journal of ``--blocks`` blocks, as `agq predict` leaves
when it starts and ends, and ``--late`` lines written since. With: the database holds the run's
totals of as many blocks, a thousand workers, and ``--documents`` block records, a part of them
failed (SecantusDB, which stands in for MongoDB in tests, takes a few thousand a second, so not all
10^7; what a status asks for does not depend on their number, see blockwise/ledger/schema.py). The
whole command is timed, from its start; the bar is 1 s. ``--uri`` names another server.
"""

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from pydantic import SecretStr

from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockRecord, BlockState, WorkerInfo
from agq.blockwise.journal.snapshot import write_snapshot
from agq.blockwise.journal.table import ROW, BlockTable
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.ledger.database import Ledger, connect
from agq.blockwise.ledger.settings import LedgerSettings
from agq.blockwise.ledger.updates import block_update, worker_update
from agq.pipeline.folder import RunFolder

BAR_S = 1.0
WORKERS = 1000
FAILED_EVERY = 100_000


def make_run(folder: Path, n: int, late: int) -> RunFolder:
    """Write a run folder with a compacted journal of `n` blocks and `late` lines after it."""
    run = RunFolder(folder)
    with run.lock():
        run.create({"run_dir": str(folder), "input": {"raw": {"path": "x.zarr"}}}, {"grid": 1})
    now = time.time()
    run.update_stage("predict", state="running", blocks_total=2 * n, started=now - n / 100)
    journal = run.journal("predict")
    with JournalWriter(journal, WorkerInfo("first", "node", 1)) as writer:
        writer.begin(0)
    Journal(journal).save()
    known = Journal(journal)
    rows = np.zeros(n, ROW)
    blocks = np.arange(n)
    rows["block"] = blocks
    rows["rank"] = BlockState.DONE
    rows["rank"][FAILED_EVERY - 1 :: FAILED_EVERY] = BlockState.FAILED
    rows["attempt"] = 1
    rows["started"] = now - n / 100 + blocks / 100
    rows["finished"] = rows["started"] + 1
    rows["voxels"] = 17 * 257 * 257
    rows["labels"] = blocks % 500
    meta = {
        "span": [rows["started"][0], rows["finished"][-1]],
        "files": known.tail.positions,
        "ended": sorted(known.tail.ended),
        "garbage": 0,
        "sources": [(next(iter(known.tail.positions)), writer.token)],
        "reasons": [""],
        "failed": [
            record(block, "failed").to_dict() for block in range(FAILED_EVERY - 1, n, FAILED_EVERY)
        ],
        "rivals": [],
        "workers": [],
    }
    write_snapshot(journal, BlockTable(rows), meta)
    with JournalWriter(journal, WorkerInfo("late", "node", 2)) as writer:
        writer.finish_many(record(n + block) for block in range(late))
    return run


def record(block: int, state: str = "done") -> BlockRecord:
    return BlockRecord(
        block,
        state,
        started=time.time() - 1,
        finished=time.time(),
        voxels=17 * 257 * 257,
        reason="RuntimeError: CUDA error: out of memory" if state == "failed" else None,
        error="Traceback ..." if state == "failed" else None,
        sums={"fragments": f"{block:016x}"},
        roi=((0, 0, 1542 * block), (510, 1542, 1542)),
    )


def fill(ledger: Ledger, run: RunFolder, n: int, documents: int) -> None:
    """Put the run into the database, with totals of `n` blocks and some of their records."""
    known = run.record()
    now = time.time()
    stage = known["stages"]["predict"]
    fields = {"run": known["id"], "run_dir": str(run.path), "name": known["name"], "updated": now}
    ledger.set_run(known["id"], fields | {"stages": {"predict": stage}})
    totals = {"done": n, "skipped": 0, "failed": documents // 1000, "running": WORKERS}
    totals |= {"voxels": n * 10**6, "started": stage["started"], "finished": now, "updated": now}
    totals |= {"session": {"blocks": n, "voxels": n * 10**6}}
    totals |= {"recent": {"seconds": 60.0, "blocks": 6000, "voxels": 6 * 10**9}}
    size = sum(f.stat().st_size for f in run.journal("predict").glob("*.jsonl"))
    ledger.set_totals(known["id"], "predict", size + 1, totals)
    for first in range(0, documents, 500):
        numbers = range(first, min(first + 500, documents))
        states = ["failed" if b % 1000 == 0 else "done" for b in numbers]
        ledger.write(
            "blocks",
            [
                block_update(known["id"], "predict", record(b, s))
                for b, s in zip(numbers, states, strict=True)
            ],
        )
    worker = {"host": "node", "pid": 1, "device": "cuda:0", "started": now - 1000, "last": now}
    worker |= {"done": 10, "skipped": 0, "failed": 0, "exit": None, "token": "t"}
    for first in range(0, WORKERS, 500):
        ledger.write(
            "workers",
            [
                worker_update(known["id"], "predict", f"f{i}", worker | {"name": f"w{i}"},
                              read=1, delivered=1)
                for i in range(first, first + 500)
            ],
        )  # fmt: skip


def timed(
    run: RunFolder, rounds: int, wanted: str, **environment: str
) -> list[tuple[float, float]]:
    """Wall and CPU seconds of the whole command, each time in a process of its own."""
    code = "from agq.pipeline.cli.main import main; main()"
    seconds = []
    for _ in range(rounds):
        begun, cpu = time.perf_counter(), children_cpu()
        done = subprocess.run(
            [sys.executable, "-c", code, "status", str(run.path)],
            env={**os.environ, "AGQ_MONGO_URI": "", **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append((time.perf_counter() - begun, children_cpu() - cpu))
        assert wanted in done.stdout, done.stdout
    return seconds


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def show(what: str, seconds: list[tuple[float, float]]) -> float:
    wall, cpu = (statistics.median(values) for values in zip(*seconds, strict=True))
    walls = " ".join(f"{wall:.2f}" for wall, _ in seconds)
    print(f"{what:<46} {wall:5.2f} s, CPU {cpu:5.2f} s   ({walls})", flush=True)
    return wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=10**7)
    parser.add_argument("--late", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--uri")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        small = make_run(folder / "small", 1000, 1)
        show("a run of 10^3 blocks, without a database", timed(small, options.rounds, "(journal"))
        run = make_run(folder / "run", options.blocks, options.late)
        text = f"a compacted journal of {options.blocks:.0e} blocks"
        worst = show(text, timed(run, options.rounds, "(journal"))
        uri = options.uri
        if uri is None:
            sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
            from tests.helpers.services import SERVER, MongoServer, running

            if SERVER.exists():
                uri = stack.enter_context(running(MongoServer(folder / "mongo"))).uri
        if uri:
            ledger = connect(
                LedgerSettings(uri=SecretStr(uri), database="agq", required=True, timeout_s=60)
            )
            assert ledger is not None
            ledger.prepare()
            fill(ledger, run, options.blocks, options.documents)
            text = f"a database with {options.documents:.0e} block records"
            seconds = timed(run, options.rounds, "(ledger", AGQ_MONGO_URI=uri)
            worst = max(worst, show(text, seconds))
            ledger.remove_run(run.record()["id"])
            ledger.close()
    print(f"the slowest took {worst:.2f} s (bar {BAR_S:g} s)")
    sys.exit(worst > BAR_S)


if __name__ == "__main__":
    main()
