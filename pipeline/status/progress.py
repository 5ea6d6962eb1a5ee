"""What a person sees while `agq run` works: bars on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from agq.blockwise.predict.coordinator import PredictProgress
from agq.pipeline.status.text import duration
from agq.terminal import console as plain_console

_LINE_S = 10.0

Tell = Callable[[str, int, int], object]
"""Takes the progress of a step: its name, items done, items in all."""


class Progress:
    """Where the stages of a run tell how far they are: a callable, (step, items done, in all).

    Parameters
    ----------
    tell
        The callable; what it raises stops the run. None: nobody is told.
    """

    def __init__(self, tell: Tell | None = None) -> None:
        self._tell = tell or (lambda *_: None)
        self._before = 0

    def start(self, stage: str, total: int, *, done: int = 0) -> None:
        """Begin a stage of `total` items of which `done` were there before."""
        self._before = done
        self._tell(stage, done, total)

    def blocks(self, progress: PredictProgress, *, stage: str = "predict") -> None:
        """Take the progress of `agq.blockwise.predict.coordinator.run_predict`."""
        done = progress.done + progress.skipped
        self._tell(stage, self._before + done, self._before + progress.total)

    def step(self, name: str, done: int, total: int) -> None:
        """Take the progress of a step with items done of a total."""
        self._tell(name, done, total)

    def note(self, text: str) -> None:
        """Take a line for people; a program is not told."""


@contextmanager
def open_progress(
    run_dir: Path | None, on_progress: Tell | Literal["bars"] | None
) -> Iterator[Progress]:
    """Yield where progress goes: bars on standard error, a callable, or nowhere."""
    if on_progress != "bars":
        yield Progress(on_progress)
        return
    with RunProgress(run_dir) as progress:
        yield progress


class RunProgress(Progress):
    """Progress of one command for people; use it as a context manager.

    Parameters
    ----------
    run_dir : Path or None
        Run folder, for the first line; None leaves that line out.
    console : Console, optional
        Where to (default: standard error, so that standard output stays for results).
    line_s : float
        Seconds between two lines of one stage without a terminal.
    """

    def __init__(
        self, run_dir: Path | None, *, console: Console | None = None, line_s: float = _LINE_S
    ) -> None:
        self._run_dir = run_dir
        self._console = console or plain_console(stderr=True, wrap=True)
        self._line_s = line_s
        self._tasks: dict[str, _Task] = {}
        self._bars: Bars | None = None
        if self._console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
            )

    def __enter__(self) -> Self:
        if self._run_dir is not None:
            self.note(f"run {self._run_dir}")
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def start(self, stage: str, total: int, *, done: int = 0) -> None:
        """Begin a stage of `total` items of which `done` were there before."""
        bar = None
        if self._bars is not None:
            bar = self._bars.add_task(stage, total=total, completed=done, note="")
        self._tasks[stage] = _Task(total, done, bar)
        if bar is None:
            resumed = f", {done} of them done before" if done else ""
            self.note(f"{stage}: {total} blocks{resumed}" if total else f"{stage}: nothing to do")

    def advance(self, stage: str, done: int, *, note: str = "") -> None:
        """Say that `done` items of a stage are done now, the earlier ones included."""
        task = self._tasks[stage]
        changed = done != task.done
        task.done = done
        if self._bars is not None and task.bar is not None:
            self._bars.update(task.bar, completed=done, note=note)
            return
        now = time.monotonic()
        over = done >= task.total
        if changed and (over or now - task.shown >= self._line_s):
            task.shown = now
            self.note(f"{stage}: {task.text(now)}{note and ', ' + note}")

    def blocks(self, progress: PredictProgress, *, stage: str = "predict") -> None:
        """Take the progress of `agq.blockwise.predict.coordinator.run_predict`."""
        task = self._tasks.get(stage)
        if task is None:
            self.start(stage, progress.total)
            task = self._tasks[stage]
        notes = [f"{progress.workers} workers"] if progress.workers else []
        if progress.voxels and progress.seconds > 0:
            notes.insert(0, f"{progress.voxels / progress.seconds / 1e6:.3g} Mvoxel/s")
        if progress.failed:
            notes.append(f"{progress.failed} failed")
        self.advance(stage, task.before + progress.done + progress.skipped, note=", ".join(notes))

    def step(self, name: str, done: int, total: int) -> None:
        """Take the progress of a step with items done of a total."""
        if name not in self._tasks or self._tasks[name].total != total:
            self._forget(name)
            self.start(name, total, done=done)
        else:
            self.advance(name, done)

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(Text(text), soft_wrap=True)

    def _forget(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if task is not None and task.bar is not None and self._bars is not None:
            self._bars.remove_task(task.bar)


class _Task:
    def __init__(self, total: int, done: int, bar: TaskID | None) -> None:
        self.total = total
        self.before = self.done = done
        self.bar = bar
        self.started = self.shown = time.monotonic()

    def text(self, now: float) -> str:
        """How far, how fast and how long."""
        seconds = max(now - self.started, 1e-3)
        rate = (self.done - self.before) / seconds
        text = f"{self.done}/{self.total} ({100 * self.done / max(self.total, 1):.0f} %)"
        if self.done >= self.total:
            return f"{text} in {duration(seconds)}"
        left = f", {duration((self.total - self.done) / rate)} left" if rate > 0 else ""
        return f"{text}, {rate:.3g}/s{left}"


@contextmanager
def step_progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show one step of work; yields what is to be called with (items done, items in all).

    What the first call names counts as done before, so it comes before the first item.
    """
    with RunProgress(None) as progress:
        yield lambda done, total: progress.step(name, done, total)
