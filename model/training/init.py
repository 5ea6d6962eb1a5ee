"""Weights to start from."""

from torch import nn

from agq.model.network.blocks import ReplicateConv3d


def initialise(network: nn.Module) -> None:
    """Draw the kernels of all convolutions by He et al. (2015), in place.

    The branches have no norms: with torch's default (a third of this variance) four layers
    shrink the picture to a hundredth, and training spends its first thousand steps undoing that.

    Parameters
    ----------
    network : torch.nn.Module
        Other layers keep torch's defaults.
    """
    for module in network.modules():
        if isinstance(module, ReplicateConv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
