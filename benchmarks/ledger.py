"""What feeding the ledger costs the blocks: the same work with and without the feeder.

A worker process computes blocks and journals them; the coordinator process feeds the ledger, or
does not. Rounds with and without take turns, and medians are compared: the bar is 2 % of the wall
time. At the end it prints how many bytes the documents of a block take, as BSON.
Run ``python benchmarks/ledger.py`` (starts the tests' MongoDB-wire server) or give ``--uri``.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import bson
import numpy as np
from pydantic import SecretStr

from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.ledger.database import connect
from agq.blockwise.ledger.feeder import LedgerFeeder
from agq.blockwise.ledger.settings import LedgerSettings

BAR = 1.02


def work(folder: Path, blocks: int, effort: int) -> None:
    """Compute and journal blocks; print the wall seconds."""
    rng = np.random.default_rng(0)
    matrix = rng.random((128, 128))
    start = time.perf_counter()
    with JournalWriter(folder, WorkerInfo("worker", "node", 1, started=time.time())) as writer:
        for block in range(blocks):
            writer.begin(block)
            begun = time.time()
            for _ in range(effort):
                matrix = np.sort(matrix, axis=block % 2)[::-1]
            writer.finish(
                BlockRecord(
                    block,
                    "done",
                    started=begun,
                    finished=time.time(),
                    voxels=17 * 257 * 257,
                    sums={"fragments": f"{block:016x}"},
                    roi=((0, 0, 1542 * block), (510, 1542, 1542)),
                )
            )
    sys.stdout.write(json.dumps(time.perf_counter() - start))


def one_round(settings: LedgerSettings | None, blocks: int, effort: int) -> tuple[float, float]:
    """Wall seconds of the worker, and CPU seconds of this process meanwhile."""
    with tempfile.TemporaryDirectory(prefix="agq-ledger-") as name:
        folder = Path(name) / "journal"
        ledger = connect(settings) if settings else None
        feeder = LedgerFeeder(ledger, uuid.uuid4().hex, {"predict": folder}) if ledger else None
        if feeder is not None:
            feeder.start()
        cpu = time.process_time()
        command = [sys.executable, __file__, "--work", str(folder), "--blocks", str(blocks)]
        done = subprocess.run(
            [*command, "--effort", str(effort)], check=True, capture_output=True, text=True
        )
        cpu = time.process_time() - cpu
        if feeder is not None and ledger is not None:
            report = feeder.stop(60)
            ledger.close()
            assert report.complete, report
        return float(json.loads(done.stdout)), cpu


def block_bytes(settings: LedgerSettings) -> dict[str, float]:
    """Bytes of the documents of a block: of its prediction, and of its relabelling."""
    begun = time.time()
    place = {"started": begun, "finished": begun + 9, "voxels": 17 * 257 * 257}
    about = {"read_s": 0.5, "compute_s": 3.5, "write_s": 1.5, "labels": 300, "components": 400}
    sums = {"fragments": f"{1:016x}", "sidecar": f"{2:016x}"}
    run, sizes = uuid.uuid4().hex, {}
    ledger = connect(settings)
    assert ledger is not None
    with tempfile.TemporaryDirectory(prefix="agq-ledger-") as name:
        folders = {stage: Path(name) / "journal" / stage for stage in ("predict", "relabel")}
        for stage, folder in folders.items():
            more = about | {"roi": ((0, 0, 0), (510, 1542, 1542))} if stage == "predict" else {}
            with JournalWriter(
                folder, WorkerInfo("worker-1234567_89", "gpu-node-123", 1)
            ) as writer:
                writer.finish_many(
                    BlockRecord(10**7 + i, "done", sums=sums, **place, **more) for i in range(1000)
                )
        feeder = LedgerFeeder(ledger, run, folders)
        feeder.start()
        assert feeder.stop(60).complete
    for stage in folders:
        found = [len(bson.encode(d)) for d in ledger.find_blocks(run, stage)]
        sizes[stage] = statistics.mean(found)
    ledger.remove_run(run)
    ledger.close()
    return sizes


@contextlib.contextmanager
def server(uri: str | None) -> Iterator[str]:
    if uri:
        yield uri
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.helpers.services import MongoServer, running

    with (
        tempfile.TemporaryDirectory(prefix="agq-mongo-") as name,
        running(MongoServer(Path(name))) as mongo,
    ):
        yield mongo.uri


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--effort", type=int, default=2800, help="work per block (2800: ~ 250 ms)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--uri", help="MongoDB to use instead of the tests' server")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.blocks, args.effort)
        return
    times: dict[bool, list[float]] = {False: [], True: []}
    cpus: dict[bool, list[float]] = {False: [], True: []}
    with server(args.uri) as uri:
        settings = LedgerSettings(uri=SecretStr(uri), database="agq_benchmark", required=True)
        for i in range(2 * args.rounds):
            # Off on, on off, ...: a machine that gets slower or faster favours neither.
            on = i % 4 in (1, 2)
            wall, cpu = one_round(settings if on else None, args.blocks, args.effort)
            times[on].append(wall)
            cpus[on].append(cpu)
        sizes = block_bytes(settings)
    without, with_feeder = (statistics.median(times[on]) for on in (False, True))
    ratio = with_feeder / without
    extra = statistics.median(cpus[True]) - statistics.median(cpus[False])
    for line in (
        f"blocks per round                      {args.blocks}",
        f"one block, ms                         {without / args.blocks * 1e3:.1f}",
        f"without feeder, s (median)            {without:.3f}   all: {_list(times[False])}",
        f"with feeder, s (median)               {with_feeder:.3f}   all: {_list(times[True])}",
        f"ratio of medians                      {ratio:.4f}   (bar {BAR})",
        f"ratio of fastest rounds               {min(times[True]) / min(times[False]):.4f}",
        f"coordinator CPU per block, ms         {extra / args.blocks * 1e3:.2f}",
        # What a worker would lose if it had to share its only core with the feeder; unlike the
        # ratios it can be trusted on a busy machine.
        f"coordinator CPU, share of wall time   {extra / with_feeder:.4f}   (bar {BAR - 1:.2f})",
        *(f"bytes per block, {stage:<15}      {size:.0f}" for stage, size in sizes.items()),
    ):
        sys.stdout.write(line + "\n")


def _list(values: list[float]) -> str:
    return " ".join(f"{v:.2f}" for v in values)


if __name__ == "__main__":
    main()
