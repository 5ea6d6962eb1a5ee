"""Predictors for tests: deterministic, fast, and able to misbehave on marked blocks.

A block is marked by a voxel of a certain raw value, because raw is all that a predictor sees.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cc3d
import numpy as np

RAISE = 250
KILL = 251
HANG = 252
FULL_DISK = 253
EXIT = 254
CANCEL = 255


@dataclass(frozen=True)
class Labelled:
    labels: np.ndarray
    affinities: np.ndarray
    components: int
    dropped: int
    n_labels: int


class ThresholdPredictor:
    """Connected components of raw above a threshold; affinities from labels and raw.

    Parameters
    ----------
    threshold
        Raw above it is foreground.
    batch_size
        Blocks per call.
    delay_s
        Seconds per call.
    marks
        Whether marks are obeyed; off, every raw value is just raw.
    times
        Marks are obeyed that often in all processes together; needs `state`.
    state
        Folder for counting.
    broken_on
        Name of a cluster node on which every block fails.
    """

    def __init__(
        self,
        threshold: int = 128,
        batch_size: int = 1,
        delay_s: float = 0.0,
        marks: bool = False,
        times: int | None = None,
        state: str | None = None,
        broken_on: str | None = None,
    ) -> None:
        self.broken = broken_on is not None and os.environ.get("SLURMD_NODENAME") == broken_on
        self.threshold = threshold
        self.batch_size = batch_size
        self.delay_s = delay_s
        self.marks = marks
        self.times = times
        self.state = state

    def predict(self, blocks: Sequence[np.ndarray]) -> list[Labelled]:
        assert 0 < len(blocks) <= self.batch_size
        assert len({block.shape for block in blocks}) == 1
        if self.state:
            with (Path(self.state) / "batches").open("a") as file:
                file.write(f"{len(blocks)}\n")
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        for block in blocks:
            self._misbehave(int(block.max()))
        time.sleep(self.delay_s)
        return [self._one(np.asarray(block)) for block in blocks]

    def _misbehave(self, value: int) -> None:
        if not self.marks or value < RAISE:
            return
        if self.times is not None:
            counter = Path(self.state or "") / f"mark-{value}"
            with counter.open("a") as file:
                file.write(".")
            if counter.stat().st_size > self.times:
                return
        if value == RAISE:
            raise RuntimeError("this block cannot be predicted")
        if value == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if value == HANG:
            time.sleep(3600)
        if value == FULL_DISK:
            raise OSError(28, os.strerror(28), "/somewhere/fragments")
        if value == EXIT:
            sys.exit(0)
        if value == CANCEL:
            raise asyncio.CancelledError

    def _one(self, raw: np.ndarray) -> Labelled:
        labels, count = cc3d.connected_components(
            raw > self.threshold, connectivity=6, return_N=True
        )
        assert count < 2**16
        labels = labels.astype(np.uint16)
        affinities = np.empty((3, *raw.shape), np.uint8)
        tint = (raw % 50).astype(np.uint8)
        for axis in range(3):
            same = labels == np.roll(labels, 1, axis)
            affinities[axis] = np.where(same & (labels > 0), 200, 20) + tint
        return Labelled(labels, affinities, int(count) + 1, 1, int(count))


def threshold(**options: Any) -> ThresholdPredictor:
    """Return a `ThresholdPredictor`; the factory that tests name."""
    return ThresholdPredictor(**options)


def reading(weights: str, **options: Any) -> ThresholdPredictor:
    """Read a file, as networks read their weights."""
    Path(weights).read_bytes()
    return ThresholdPredictor(**options)


def broken(**options: Any) -> ThresholdPredictor:
    raise RuntimeError("no weights here")


def leaving(**options: Any) -> ThresholdPredictor:
    sys.exit("no licence")


def crashing(**options: Any) -> ThresholdPredictor:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


class StagedThreshold(ThresholdPredictor):
    """A `ThresholdPredictor` in stages, that finishes a block once another one was begun.

    So it gets on only if `begin` goes on while blocks are finished, up to the number of `blocks`.
    """

    def __init__(self, blocks: int, **options: Any) -> None:
        super().__init__(**options)
        self.blocks, self.begun = blocks, 0
        self.change = threading.Condition()

    def prepare(self, raw: np.ndarray) -> tuple[np.ndarray]:
        assert threading.current_thread() is not threading.main_thread()
        if self.marks and raw.max() == RAISE:
            raise RuntimeError("this block cannot be prepared")
        return (raw,)

    def begin(self, prepared: Sequence[tuple[np.ndarray]]) -> list[tuple[int, np.ndarray]]:
        assert threading.current_thread() is threading.main_thread()
        with self.change:
            self.begun += len(prepared)
            self.change.notify_all()
            return [(self.begun, raw) for (raw,) in prepared]

    def finish(self, begun: tuple[int, np.ndarray]) -> Labelled:
        place, raw = begun
        with self.change:
            assert self.change.wait_for(lambda: self.begun >= min(place + 1, self.blocks), 20)
        (answer,) = self.predict([raw])
        return answer


def staged(**options: Any) -> StagedThreshold:
    return StagedThreshold(**options)


def not_a_predictor() -> object:
    return object()


class WrongShape(ThresholdPredictor):
    """Returns labels of another shape."""

    def predict(self, blocks: Sequence[np.ndarray]) -> list[Labelled]:
        return [self._one(block[1:]) for block in blocks]
