"""What a person sees while `agq run` works: bars on a terminal, a line now and then elsewhere."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from agq import waiting
from agq.blockwise.predict.coordinator import PredictProgress
from agq.pipeline.status.text import duration
from agq.terminal import console as plain_console

_LINE_S = 10.0

_STITCH: Final = (
    *("contacts", "classes", "agglomerate"),
    *("lut up", "lut down", "lut sort", "lut segments", "lut map", "lut changes"),
)
"""Steps that are the stage `stitch` to a user, in their order."""

_STITCH_STEP: Final = re.compile(rf"({'|'.join(_STITCH)})(?: (\d+)/(\d+))?")

_STAGES: Final = {"relabel": "write", "contrast": "grey values"}
"""What a user calls other steps."""

_ITEMS: Final = {
    "import": "sections",
    "verify": "files",
    "export": "chunks",
    "suspects": "superblocks",
    "pictures": "pictures",
}
"""What stages count, if not blocks."""

_SUMMED: Final = ("pyramid", "export")
"""Stages whose steps have numbers that are added up."""

Tell = Callable[[str, int, int], object]
"""Takes the progress of a step: its name, items done, items in all."""

Shown = Tell | Literal["bars", "steps"] | None
"""Where progress goes: a callable, bars by stage, bars by step, or nowhere."""


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
def open_progress(run_dir: Path | None, on_progress: Shown) -> Iterator[Progress]:
    """Yield where progress goes: bars on standard error, a callable, or nowhere."""
    if on_progress is None or callable(on_progress):
        yield Progress(on_progress)
        return
    with RunProgress(run_dir, steps=on_progress == "steps") as progress:
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
    steps : bool
        Show every step by itself; else the steps of the stitch are one stage, and so on.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        console: Console | None = None,
        line_s: float = _LINE_S,
        steps: bool = False,
    ) -> None:
        self._run_dir = run_dir
        self._console = console or plain_console(stderr=True, wrap=True)
        self._line_s = line_s
        self._steps = steps
        self._tasks: dict[str, _Task] = {}
        self._shown = ExitStack()
        self._doing: TaskID | None = None
        self._bars: Bars | None = None
        if self._console.is_terminal:
            self._bars = Bars(
                SpinnerColumn(finished_text=" "),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[count]}", markup=False),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
            )

    def __enter__(self) -> Self:
        if self._run_dir is not None:
            self.note(f"run {self._run_dir}")
        if self._bars is not None:
            self._shown.enter_context(waiting.shown_by(self))
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.set("")
        self._shown.close()
        if self._bars is not None:
            self._bars.stop()

    def set(self, text: str) -> None:
        """Show below the bars what is done that has none (`agq.waiting.Shower`)."""
        if self._bars is None:
            return
        if self._doing is not None:
            self._bars.remove_task(self._doing)
            self._doing = None
        if text:
            self._doing = self._bars.add_task(text, total=None, count="", note="")

    def start(self, stage: str, total: int, *, done: int = 0) -> None:
        """Begin a stage of `total` items of which `done` were there before."""
        waiting.over()
        if stage != "stitch" and "stitch" in self._tasks:
            self.advance("stitch", 100)  # steps that were kept from before are not told
        bar = None
        task = self._tasks[stage] = _Task(stage, total, done)
        if self._bars is not None:
            bar = self._bars.add_task(
                stage, total=total, completed=done, count=task.count(), note=""
            )
        task.bar = bar
        if bar is None:
            resumed = f", {done} of them done before" if done else ""
            blocks = f"{total} {_ITEMS.get(stage, 'blocks')}{resumed}"
            if stage == "stitch":
                blocks = "starts"
            self.note(f"{stage}: {blocks}" if total else f"{stage}: nothing to do")

    def advance(self, stage: str, done: int, *, note: str = "") -> None:
        """Say that `done` items of a stage are done now, the earlier ones included."""
        task = self._tasks[stage]
        changed = done != task.done
        task.done = done
        if self._bars is not None and task.bar is not None:
            self._bars.update(
                task.bar, completed=done, total=task.total, count=task.count(), note=note
            )
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
        if not progress.workers and not progress.done:
            notes = ["workers are starting"]
        if progress.voxels and progress.seconds > 0:
            notes.insert(0, f"{progress.voxels / progress.seconds / 1e6:.3g} Mvoxel/s")
        if progress.failed:
            notes.append(f"{progress.failed} failed")
        self.advance(stage, task.before + progress.done + progress.skipped, note=", ".join(notes))

    def step(self, name: str, done: int, total: int) -> None:
        """Take the progress of a step with items done of a total."""
        part = _STITCH_STEP.fullmatch(name)
        if self._steps:
            self._counted(name, done, total)
        elif name.endswith(" checksums"):
            pass  # they belong to the step before
        elif part is not None:
            self._stitch(part, done, total)
        elif name.partition(" ")[0] in _SUMMED:
            self._summed(name.partition(" ")[0], name, done, total)
        else:
            self._counted(_STAGES.get(name, name), done, total)

    def _counted(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks or self._tasks[name].total != total:
            self._forget(name)
            self.start(name, total, done=done)
        else:
            self.advance(name, done)

    def _summed(self, stage: str, name: str, done: int, total: int) -> None:
        """Show a stage whose steps come one after the other: their items are added up."""
        if stage not in self._tasks:
            self.start(stage, total, done=done)
        task = self._tasks[stage]
        task.parts[name] = done, total
        done, task.total = (sum(column) for column in zip(*task.parts.values(), strict=True))
        self.advance(stage, done)

    def _stitch(self, step: re.Match[str], done: int, total: int) -> None:
        """Show how far the steps of the stitch are, in percent: each counts the same."""
        if "stitch" not in self._tasks:
            self.start("stitch", 100)
        fraction = done / max(total, 1)
        if step[3]:
            fraction = (int(step[2]) - 1 + fraction) / int(step[3])
        share = (_STITCH.index(step[1]) + fraction) / len(_STITCH)
        self.advance("stitch", max(self._tasks["stitch"].done, round(100 * share)))

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(Text(text), soft_wrap=True)

    def _forget(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if task is not None and task.bar is not None and self._bars is not None:
            self._bars.remove_task(task.bar)


class _Task:
    def __init__(self, name: str, total: int, done: int) -> None:
        self.total = total
        self.before = self.done = done
        self.bar: TaskID | None = None
        self.parts: dict[str, tuple[int, int]] = {}
        self.started = self.shown = time.monotonic()
        self._percent = name == "stitch"

    def count(self) -> str:
        """Items done of all."""
        return f"{self.done} %" if self._percent else f"{self.done}/{self.total}"

    def text(self, now: float) -> str:
        """How far, how fast and how long."""
        seconds = max(now - self.started, 1e-3)
        rate = (self.done - self.before) / seconds
        text = self.count()
        if not self._percent:
            text += f" ({100 * self.done / max(self.total, 1):.0f} %)"
        if self.done >= self.total:
            return f"{text} in {duration(seconds)}"
        if self._percent:
            return text
        left = f", {duration((self.total - self.done) / rate)} left" if rate > 0 else ""
        return f"{text}, {rate:.3g}/s{left}"


@contextmanager
def step_progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show one step of work; yields what is to be called with (items done, items in all).

    What the first call names counts as done before, so it comes before the first item.
    """
    with RunProgress(None) as progress:
        yield lambda done, total: progress.step(name, done, total)
