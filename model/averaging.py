"""One network from several that were trained on from the same weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from agq.errors import InputError
from agq.model.checkpoint import load, resolve, save


def average(
    checkpoints: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    half: bool = False,
) -> None:
    """Write the mean of the weights of several checkpoints ("model soup").

    Networks fine-tuned from the same weights with other data orders lie in one basin of the loss:
    their mean is often better than each, and it costs nothing at inference (Wortsman et al.,
    "Model soups", ICML 2022, uniform soup). Networks that began from different random weights have
    no useful mean.

    Parameters
    ----------
    checkpoints : sequence of path-like
        Two or more files, ours or published ones.
    output : path-like
        safetensors file to write, with the configuration of all, the provenance of each and what
        the first recommends.
    half : bool
        As in `model.checkpoint.save`.

    Raises
    ------
    InputError
        If there are fewer than two, one cannot be read, or architecture, inference constants or
        the margin of the background differ.
    """
    if len(checkpoints) < 2:
        raise InputError("an average needs two checkpoints or more")
    loaded = [load(path) for path in checkpoints]
    first = loaded[0]
    for path, other in zip(checkpoints[1:], loaded[1:], strict=True):
        expected, values = first.config.model_dump(), other.config.model_dump()
        margin = "background_margin"
        expected[margin], values[margin] = (c.provenance.get(margin, 0.0) for c in (first, other))
        if differing := [n for n in values if values[n] != expected[n]]:
            raise InputError(
                f"checkpoint {path} cannot be averaged with {checkpoints[0]}: these settings "
                f"differ: {', '.join(f'{n} {values[n]} / {expected[n]}' for n in differing)}"
            )

    def mean(key: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value  # counters of norms, which nothing reads
        return torch.stack([c.state_dict[key].double() for c in loaded]).mean(0).float()

    provenance: dict[str, Any] = {
        "average_of": [
            {"file": resolve(path).name, "sha256": c.sha256, **c.provenance}
            for path, c in zip(checkpoints, loaded, strict=True)
        ],
        "background_margin": first.provenance.get("background_margin", 0.0),
    }
    weights = {key: mean(key, value) for key, value in first.state_dict.items()}
    save(output, weights, first.config, provenance, recommended=first.recommended, half=half)
