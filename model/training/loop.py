"""The training loop: plain torch, one process, stoppable and resumable at any step."""

import json
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn

from model import checkpoint
from model.agq import AGQ, AGQOutput
from model.errors import ModelInputError
from model.training.config import TrainConfig
from model.training.data import Batch, CropSource
from model.training.half import HalfRunner
from model.training.init import initialise
from model.training.losses import item_losses
from model.training.schedule import learning_rate, progress
from model.training.state import Ema, load_state, save_state
from model.training.validate import Score, Validator

STATE_NAME = "state.pt"
EXPORT_NAME = "model.safetensors"
BEST_NAME = "best.safetensors"
METRICS_NAME = "metrics.jsonl"


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
    """

    step: int
    minutes: float
    finished: bool
    export: Path
    best: Path | None
    best_error: float | None


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
        pass  # not in the main thread: signals stay with whoever owns it
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def pick_device(name: str) -> torch.device:
    """Return the device of a name; "auto" takes CUDA, then MPS, then the CPU."""
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ModelInputError(f"device {name!r} is unknown: {error}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


class Trainer:
    """One run: the network, its optimizer and average, and how far they are.

    Parameters
    ----------
    config : TrainConfig
        The run.

    Raises
    ------
    ModelInputError
        If a volume or the device cannot be used.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self.source = CropSource(config)
        torch.manual_seed(config.seed)
        self.network = AGQ(config.network)
        initialise(self.network)
        if config.init_from is not None:
            loaded = checkpoint.load(config.init_from, config.network)
            self.network.load_state_dict(loaded.state_dict)
        self.network.to(self.device)
        self.run: Callable[[torch.Tensor], AGQOutput] = (
            HalfRunner(self.network) if config.precision == "bf16" else self.network
        )
        self.optimizer = torch.optim.Adam(
            self.network.parameters(),
            lr=config.optimizer.learning_rate,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.ema = Ema(self.network, config.optimizer.ema_decay)
        self.step = 0
        self.minutes = 0.0
        self.best_error: float | None = None

    def state(self) -> dict[str, Any]:
        """Return everything an exact continuation needs."""
        return {
            "step": self.step,
            "minutes": self.minutes,
            "best_error": self.best_error,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state,
            "config": self.config.model_dump_json(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises
        ------
        ModelInputError
            If the state belongs to another network.
        """
        theirs = json.loads(state["config"])["network"]
        if theirs != json.loads(self.config.network.model_dump_json()):
            raise ModelInputError(
                "the saved state belongs to another network configuration; "
                "choose another output folder or restore the configuration"
            )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.state = {k: v.to(self.device) for k, v in state["ema"].items()}
        self.step, self.minutes = state["step"], state["minutes"]
        self.best_error = state["best_error"]

    @property
    def done(self) -> float:
        """Share of the schedule that is over."""
        return progress(self.step, self.config.steps, self.minutes, self.config.time_budget_minutes)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Do one optimisation step and return its metrics."""
        rate = learning_rate(self.step, self.done, self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        if self.done >= self.config.optimizer.freeze_norm_after:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        raw = batch.raw.to(self.device)
        out = self.run(raw)
        total = torch.zeros((), device=self.device)
        metrics: dict[str, float] = {}
        for item, targets in enumerate(batch.targets):
            loss, terms = item_losses(
                out.affinity_logits[item],
                [prediction[item] for prediction in out.predictions],
                out.mask_features[item],
                targets.to(self.device),
                self.config.losses,
            )
            total = total + loss / len(batch.targets)
            terms["seeds"] = out.n_seeds[item]
            terms["instances"] = len(targets.masks)
            for key, value in terms.items():
                metrics[key] = metrics.get(key, 0.0) + value / len(batch.targets)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optimizer.clip_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
            self.ema.update(self.network, self.step)
        metrics |= {"lr": rate, "grad_norm": float(norm)}
        self.step += 1
        return metrics

    def export(self, path: Path) -> Path:
        """Write the averaged weights, matrices in half precision, with where they come from."""
        volumes = [str(volume.container) for volume in self.config.volumes]
        provenance = {
            "trained_by": "model.training",
            "data": volumes,
            "iterations": self.step,
            "batch_size": self.config.batch_size,
            "hardware": f"{self.device.type}, {platform.processor() or platform.machine()}, "
            f"{torch.get_num_threads()} threads",
            "hours": round(self.minutes / 60, 3),
            "precision": self.config.precision,
            "seed": self.config.seed,
            "background_margin": self.config.background_margin,
        }
        weights = dict(self.ema.state)
        last = f"inst_decoder.predictors.{self.config.network.iterations - 1}.norm_logits.bias"
        weights[last] = weights[last] - self.config.background_margin
        checkpoint.save(path, weights, self.config.network, provenance, half=True)
        return path


def train(config: TrainConfig, resume: bool = False, max_steps: int | None = None) -> TrainReport:
    """Train, or go on training, until the schedule ends or the run is told to stop.

    SIGTERM, SIGUSR1 and Ctrl-C end the run after the step at hand with its state saved.

    Parameters
    ----------
    config : TrainConfig
        The run; its `output` receives state.pt, metrics.jsonl, model.safetensors (averaged
        weights) and, with validation volumes, best.safetensors.
    resume : bool
        Go on from the state in `output`.
    max_steps : int or None
        Stop, resumable, once this many steps are done in all; the schedule stays that of the
        config.

    Returns
    -------
    TrainReport
        How far it came.

    Raises
    ------
    ModelInputError
        If the data, the device or the state cannot be used, or `output` already holds a run and
        `resume` is not set.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    output = config.output
    state_path = output / STATE_NAME
    if not resume and state_path.exists():
        raise ModelInputError(
            f"{state_path} exists: resume that run, or choose another output folder"
        )
    trainer = Trainer(config)
    if resume:
        trainer.restore(load_state(state_path))
    output.mkdir(parents=True, exist_ok=True)
    validator = Validator(config) if config.validation else None
    last = min(config.steps, max_steps or config.steps)
    with (
        _stop_on_signals() as stop,
        (output / METRICS_NAME).open("a", encoding="utf-8") as metrics,
        _progress() as bar,
    ):
        _run(trainer, validator, last, stop, metrics, bar)
    finished = trainer.done >= 1.0
    return TrainReport(
        trainer.step,
        trainer.minutes,
        finished,
        output / EXPORT_NAME,
        output / BEST_NAME if validator else None,
        trainer.best_error,
    )


def _progress() -> Progress:
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        refresh_per_second=1,
    )


def _run(
    trainer: Trainer,
    validator: Validator | None,
    last: int,
    stop: _StopRequest,
    metrics: Any,
    bar: Progress,
) -> None:
    config = trainer.config
    task = bar.add_task("training", total=config.steps, completed=trainer.step, note="")
    saved = validated = trainer.minutes
    sums: dict[str, float] = {}
    since, waited, began = 0, 0.0, time.monotonic()
    batches = trainer.source.batches(trainer.step, last, config.loader_threads)
    mark = time.monotonic()
    try:
        while trainer.step < last and trainer.done < 1.0 and not stop.asked:
            batch = next(batches)
            waited += time.monotonic() - mark
            for key, value in trainer.train_step(batch).items():
                sums[key] = sums.get(key, 0.0) + value
            since += 1
            now = time.monotonic()
            trainer.minutes += (now - mark) / 60
            mark = now
            if trainer.step % config.log_every == 0 or trainer.step == last:
                line = {key: value / since for key, value in sums.items()}
                line |= {
                    "step": trainer.step,
                    "minutes": trainer.minutes,
                    "seconds_per_step": (now - began) / since,
                    "waiting": waited / max(now - began, 1e-9),
                }
                _write(metrics, line)
                bar.update(task, completed=trainer.step, note=f"loss {line['loss']:.3f}")
                sums, since, waited, began = {}, 0, 0.0, now
            if validator and trainer.minutes - validated >= config.validate_minutes:
                _validate(trainer, validator, metrics)
                validated = trainer.minutes
                mark = began = time.monotonic()
            if trainer.minutes - saved >= config.checkpoint_minutes:
                save_state(config.output / STATE_NAME, trainer.state())
                saved = trainer.minutes
    finally:
        batches.close()
    save_state(config.output / STATE_NAME, trainer.state())
    if validator:
        _validate(trainer, validator, metrics)
    else:
        trainer.export(config.output / EXPORT_NAME)


def _validate(trainer: Trainer, validator: Validator, metrics: Any) -> Score:
    """Export, measure the export as a user would run it, and keep it if it is the best."""
    export = trainer.export(trainer.config.output / EXPORT_NAME)
    score = validator.score(export)
    _write(metrics, {"step": trainer.step, "minutes": trainer.minutes, **score.to_dict()})
    if trainer.best_error is None or score.error < trainer.best_error:
        trainer.best_error = score.error
        trainer.export(trainer.config.output / BEST_NAME)
    return score


def _write(metrics: Any, line: dict[str, Any]) -> None:
    metrics.write(json.dumps(line) + "\n")
    metrics.flush()
