"""Test-time flips: affinities averaged over mirror images of a block.

Not part of the published method, and off unless asked for. Masks and seeds come from the block as
it is; averaged affinities decide where masks are cut (`decode.split`) and what the stitch sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

import torch
from torch import Tensor

from agq.model.config import Flips
from agq.model.decode.inference import resized_affinities

Axes = tuple[int, ...]

MIRRORED: dict[Flips, Axes] = {"none": (), "inplane": (1, 2), "all": (0, 1, 2)}


def mirror_axes(flips: Flips) -> Iterator[Axes]:
    """Yield the axes (0 z, 1 y, 2 x) to mirror for each image but the block as it is."""
    axes = MIRRORED[flips]
    for n in range(1, len(axes) + 1):
        yield from combinations(axes, n)


def flipped_affinities(
    plain: Tensor, run: Callable[[Tensor], Tensor], image: Tensor, flips: Flips
) -> Tensor:
    """Return the affinities of a block, averaged over its mirror images.

    An affinity belongs to a voxel and its previous voxel on an axis. In a mirror image the two
    change places, so on a mirrored axis the value is found one voxel before, and the first plane,
    whose previous voxel is outside the block, has none.

    Parameters
    ----------
    plain : Tensor
        float32 (3, z1, y1, x1) affinity logits of the block as it is.
    run : callable
        Gives the logits of an image (z, y, x).
    image : Tensor
        float32 (z, y, x) normalised block.
    flips : {"none", "inplane", "all"}
        1, 4 or 8 images.

    Returns
    -------
    Tensor
        float32 (3, z, y, x) in [0, 1], on the device of the block. The images are added in a fixed
        order, so the result is repeatable.
    """
    size = (image.shape[0], image.shape[1], image.shape[2])
    total = resized_affinities(plain, size)
    if flips == "none":
        return total
    count = torch.ones_like(total)
    for axes in mirror_axes(flips):
        logits = run(image.flip(axes).contiguous())
        turned_back = resized_affinities(logits, size).flip([axis + 1 for axis in axes])
        for channel in range(3):
            if channel in axes:
                n = size[channel]
                total[channel].narrow(channel, 1, n - 1).add_(
                    turned_back[channel].narrow(channel, 0, n - 1)
                )
                count[channel].narrow(channel, 1, n - 1).add_(1)
            else:
                total[channel].add_(turned_back[channel])
                count[channel].add_(1)
    return total.div_(count)
