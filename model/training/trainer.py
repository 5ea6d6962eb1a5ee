"""One training run: the network, its optimizer and average, its steps, state and export."""

import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from agq.errors import InputError
from agq.model import checkpoint
from agq.model.network.agq import AGQ, AGQOutput
from agq.model.network.blocks import ReplicateConv3d
from agq.model.predictor import resolve_device
from agq.model.recommended import Recommended
from agq.model.training.config import OptimizerConfig, TrainConfig
from agq.model.training.data.crops import Batch, CropSource
from agq.model.training.distributed import Ranks, synchronise_norms
from agq.model.training.half import HalfRunner
from agq.model.training.losses.losses import item_losses
from agq.model.training.state import Ema
from agq.reading import parse_json


def pick_device(name: str, ranks: Ranks = Ranks()) -> torch.device:  # noqa: B008
    """Return the device of a name; of several processes each takes the GPU of its local rank."""
    if ranks.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        if ranks.local >= torch.cuda.device_count():
            raise InputError(
                f"process {ranks.local} of this machine finds {torch.cuda.device_count()} GPUs: "
                "start as many processes as there are GPUs (torchrun --nproc-per-node)"
            )
        return torch.device("cuda", ranks.local)
    return resolve_device(name)


def initialise(network: nn.Module) -> None:
    """Draw the kernels of all convolutions by He et al. (2015), in place.

    The branches have no norms: with torch's default (a third of this variance) four layers
    shrink the picture to a hundredth, and training spends its first thousand steps undoing that.
    """
    for module in network.modules():
        if isinstance(module, ReplicateConv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def decayed(network: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Group parameters for the optimizer: weights decay, norms and biases do not.

    Both are vectors, and no other parameter of the network is.
    """
    weights = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def progress(step: int, steps: int, minutes: float, budget: float | None) -> float:
    """Return the share of the schedule that is over, in [0, 1].

    Of steps, or of minutes of training (earlier parts of a resumed run included) if there is a
    `budget` of them, whichever is further.
    """
    by_time = minutes / budget if budget else 0.0
    return min(1.0, max(step / steps, by_time))


def learning_rate(step: int, done: float, config: OptimizerConfig) -> float:
    """Return the rate of the step after `step`: linear warm-up, times a half cosine of `done`.

    `done` is the `progress` before it.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.learning_rate * warmup * 0.5 * (1.0 + math.cos(math.pi * done))


class Trainer:
    """One run: the network, its optimizer and average, and how far they are.

    Parameters
    ----------
    ranks : Ranks
        Which process this is; with several, their process group must be joined.

    Raises
    ------
    InputError
        If a volume or the device cannot be used.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks = Ranks()) -> None:  # noqa: B008
        self.config = config
        self.ranks = ranks
        self.device = pick_device(config.device, ranks)
        self.source = CropSource(config, ranks.rank)
        torch.manual_seed(config.seed)
        self.network = AGQ(config.network)
        initialise(self.network)
        begun = Recommended()
        if config.init_from is not None:
            loaded = checkpoint.load(config.init_from, config.network)
            self.network.load_state_dict(loaded.state_dict)
            begun = loaded.recommended
            # An export of ours may hold logits moved by a margin; training starts without it.
            margin = float(loaded.provenance.get("background_margin", 0.0))
            if margin:
                with torch.no_grad():
                    self.network.get_parameter(self._margin_name).add_(margin)
        self.recommended = begun.trained_on(config.recommended, config.network)
        if ranks.size > 1:
            synchronise_norms(self.network)
        self.network.to(self.device)
        self.run: Callable[[torch.Tensor], AGQOutput] = (
            HalfRunner(self.network) if config.precision == "bf16" else self.network
        )
        if ranks.size > 1:
            # Running statistics are equal already, so they need no broadcast.
            self.run = DistributedDataParallel(
                _Module(self.network, self.run), broadcast_buffers=False
            )
        self.optimizer = torch.optim.Adam(
            decayed(self.network, config.optimizer.weight_decay),
            lr=config.optimizer.learning_rate,
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
        InputError
            If the state belongs to another network.
        """
        try:
            theirs = parse_json(state["config"])["network"]
            # No weight depends on it, and states of earlier releases hold a default.
            ours = self.config.network.model_copy(update={"voxel_size": None}).model_dump(
                mode="json"
            )
            if theirs | {"voxel_size": None} != ours:
                raise InputError(
                    "the saved state belongs to another network configuration; "
                    "choose another output folder or restore the configuration"
                )
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.state = {k: v.to(self.device) for k, v in state["ema"].items()}
            self.step, self.minutes = int(state["step"]), float(state["minutes"])
            best = state["best_error"]
            self.best_error = None if best is None else float(best)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            line = str(error).strip().split("\n")[0]
            raise InputError(
                f"the saved state is damaged ({type(error).__name__}: {line})"
            ) from error

    @property
    def done(self) -> float:
        """Share of the schedule that is over."""
        return progress(self.step, self.config.steps, self.minutes, self.config.time_budget_minutes)

    @property
    def _margin_name(self) -> str:
        """Name of the parameter that `background_margin` moves in an export."""
        return f"inst_decoder.predictors.{self.config.network.iterations - 1}.norm_logits.bias"

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
        limit = self.config.optimizer.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), limit)
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
            "batch_size": self.config.batch_size * self.ranks.size,
            "hardware": f"{self.ranks.size} x "
            * (self.ranks.size > 1)
            + f"{self.device.type}, {platform.processor() or platform.machine()}, "
            f"{torch.get_num_threads()} threads",
            "hours": round(self.minutes / 60, 3),
            "precision": self.config.precision,
            "seed": self.config.seed,
            "background_margin": self.config.background_margin,
        }
        weights = dict(self.ema.state)
        last = self._margin_name
        weights[last] = weights[last] - self.config.background_margin
        checkpoint.save(
            path,
            weights,
            self.config.network,
            provenance,
            recommended=self.recommended,
            half=True,
        )
        return path


class _Module(nn.Module):
    """What `DistributedDataParallel` wraps: the weights, and the way they are run."""

    def __init__(self, network: AGQ, run: Callable[[torch.Tensor], AGQOutput]) -> None:
        super().__init__()
        self.network = network
        self._run = run

    def forward(self, x: torch.Tensor) -> AGQOutput:
        return self._run(x)
