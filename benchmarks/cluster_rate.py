"""Whether scheduler, gate, journal and ledger keep up with many workers.

The same number of clients take blocks and do nothing but wait, as a worker waits for its GPU: once
straight from a bare daisy server, once through the gate, with a journal line for every block and
the ledger fed from them. Rounds take turns; the bar is 90 % of bare daisy's block rate.

Clients are threads in a few processes: what runs on the coordinator's machine is measured, not
what a block costs its worker (reading, computing, writing). It starts the tests' MongoDB-wire
server, or takes ``--uri``; without either there is no ledger.
"""

import argparse
import contextlib
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import numpy as np
from pydantic import SecretStr

from blockwise.gate import GateError
from blockwise.grid import BlockGrid
from blockwise.journal import BlockRecord, Journal, JournalWriter, WorkerInfo
from blockwise.lanes import _connect
from blockwise.ledger import LedgerSettings, connect
from blockwise.ledger_feed import LedgerFeeder
from blockwise.predict_spec import PredictSpec, Session, session_path
from blockwise.supervise import Dispatcher

BAR = 0.9
PROCESSES = 4


def clients(folder: Path, count: int, seconds: float, journal: bool) -> None:
    """Be `count` workers until the dispatcher has gone."""
    # A refused connection is how every run ends.
    logging.getLogger("daisy").setLevel(logging.CRITICAL)
    while (session := Session.load(folder)) is None:
        time.sleep(0.01)
    writer = (
        JournalWriter(folder / "journal" / "predict", WorkerInfo("w", "n", 1)) if journal else None
    )
    numbers = iter(range(10**9))
    lock = threading.Lock()

    def work() -> None:
        client = None
        while True:
            try:
                if client is None:
                    client = _connect(session)
                    if not client.connected:
                        return
                with client.acquire_block() as block:
                    if block is None:
                        client = None
                        time.sleep(0.05)
                        continue
                    time.sleep(seconds)
                    if writer is not None:
                        with lock:
                            number = next(numbers) * PROCESSES + int(sys.argv[-1])
                        now = time.time()
                        writer.begin(number)
                        writer.finish(BlockRecord(number, "done", started=now, finished=now))
            except (GateError, OSError, RuntimeError):
                return

    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if writer is not None:
        writer.close()


def one_round(
    workers: int, blocks: int, seconds: float, settings: LedgerSettings | None, ours: bool
) -> tuple[float, float | None]:
    """Blocks per second, and seconds after the end until the ledger has all (None: no ledger)."""
    with tempfile.TemporaryDirectory(prefix="agq-rate-") as name:
        folder = Path(name)
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
        processes = [
            subprocess.Popen([*command, str(seconds), "journal" if ours else "bare", str(i)])
            for i in range(PROCESSES)
        ]
        ledger = connect(settings) if ours and settings else None
        feeder = None
        if ledger is not None:
            feeder = LedgerFeeder(
                ledger, uuid.uuid4().hex, {"predict": folder / "journal" / "predict"}
            )
            feeder.start()
        time.sleep(3)  # let the clients load daisy
        start = time.perf_counter()
        dispatcher = Dispatcher(name, np.arange(blocks), alone=False)
        while dispatcher.poll() is None and not session_path(name).exists():
            time.sleep(0.001)
        start = time.perf_counter()
        while dispatcher.poll() is None:
            time.sleep(0.005)
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
        if ours:
            done = Journal(folder / "journal" / "predict").counts()["done"]
            assert done == blocks, f"{done} of {blocks} in the journal"
        return rate, late


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1.0, help="what a block takes")
    parser.add_argument("--blocks", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--uri")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        uri = options.uri
        if uri is None:
            sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
            from tests.services import SERVER, MongoServer, running

            if SERVER.exists():
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="agq-db-"))
                uri = stack.enter_context(running(MongoServer(Path(folder)))).uri
        settings = uri and LedgerSettings(uri=SecretStr(uri), database="rate")
        of = options.workers, options.blocks, options.seconds, settings or None
        bare, ours, lates = [], [], []
        for _ in range(options.rounds):
            bare.append(one_round(*of, ours=False)[0])
            rate, late = one_round(*of, ours=True)
            ours.append(rate)
            lates.append(late)
    found = {
        "workers": options.workers,
        "seconds_per_block": options.seconds,
        "bare_blocks_per_s": bare,
        "ours_blocks_per_s": ours,
        "ledger_late_s": lates,
        "share": statistics.median(ours) / statistics.median(bare),
        "bar": BAR,
    }
    print(json.dumps(found, indent=1))
    sys.exit(found["share"] < BAR)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "--clients":
        clients(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5] == "journal")
    else:
        main()
