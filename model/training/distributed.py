"""Several processes train one network: ranks, agreement, and batch norms over all of them.

torchrun starts the processes and numbers them in their environment. A process alone is rank 0
of 1 and none of this costs anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from agq.errors import InputError

SETTLE_SECONDS = 1.0
"""Between the last collective of a process and the end of its group."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is.

    Attributes
    ----------
    rank, size
        Of all processes.
    local
        On this machine: the GPU to use.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> Ranks:
        """Read what torchrun set; without it, one process alone."""
        try:
            rank, size, local = (
                int(os.environ.get(name, default))
                for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
            )
        except ValueError:
            raise InputError("RANK, WORLD_SIZE and LOCAL_RANK must be numbers") from None
        return cls(rank, size, local)

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def agree(self, *values: float) -> tuple[float, ...]:
        """Return the largest of each value over all processes, the same everywhere."""
        return self._reduced(values, dist.ReduceOp.MAX) if self.size > 1 else values

    def mean(self, *values: float) -> tuple[float, ...]:
        """Return the mean of each value over all processes."""
        if self.size == 1:
            return values
        return tuple(v / self.size for v in self._reduced(values, dist.ReduceOp.SUM))

    @staticmethod
    def _reduced(
        values: tuple[float, ...], operation: dist.ReduceOp.RedOpType
    ) -> tuple[float, ...]:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        shared = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(shared, operation)
        return tuple(shared.tolist())


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Join the other processes: over NCCL on GPUs, over gloo on CPUs."""
    if ranks.size == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        # Gloo's threads free the tensors of the last collective under a lock of theirs, and may
        # need Python's lock for that. Destroying the group meanwhile holds Python's lock and waits
        # for theirs: a deadlock (seen in gdb on a busy machine). So wait first.
        time.sleep(SETTLE_SECONDS)
        dist.destroy_process_group()


class SyncedNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm whose statistics are those of the batches of all processes together.

    `torch.nn.SyncBatchNorm` refuses CPU tensors, so what a GPU would run could not be tested
    without several; this runs on both. Processes may have different numbers of values (queries).
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any shape (N, C, ...)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, ...); statistics in float32."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        values = input.float()
        axes = [0, *range(2, input.ndim)]
        shape = [1, -1, *(1,) * (input.ndim - 2)]
        count = values.new_full((1,), values.numel() / values.shape[1])
        # Two rounds: the sum of squares about the common mean does not cancel.
        sums = all_reduce(torch.cat([values.sum(axes), count]))
        n = sums[-1]
        mean = sums[:-1] / n
        centred = values - mean.view(shape)
        variance = all_reduce(centred.square().sum(axes)) / n
        with torch.no_grad():
            unbiased = variance * n / (n - 1).clamp_min(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight / torch.sqrt(variance + self.eps)
        out = centred * scale.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)


def synchronise_norms(network: nn.Module) -> None:
    """Replace all batch norms of a network, in place; parameters and keys stay."""
    for name, child in list(network.named_children()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            synced = SyncedNorm(child.num_features, child.eps, child.momentum)
            synced.load_state_dict(child.state_dict())
            setattr(network, name, synced)
        else:
            synchronise_norms(child)
