"""Which form of the arithmetic a device gets: small pieces in a cache, or few large steps."""

from torch import Tensor

CARD_VOXELS = 2**19
"""Voxels that a card works on at once: 0.4 GiB of logits of 201 channels."""


def on_card(tensor: Tensor) -> bool:
    """Tell whether a tensor is on a device with memory and a queue of its own."""
    return tensor.device.type != "cpu"
