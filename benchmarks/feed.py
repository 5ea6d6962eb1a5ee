"""How well one worker feeds a GPU: blocks/s and CPU of the host, by stage.

A stand-in predictor sleeps as long as a card would compute (``--delay-ms``) and answers with labels
made beforehand, so all CPU that is counted is the host's: reading raw, ids, checksums, sidecar,
compression, writing, journal, and daisy. The worker runs as in `agq predict`, under a coordinator.
Counted from its ``WARM``-th block, CPU and wall are those of the worker's process; stages are CPU
of the threads inside them. The bar: 15 ms of CPU a block, and 45 blocks/s with 20 ms a block, on
two cores. The baseline, alone in one thread: zarr reads the same raw and writes the same ids.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from agq.blockwise.blocks import sidecar
from agq.blockwise.blocks import writer as block_writer
from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.writer import BlockWriter
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.predict import block_threads
from agq.blockwise.predict.block_threads import BlockFiles
from agq.blockwise.predict.coordinator import run_predict
from agq.blockwise.predict.spec import PredictSpec
from agq.blockwise.volumes.create import chunk_file, create_array

WARM = 24
BAR_MS, BAR_RATE = 15.0, 45.0
LABELS = 250
BASELINE_BLOCKS = 32


@dataclass(frozen=True)
class Answer:
    """What a card gives back."""

    labels: npt.NDArray[np.uint16]
    affinities: npt.NDArray[np.uint8]
    n_labels: int = LABELS
    components: int = LABELS
    dropped: int = 0


def answer(shape: Sequence[int]) -> Answer:
    """Return labels like neurites in thin sections, cells around random points, and affinities."""
    rng = np.random.default_rng(0)
    points = rng.random((LABELS, 3)) * shape
    points[:, 0] *= 5
    z, y, x = (np.arange(n, dtype=np.float32) for n in shape)
    nearest = np.full(shape, np.inf, np.float32)
    labels = np.zeros(shape, np.uint16)
    for label, (a, b, c) in enumerate(points, 1):
        far = (5 * z - a)[:, None, None] ** 2 + ((y - b)[:, None] ** 2 + (x - c) ** 2)
        closer = far < nearest
        nearest[closer] = far[closer]
        labels[closer] = label
    affinities = np.empty((3, *shape), np.uint8)
    for axis in range(3):
        same = labels == np.roll(labels, 1, axis)
        affinities[axis] = np.where(same, 220, 40) + rng.integers(0, 30, shape)
    return Answer(labels, affinities)


class Clock:
    """Adds up the CPU that threads spend in stages; a stage inside another counts once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._inside = threading.local()

    def time(self, owner: Any, name: str, stage: str) -> None:
        """Replace a function of a module or class by one that is timed."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            outer, self._inside.spent = getattr(self._inside, "spent", 0.0), 0.0
            begun = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                spent = time.thread_time() - begun
                with self._lock:
                    own = spent - self._inside.spent
                    self.seconds[stage] = self.seconds.get(stage, 0.0) + own
                self._inside.spent = outer + spent

        setattr(owner, name, timed)


class StandIn:
    """Answers after a while, and writes what the process has spent between two of its blocks."""

    batch_size = 1

    def __init__(self, shape: Sequence[int], delay_s: float, blocks: int, report: str) -> None:
        self._answer, self._delay_s = answer(shape), delay_s
        self._blocks, self._report, self._seen = blocks, Path(report), 0
        self._clock = Clock()
        for owner, name, stage in (
            (BlockFiles, "read", "read"),
            (BlockWriter, "write", "ids, checksums, fragments"),
            (block_writer, "build_sidecar", "sidecar"),
            (sidecar.Sidecar, "to_bytes", "sidecar, compressed"),
            (block_writer, "write_atomic", "sidecar, written"),
            (JournalWriter, "begin", "journal"),
            (JournalWriter, "finish", "journal"),
            (block_threads.BlockLoop, "_process", "other Python"),
        ):
            self._clock.time(owner, name, stage)
        self._start: dict[str, Any] = {}

    def _spent(self) -> dict[str, Any]:
        stages = {
            **self._clock.seconds,
            "main thread": time.thread_time(),
            "all": time.process_time(),
            "wall": time.perf_counter(),
        }
        return stages | {"load": os.getloadavg()[0]}

    def predict(self, blocks: Sequence[npt.NDArray[Any]]) -> list[Answer]:
        """Answer for one block."""
        self._seen += len(blocks)
        if self._seen == WARM:
            self._start = self._spent()
        if self._seen == self._blocks:
            end = self._spent()
            counted = self._blocks - WARM
            each = {k: 1e3 * (end[k] - self._start.get(k, 0.0)) / counted for k in end}
            self._report.write_text(json.dumps(each | {"load": end["load"]}))
        time.sleep(self._delay_s)
        return [self._answer] * len(blocks)


def stand_in(**options: Any) -> StandIn:
    """Return the predictor; the factory that the run names."""
    return StandIn(**options)


def make_run(folder: Path, read: Sequence[int], counts: Sequence[int], delay_s: float) -> Any:
    """Write raw noise and empty outputs; return the run and its grid."""
    write = tuple(n - 1 for n in read)
    shape = tuple(n * w for n, w in zip(counts, write, strict=True))
    grid = BlockGrid(
        volume_shape=shape,
        voxel_size=(30, 6, 6),
        write_shape=write,
        before=(0, 0, 0),
        after=(1, 1, 1),
    )
    raw = create_array(
        folder / "raw.zarr",
        "raw",
        shape=shape,
        chunks=tuple(map(min, (32, 128, 128), shape)),
        dtype=np.uint8,
        voxel_size=grid.voxel_size,
    )
    rng = np.random.default_rng(1)
    for z in range(0, shape[0], 64):
        part = rng.integers(90, 150, (min(64, shape[0] - z), *shape[1:]), np.uint8)
        raw[z : z + 64] = part
    run = folder / "run"
    BlockWriter.create(run, grid)
    report = str(folder / "report.json")
    options = {"shape": read, "delay_s": delay_s, "blocks": grid.n_blocks, "report": report}
    return PredictSpec(
        run_dir=str(run),
        raw={"path": str(folder / "raw.zarr"), "dataset": "raw"},
        grid=grid.to_dict(),
        factory="feed:stand_in",
        options=options,
    ), grid


def baseline(folder: Path, grid: BlockGrid, labels: npt.NDArray[Any]) -> tuple[float, float]:
    """Return CPU and wall ms a block of reading raw and writing ids, synced, and nothing else."""
    raw = zarr.open_array(str(folder / "raw.zarr"), path="raw", mode="r")
    out = create_array(
        folder / "plain.zarr",
        "ids",
        shape=grid.volume_shape,
        chunks=grid.write_shape,
        dtype=np.uint64,
        voxel_size=grid.voxel_size,
    )
    ids = labels[grid.write_in_read(0)].astype(np.uint64)
    numbers = range(min(BASELINE_BLOCKS, grid.n_blocks))
    cpu, wall = time.process_time(), time.perf_counter()
    for number in numbers:
        (start, stop), (low, high) = grid.read_box(number), grid.write_box(number)
        np.asarray(raw[tuple(map(slice, start, stop))])
        out[tuple(map(slice, low, high))] = ids
        with chunk_file(out, grid.index(number)).open("rb") as file:
            os.fsync(file.fileno())
    spent = time.process_time() - cpu, time.perf_counter() - wall
    return 1e3 * spent[0] / len(numbers), 1e3 * spent[1] / len(numbers)


def main() -> None:
    """Run it and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block", type=int, nargs=3, default=(17, 193, 193), help="voxels read")
    parser.add_argument("--blocks", type=int, nargs=3, default=(6, 8, 8), help="blocks, z y x")
    parser.add_argument("--delay-ms", type=float, default=20.0)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    if np.prod(args.blocks) <= WARM:
        parser.error(f"--blocks: more than {WARM} are needed")
    here = Path(__file__).resolve().parent
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(here), known)))
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="agq-feed-") as name:
        folder = Path(name)
        spec, grid = make_run(folder, args.block, args.blocks, args.delay_ms / 1e3)
        report = run_predict(spec, range(grid.n_blocks))
        if report.done != grid.n_blocks or report.retries:
            parser.exit(1, f"{report.done} of {grid.n_blocks} blocks, {report.retries} retries\n")
        each = json.loads((folder / "report.json").read_text())
        plain = baseline(folder, grid, answer(args.block).labels)
    wall, load, cpu = each.pop("wall"), each.pop("load"), each.pop("all")
    main_thread = each.pop("main thread")
    rows = [*sorted(each.items(), key=lambda row: -row[1])]
    rows.append(("daisy and other threads", cpu - main_thread - sum(each.values())))
    rows += [("main thread", main_thread), ("worker", cpu), ("baseline", plain[0])]
    lines = [f"{'CPU ms a block':<28}"]
    lines += [f"  {stage:<26}{ms:8.2f}" for stage, ms in rows]
    lines.append(f"blocks/s {1e3 / wall:.1f}, the baseline alone {1e3 / plain[1]:.1f}")
    lines.append(f"worker / baseline, by CPU: {cpu / plain[0]:.2f}; load of the machine {load:.1f}")
    met = cpu <= BAR_MS and 1e3 / wall >= BAR_RATE
    lines.append(f"bar: {BAR_MS:.0f} ms and {BAR_RATE:.0f} blocks/s: {'met' if met else 'not met'}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
