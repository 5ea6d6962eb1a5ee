"""How long the journal of a large run takes to write, compact and load.

Run ``python benchmarks/journal.py --blocks 10000000``; every step is a process of its own, so that
its peak memory is its own. Needs about 0.45 GB of disk per million blocks.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from agq.blockwise.journal.reader import Journal, compact
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter


def finish_one(folder: Path, n: int) -> None:
    """Milliseconds of one `finish`, sync included."""
    with JournalWriter(folder, WorkerInfo("w", "node", 1)) as writer:
        times = []
        for block in range(n):
            start = time.perf_counter()
            writer.begin(block)
            writer.finish(_record(block))
            times.append(time.perf_counter() - start)
    show("one block, begin + finish, ms (median)", float(np.median(times)) * 1e3)


def write(folder: Path, n: int) -> None:
    """Write n records by 16 processes' worth of files."""
    part = -(-n // 16)
    for i in range(16):
        with JournalWriter(folder, WorkerInfo(f"worker-{i}", "node", i)) as writer:
            writer.finish_many(map(_record, range(i * part, min((i + 1) * part, n))))


def _record(block: int) -> BlockRecord:
    return BlockRecord(
        block=block,
        state="failed" if block % 100_000 == 99_999 else "done",
        started=1.7e9 + block,
        finished=1.7e9 + block + 1.25,
        read_s=0.1,
        compute_s=1.0,
        write_s=0.15,
        labels=block % 500,
        components=block % 300,
        dropped=block % 7,
        voxels=17 * 257 * 257,
        sums={"fragments": f"{block:016x}", "sidecar": f"{block * 7:016x}"},
        error="Traceback (most recent call last): ..." if block % 100_000 == 99_999 else None,
        roi=((0, 1542, 1542 * block), (510, 1542, 1542)),
    )


def load(folder: Path, n: int) -> None:
    journal = Journal(folder)
    assert len(journal.rows) == n
    start = time.perf_counter()
    done = journal.done(n)
    show("done mask of all blocks, s", time.perf_counter() - start)
    assert int(done.sum()) == n - len(journal.failed())


def show(what: str, value: float) -> None:
    sys.stdout.write(f"{what:<48} {value:10.3f}\n")
    sys.stdout.flush()


STEPS = {
    "write": write,
    "compact": lambda folder, _: compact(folder),
    "load": load,
    "finish_one": finish_one,
}


def step(name: str, folder: Path, n: int) -> None:
    """Run one step here and print its time and peak memory."""
    start, cpu = time.perf_counter(), time.process_time()
    STEPS[name](folder, n)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if name != "finish_one":
        show(f"{name}, s", seconds)
        show(f"{name}, CPU s", time.process_time() - cpu)
        show(f"{name}, peak MiB", peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step(args.step, args.folder, args.blocks)
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="agq-journal-") as name:
        call(Path(name) / "one", "finish_one", 2000)
        folder = Path(name) / "journal"
        call(folder, "write", args.blocks)
        size = sum(p.stat().st_size for p in folder.glob("*.jsonl"))
        show("bytes per line", size / args.blocks)
        call(folder, "compact", args.blocks)
        show("snapshot, MB", (folder / "compact.npz").stat().st_size / 1e6)
        sys.stdout.write("-- loading the snapshot\n")
        call(folder, "load", args.blocks)
        with JournalWriter(folder, WorkerInfo("late", "node", 99)) as writer:
            writer.finish_many(_record(b) for b in range(1000))
        sys.stdout.write("-- loading the snapshot and 1000 new lines\n")
        call(folder, "load", args.blocks)


def call(folder: Path, name: str, n: int) -> None:
    command = [sys.executable, __file__, "--folder", str(folder), "--step", name]
    subprocess.run([*command, "--blocks", json.dumps(n)], check=True)


if __name__ == "__main__":
    main()
