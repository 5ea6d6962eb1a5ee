"""What torchrun starts in tests: `python ddp_job.py norms|train ARGUMENTS`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from agq.model.training.config import TrainConfig
from agq.model.training.distributed import Ranks, SyncedNorm, process_group, synchronise_norms
from agq.model.training.loop import train


def norms(folder: Path) -> None:
    """Each process normalises its share; the first saves everything."""
    ranks = Ranks.of_environment()
    with process_group(ranks, torch.device("cpu")):
        whole = torch.load(folder / "whole.pt", weights_only=True)
        # Shares of different size, as numbers of queries are.
        mine = whole["x"][:5] if ranks.first else whole["x"][5:]
        layer = nn.Sequential(nn.BatchNorm1d(4, eps=1e-3))
        layer[0].weight.data = whole["weight"]
        layer[0].bias.data = whole["bias"]
        synchronise_norms(layer)
        assert isinstance(layer[0], SyncedNorm)
        mine.requires_grad_()
        y = layer(mine)
        factor = whole["factor"][:5] if ranks.first else whole["factor"][5:]
        (y * factor).sum().backward()
        found = [None, None]
        weights = layer[0].weight.grad, layer[0].bias.grad
        dist.all_gather_object(found, (y.detach(), mine.grad, *weights, layer.state_dict()))
        if ranks.first:
            torch.save(found, folder / "found.pt")


def run(config: Path, resume: str, max_steps: str) -> None:
    """Train; every process says what it thinks the steps were."""
    plan = TrainConfig.model_validate_json(config.read_text())
    report = train(plan, resume=resume == "resume", max_steps=int(max_steps))
    print("report", report.first, report.step, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "norms":
        norms(Path(sys.argv[2]))
    else:
        run(Path(sys.argv[2]), *sys.argv[3:])
