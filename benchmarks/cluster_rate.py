"""Whether scheduler, authenticating proxy and ledger keep up with many workers.

The same number of clients take blocks, do nothing but wait, as a worker waits for its GPU, and
write a journal line for each, synced to disk: once straight from a bare daisy server, once through
the proxy and with the ledger fed from their journal. Rounds take turns; the bar is 90 % of bare
daisy's block rate.

Clients are threads in a few processes and the same on both sides, because it is the coordinator's
machine that is measured, not what a block costs its worker. They share this machine with it, so
the CPU time per block of each part is printed too: it says how many blocks per second a core of
the coordinator's machine can serve. It starts the tests' MongoDB-wire server, or takes ``--uri``;
without either there is no ledger.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pydantic import SecretStr

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.ledger.database import connect
from agq.blockwise.ledger.feeder import LedgerFeeder
from agq.blockwise.ledger.settings import LedgerSettings
from agq.blockwise.predict.daisy import Blocks
from agq.blockwise.predict.local_processes import Dispatcher
from agq.blockwise.predict.paths import session_path
from agq.blockwise.predict.spec import PredictSpec, Session

BAR = 0.9
PROCESSES = 4


def clients(folder: Path, count: int, seconds: float, first: int) -> None:
    """Be `count` workers until the dispatcher has gone."""
    while (session := Session.load(folder)) is None:
        time.sleep(0.01)
    writer = JournalWriter(folder / "journal" / "predict", WorkerInfo(f"w{first}", "node", 1))
    grid = PredictSpec.load(folder).block_grid()
    numbers = iter(range(first, 10**9, PROCESSES))

    def work() -> None:
        blocks = Blocks(session, grid)
        idle = 0.2
        while True:
            took = False
            try:
                with blocks.take() as block:
                    if block is not None:
                        took = True
                        idle = 0.2
                        begun = time.time()
                        number = next(numbers)
                        writer.begin(number)
                        time.sleep(seconds)
                        record = BlockRecord(number, "done", started=begun, finished=time.time())
                        writer.finish(record)
            except (OSError, RuntimeError):
                return
            if not took:  # as a block thread does
                time.sleep(idle)
                idle = min(1.5 * idle, 2.0)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()


def cpu_seconds(*processes: psutil.Process) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def one_round(
    workers: int, blocks: int, seconds: float, settings: LedgerSettings | None, ours: bool
) -> dict[str, Any]:
    """Blocks per second, CPU milliseconds per block, seconds until the ledger has all."""
    with tempfile.TemporaryDirectory(prefix="agq-rate-") as name:
        folder = Path(name)
        journal = folder / "journal" / "predict"
        grid = BlockGrid(
            volume_shape=(blocks, 16, 16), voxel_size=(1, 1, 1), write_shape=(1, 16, 16)
        )
        PredictSpec(
            run_dir=name,
            raw={},
            grid=grid.to_dict(),
            factory="x:y",
            listen="127.0.0.1" if ours else None,
        ).save()
        command = [sys.executable, __file__, "--clients", name, str(workers // PROCESSES)]
        processes = [subprocess.Popen([*command, str(seconds), str(i)]) for i in range(PROCESSES)]
        ledger = connect(settings) if ours and settings else None
        feeder = None
        if ledger is not None:
            feeder = LedgerFeeder(ledger, uuid.uuid4().hex, {"predict": journal})
            feeder.start()
        time.sleep(3)  # let the clients load daisy
        dispatcher = Dispatcher(name, np.arange(blocks), alone=False)
        while dispatcher.poll() is None and not session_path(name).exists():
            time.sleep(0.001)
        parts = {
            "daisy and proxy" if ours else "daisy": [psutil.Process(dispatcher._process.pid)],
            "clients": [psutil.Process(process.pid) for process in processes],
            "ledger feeder": [psutil.Process()],
        }
        before = {part: cpu_seconds(*members) for part, members in parts.items()}
        after = dict(before)
        start = time.perf_counter()
        while dispatcher.poll() is None:
            with contextlib.suppress(psutil.Error):
                after |= {part: cpu_seconds(*members) for part, members in parts.items()}
            time.sleep(0.05)
        rate = blocks / (time.perf_counter() - start)
        late = None
        for process in processes:
            process.wait(60)
        if feeder is not None and ledger is not None:
            begun = time.perf_counter()
            report = feeder.stop(120)
            late = time.perf_counter() - begun
            assert report.complete, report
            ledger.close()
        done = Journal(journal).counts()["done"]
        assert done == blocks, f"{done} of {blocks} in the journal"
        cpu = {part: (after[part] - before[part]) / blocks * 1e3 for part in parts}
        return {"blocks_per_s": rate, "late_s": late, "cpu_ms_per_block": cpu}


def median(rounds: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(map(value, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1.0, help="what a block takes")
    parser.add_argument("--blocks", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--uri")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        uri = options.uri
        if uri is None:
            sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
            from tests.helpers.services import SERVER, MongoServer, running

            if SERVER.exists():
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="agq-db-"))
                uri = stack.enter_context(running(MongoServer(Path(folder)))).uri
        settings = uri and LedgerSettings(uri=SecretStr(uri), database="rate")
        of = options.workers, options.blocks, options.seconds, settings or None
        bare, ours = [], []
        for _ in range(options.rounds):
            bare.append(one_round(*of, ours=False))
            ours.append(one_round(*of, ours=True))
    share = median(ours, lambda r: r["blocks_per_s"]) / median(bare, lambda r: r["blocks_per_s"])
    for name, rounds in (("bare", bare), ("ours", ours)):
        rates = " ".join(f"{r['blocks_per_s']:.1f}" for r in rounds)
        print(f"{name}: blocks/s {rates} ({options.workers} workers of {options.seconds:g} s)")
        for part in rounds[0]["cpu_ms_per_block"]:
            cpu = median(rounds, lambda r, part=part: r["cpu_ms_per_block"][part])
            print(f"  CPU ms per block, {part}: {cpu:.2f}")
    late = [r["late_s"] for r in ours]
    print(f"ledger complete after the last block, s: {json.dumps(late)}")
    print(f"share of bare daisy's rate: {share:.3f} (bar {BAR})")
    sys.exit(share < BAR)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "--clients":
        clients(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
