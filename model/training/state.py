"""The state of a training run: averaged weights, and what is needed to go on exactly."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agq.errors import InputError
from agq.reading import require_file


class Ema:
    """Exponential moving average of weights and running statistics.

    Parameters
    ----------
    network : torch.nn.Module
        Its state dict is averaged; integer entries are copied.
    decay : float
        Share of the old average kept in each step; smaller in the first steps, where
        (1 + step) / (10 + step) is the limit.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {key: value.detach().clone() for key, value in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after a step (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        state = network.state_dict()
        means = [key for key, value in self.state.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.state[key] for key in means], [state[key] for key in means], 1 - decay
        )
        for key in self.state.keys() - set(means):
            self.state[key].copy_(state[key])


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state so that a crash leaves the old file or the new one, never a part."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state (tensors and plain values only).

    Raises
    ------
    InputError
        If there is no state or it cannot be read.
    """
    if not path.exists():
        raise InputError(f"nothing to resume: {path} does not exist; train without resume")
    try:
        require_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises depends on the byte that is wrong
        line = str(error).strip().split("\n")[0]
        raise InputError(f"cannot read the training state {path}: {line}") from error
    if not isinstance(state, dict) or "step" not in state:
        raise InputError(f"{path} is not a training state of this program")
    return state
