"""How long the web page takes to open on a run of many blocks, and what its server holds.

Writes the journal of a run that is under way (two workers, a few failures), starts `agq dashboard`
as a process of its own, and asks for what a browser asks for: with the snapshot that a prediction
leaves now and then and the most lines that may follow it, with a snapshot of all, and with lines
only, as a journal is whose snapshot was lost.

    .venv/bin/python benchmarks/dashboard.py --blocks 1000000
"""

import argparse
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import psutil

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.reader import Journal, compact
from agq.blockwise.journal.records import BlockRecord, encode
from agq.blockwise.journal.snapshot import SNAPSHOT
from agq.blockwise.volumes.triples import Triple
from agq.pipeline.folder import RunFolder


def make_run(folder: Path, side: Triple) -> RunFolder:
    shape = tuple(n * w for n, w in zip(side, (16, 256, 256), strict=True))
    grid = BlockGrid(shape, (30, 6, 6))
    run = RunFolder(folder)
    with run.lock():
        config = {"run_dir": str(folder), "input": {"raw": {"path": "raw.zarr"}}}
        run.create(config, {"grid": grid.to_dict()})
    start = time.time() - 10_000
    run.update_stage("predict", state="running", blocks_total=grid.n_blocks, started=start)
    folder = run.journal("predict")
    folder.mkdir(parents=True)
    snapshot, earlier = folder / SNAPSHOT, folder / "earlier"
    with ExitStack() as stack:
        files = []
        for worker in range(2):
            path = folder / f"node-{worker}-token{worker}.jsonl"
            files.append(stack.enter_context(path.open("wb")))
            info = {"name": f"worker-{worker}", "host": "node", "pid": worker, "started": start}
            files[worker].write(encode("worker", start, f"token{worker}", {"worker": info}))
        reader, saved = Journal(folder), 0
        for number in range(grid.n_blocks):
            worker = number % 2
            end = start + 9_900 * number / grid.n_blocks
            write_block(files[worker], f"token{worker}", number, end)
            if number % 1000 == 0:
                for file in files:
                    file.flush()
                reader.catch_up()
                # As the coordinator does (blockwise/predict/coordinator.py).
                if reader.version - saved >= max(20_000, len(reader.rows) // 32):
                    saved = reader.version
                    if snapshot.exists():
                        snapshot.replace(earlier)
                    reader.save()
    # Just before a snapshot is written, readers have the most lines to read.
    if earlier.exists():
        earlier.replace(snapshot)
    return run


def write_block(file: BinaryIO, token: str, number: int, end: float) -> None:
    failed = number % 100_003 == 17
    record = BlockRecord(
        number,
        "failed" if failed else "done",
        token=token,
        worker=f"worker-{token[-1]}",
        started=end - 2,
        finished=end,
        labels=number % 300,
        voxels=16 * 256 * 256,
        sums={"fragments": f"{number:032x}"},
        error="ValueError: bad raw" if failed else None,
        roi=((0.0, 0.0, 0.0), (480.0, 1536.0, 1536.0)),
    )
    file.write(encode("begin", end - 2, token, {"block": number, "attempt": 1}))
    file.write(encode("block", end, token, record.to_dict()))


def measure(run: RunFolder) -> None:
    code = "from agq.pipeline.cli.main import main; main()"
    words = ["dashboard", str(run.path), "--port", "0", "--no-token"]
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            key = run.record()["id"]
            for ask in ("first", "again"):
                begun = time.perf_counter()
                for path in ("", "page.js", "page.css", "api/runs", f"api/run/{key}"):
                    urllib.request.urlopen(address + path, timeout=900).read()
                urllib.request.urlopen(
                    f"{address}api/run/{key}/map?by=state&axis=0&index=1", timeout=900
                ).read()
                print(f"  {ask}: page, run and map in {time.perf_counter() - begun:.2f} s")
                time.sleep(1.5)
            for by in ("seconds", "labels"):
                begun = time.perf_counter()
                urllib.request.urlopen(f"{address}api/run/{key}/map?by={by}&axis=1&index=1").read()
                print(f"  map by {by}: {time.perf_counter() - begun:.2f} s")
            info = psutil.Process(process.pid).memory_info()
            print(f"  server: {info.rss / 2**20:.0f} MiB resident")
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    side = round(parser.parse_args().blocks ** (1 / 3))
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", (side, side, side))
        journal = run.journal("predict")
        print(f"{side**3:,} blocks, as a prediction leaves them")
        measure(run)
        compact(journal)
        print(f"{side**3:,} blocks, with a snapshot of all")
        measure(run)
        (journal / SNAPSHOT).unlink()
        print(f"{side**3:,} blocks, journal lines only")
        measure(run)


if __name__ == "__main__":
    main()
