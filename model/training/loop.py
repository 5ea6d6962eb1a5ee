"""The training loop: plain torch, one process or one per GPU, stoppable and resumable anywhere."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from agq.errors import InputError
from agq.model.training.board import Board
from agq.model.training.config import TrainConfig
from agq.model.training.distributed import Ranks, process_group
from agq.model.training.state import load_state, save_state
from agq.model.training.trainer import Trainer, pick_device
from agq.model.training.validate import Validator

STATE_NAME = "state.pt"
EXPORT_NAME = "model.safetensors"
BEST_NAME = "best.safetensors"
METRICS_NAME = "metrics.jsonl"

_FIRST_STEPS, _FIRST_S = 5, 20.0
"""After so many steps, or seconds, a training says what it will take."""

_TOO_LONG_S = 2 * 86400.0
"""Seconds of training on a CPU above which a configuration for one is named."""

_FEW_STEPS = 500
"""Steps below which a network of any size has learned next to nothing."""


@dataclass(frozen=True)
class TrainReport:
    """How a run ended.

    Attributes
    ----------
    step : int
        Steps done in all, earlier parts included.
    minutes : float
        Training time in all.
    finished : bool
        Whether the schedule is over; otherwise the run can be resumed.
    export : pathlib.Path
        The averaged weights as a checkpoint.
    best : pathlib.Path or None
        The export that validated best, if there is validation.
    best_error : float or None
        Its adapted Rand error.
    waiting : float
        Share of this part's training time spent waiting for crops, the first ones included.
    first : bool
        Whether this process is the one that writes files.
    """

    step: int
    minutes: float
    finished: bool
    export: Path
    best: Path | None
    best_error: float | None
    waiting: float
    first: bool


class _StopRequest:
    """Set by SIGTERM, SIGUSR1 (a cluster's notice) or Ctrl-C."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, *_: object) -> None:
        self.asked = True


@contextmanager
def _stop_on_signals() -> Iterator[_StopRequest]:
    request = _StopRequest()
    wanted = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {}
    try:
        for number in wanted:
            previous[number] = signal.signal(number, request)
    except ValueError:
        pass  # not in the main thread: its owner handles signals
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def forecast(config: TrainConfig, step_s: float, done: int, minutes: float, device: str) -> str:
    """Say what the rest of a training will take.

    Parameters
    ----------
    config : TrainConfig
        The run.
    step_s : float
        Seconds of one step.
    done : int
        Steps done.
    minutes : float
        Minutes of training that they took.
    device : str
        Kind of device, such as ``cpu``.

    Returns
    -------
    str
        One line. Where a CPU would need days, or the time budget ends a training before it has
        learned much, with what fits.
    """
    left = config.steps - done
    line = f"a step takes about {step_s:.2g} s on this {device}: {left:,} steps take about "
    line += _duration(left * step_s)
    expected = config.steps
    budget = config.time_budget_minutes
    if budget is not None and (rest := max(0.0, 60 * (budget - minutes))) < left * step_s:
        expected = done + int(rest / step_s)
        line += (
            f"; the time budget ends it in {_duration(rest)}, after about {expected:,} of "
            f"{config.steps:,} steps"
        )
    too_long = (expected - done) * step_s > _TOO_LONG_S
    if device == "cpu" and (too_long or expected < min(config.steps, _FEW_STEPS)):
        line += (
            ". Train on a GPU, or take a network and crops that a CPU trains in an hour or two, as "
            "configs/train-demo.yaml of the repository has them (network.filters [8, 16, 24, 32, "
            "40], embed_dim 32, learned_queries 20, input_shape [17, 97, 97], precision bf16, "
            "time_budget_minutes 70)"
        )
    return line


def train(
    config: TrainConfig,
    resume: bool = False,
    max_steps: int | None = None,
    say: Callable[[str], object] | None = None,
) -> TrainReport:
    """Train, or go on training, until the schedule ends or the run is told to stop.

    SIGTERM, SIGUSR1 and Ctrl-C end the run after the step at hand with its state saved. Under
    torchrun every process takes other crops of the same steps, and the first one writes.

    Parameters
    ----------
    config : TrainConfig
        The run; its `output` receives state.pt, metrics.jsonl, model.safetensors (averaged
        weights), with validation volumes best.safetensors, and if asked TensorBoard's files.
    resume : bool
        Go on from the state in `output`.
    max_steps : int or None
        Stop, resumable, once this many steps are done in all; the schedule stays that of the
        config.
    say : callable or None
        Told after the first steps what the whole will take (`forecast`).

    Raises
    ------
    InputError
        If the data, the device or the state cannot be used, or `output` already holds a run and
        `resume` is not set.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    output = config.output
    state_path = output / STATE_NAME
    if not resume and state_path.exists():
        raise InputError(f"{state_path} exists: resume that run, or choose another output folder")
    ranks = Ranks.of_environment()
    with process_group(ranks, pick_device(config.device, ranks)):
        trainer = Trainer(config, ranks)
        if resume:
            trainer.restore(load_state(state_path))
        output.mkdir(parents=True, exist_ok=True)
        validator = Validator(config) if config.validation and ranks.first else None
        last = min(config.steps, max_steps or config.steps)
        with (
            _stop_on_signals() as stop,
            _Records(config, ranks, trainer.step) as records,
        ):
            waiting = _Run(trainer, validator, records, stop, last, say).run()
    return TrainReport(
        trainer.step,
        trainer.minutes,
        trainer.done >= 1.0,
        output / EXPORT_NAME,
        output / BEST_NAME if config.validation else None,
        trainer.best_error,
        waiting,
        ranks.first,
    )


class _Records:
    """Where the first process tells how training goes; the others are silent."""

    def __init__(self, config: TrainConfig, ranks: Ranks, step: int) -> None:
        self.config = config
        self.active = ranks.first
        self.step = step
        self._metrics: IO[str] | None = None

    def __enter__(self) -> "_Records":
        if self.active:
            self._metrics = (self.config.output / METRICS_NAME).open("a", encoding="utf-8")
        self.board = Board(self.config.output if self.active and self.config.tensorboard else None)
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            refresh_per_second=1,
            disable=not self.active,
        )
        self.bar.start()
        self._task = self.bar.add_task(
            "training", total=self.config.steps, completed=self.step, note=""
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.board.close()
        if self._metrics is not None:
            self._metrics.close()

    def write(self, line: dict[str, Any]) -> None:
        """Record one line of figures."""
        if self._metrics is None:
            return
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        self.board.scalars(line)
        if "loss" in line:
            note = f"loss {line['loss']:.3f}, waiting {line['waiting']:.1%}"
            self.bar.update(self._task, completed=line["step"], note=note)


class _Run:
    """The steps of one command."""

    def __init__(
        self,
        trainer: Trainer,
        validator: Validator | None,
        records: _Records,
        stop: _StopRequest,
        last: int,
        say: Callable[[str], object] | None,
    ) -> None:
        self._say = say
        self._steps: list[float] = []
        self.trainer = trainer
        self.validator = validator
        self.records = records
        self.stop = stop
        self.last = last

    def run(self) -> float:
        """Train and save; return the share of time spent waiting for crops."""
        trainer, config = self.trainer, self.trainer.config
        saved = validated = trainer.minutes
        sums: dict[str, float] = {}
        since, waited, began = 0, 0.0, time.monotonic()
        all_waited = all_spent = 0.0
        batches = trainer.source.batches(trainer.step, self.last, config.loader_threads)
        mark, stopping = time.monotonic(), self._stopping()
        try:
            while trainer.step < self.last and trainer.done < 1.0 and not stopping:
                batch = next(batches)
                waited += time.monotonic() - mark
                for key, value in trainer.train_step(batch).items():
                    sums[key] = sums.get(key, 0.0) + value
                since += 1
                now = time.monotonic()
                trainer.minutes += (now - mark) / 60
                self._tell(now - mark)
                stopping = self._stopping()
                mark = now
                if trainer.step % config.log_every == 0 or trainer.step == self.last or stopping:
                    self._log(sums, since, waited, now - began)
                    all_waited, all_spent = all_waited + waited, all_spent + now - began
                    sums, since, waited, began = {}, 0, 0.0, now
                if config.validation and trainer.minutes - validated >= config.validate_minutes:
                    self._validate()
                    validated = trainer.minutes
                    mark = began = time.monotonic()
                if trainer.minutes - saved >= config.checkpoint_minutes:
                    self._save()
                    saved = trainer.minutes
        finally:
            batches.close()
        self._save()
        if config.validation:
            self._validate()
        elif trainer.ranks.first:
            trainer.export(config.output / EXPORT_NAME)
        return all_waited / max(all_spent, 1e-9)

    def _tell(self, seconds: float) -> None:
        """Say once what the training will take, from its first steps in this process."""
        if self._say is None or not self.trainer.ranks.first:
            return
        self._steps.append(seconds)
        # The first step also waits for its crops and sets the machine up.
        if len(self._steps) < _FIRST_STEPS and sum(self._steps) < _FIRST_S:
            return
        trainer, step_s = self.trainer, min(self._steps)
        device = trainer.device.type
        self._say(forecast(trainer.config, step_s, trainer.step, trainer.minutes, device))
        self._say = None

    def _stopping(self) -> bool:
        """Agree with the other processes on the clock, and on whether to stop."""
        trainer = self.trainer
        asked, trainer.minutes = trainer.ranks.agree(float(self.stop.asked), trainer.minutes)
        return asked > 0

    def _log(self, sums: dict[str, float], since: int, waited: float, spent: float) -> None:
        trainer = self.trainer
        means = trainer.ranks.mean(*(value / since for value in sums.values()))
        self.records.write(
            dict(zip(sums, means, strict=True))
            | {
                "step": trainer.step,
                "minutes": trainer.minutes,
                "seconds_per_step": spent / since,
                "waiting": waited / max(spent, 1e-9),
            }
        )

    def _save(self) -> None:
        if self.trainer.ranks.first:
            save_state(self.trainer.config.output / STATE_NAME, self.trainer.state())

    def _validate(self) -> None:
        """Export, measure the export as a user would run it, and keep it if it is the best."""
        trainer, output = self.trainer, self.trainer.config.output
        if self.validator is None:
            return
        export = trainer.export(output / EXPORT_NAME)
        score = self.validator.score(export)
        self.records.write({"step": trainer.step, "minutes": trainer.minutes, **score.to_dict()})
        self.records.board.pictures(trainer.step, self.validator.samples)
        if trainer.best_error is None or score.error < trainer.best_error:
            trainer.best_error = score.error
            trainer.export(output / BEST_NAME)
