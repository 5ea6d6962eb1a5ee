"""Mixed precision: bfloat16 arithmetic on float32 weights.

The weights of convolutions and linear layers are cast for each step and their gradients arrive in
float32; norms keep float32 weights and statistics. Unlike autocast this leaves no casts between
layers, which on a CPU cost more than the convolutions.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from agq.model.network.agq import AGQ, AGQOutput

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)


class HalfRunner:
    """Runs a network in bfloat16 with channels-last activations.

    Parameters
    ----------
    network : AGQ
        Keeps its float32 weights; hooks are added around its group norms, whose backward pass is
        several times slower on channels-last tensors of a CPU than two copies.
    """

    def __init__(self, network: AGQ) -> None:
        self.network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.exact = {n for n, m in network.named_modules() if isinstance(m, _NORMS)}
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_to_contiguous)
                module.register_forward_hook(_to_channels_last)

    def __call__(self, x: Tensor) -> AGQOutput:
        """Run (B, 1, z, y, x) float32; gradients reach the float32 weights."""
        weights = {
            name: weight if name.rpartition(".")[0] in self.exact else weight.bfloat16()
            for name, weight in self.network.named_parameters()
        }
        x = x.to(torch.bfloat16, memory_format=torch.channels_last_3d)
        output: AGQOutput = functional_call(self.network, weights, (x,))
        return output


def _to_contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(),)


def _to_channels_last(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out.contiguous(memory_format=torch.channels_last_3d)
