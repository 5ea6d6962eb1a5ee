"""What the network should answer for a crop: affinities, instance masks, sampled voxels.

All of it follows the published training of AGQ (Chen et al., ICLR 2025): the labels of a crop
become connected pieces, their touching borders become background, and the targets are resized to
the grid of the predictions (P1).
"""

from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from agq.errors import InputError


@dataclass(frozen=True)
class Targets:
    """Targets of one crop at P1 resolution.

    Attributes
    ----------
    affinities : torch.Tensor
        (3, z1, y1, x1) float32 in [0, 1]; channel c of voxel v belongs to v and its previous voxel
        on axis c of (z, y, x).
    masks : torch.Tensor
        (N, z1, y1, x1) float32 in [0, 1], one soft mask per instance; N may be 0.
    samples : torch.Tensor
        (K,) int64, flat P1 indices of the voxels drawn for the discrimination loss; K may be 0.
    sample_instances : torch.Tensor
        (K,) int64, the row of `masks` that each sampled voxel belongs to.
    valid, affinities_valid : torch.Tensor or None
        (z1, y1, x1) and (3, z1, y1, x1) bool: where the truth is known; None: everywhere.
    """

    affinities: torch.Tensor
    masks: torch.Tensor
    samples: torch.Tensor
    sample_instances: torch.Tensor
    valid: torch.Tensor | None = None
    affinities_valid: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Targets":
        """Return the same targets on a device."""
        tensors: Any = {name: t if t is None else t.to(device) for name, t in vars(self).items()}
        return Targets(**tensors)


def relabel_pieces(labels: np.ndarray) -> np.ndarray:
    """Give every 26-connected piece of every label its own number, in raster order: uint32.

    A neurite that leaves the crop and comes back is two objects to a network that sees the crop
    only. Labels are (z, y, x) of any integer type, 0 is background.
    """
    if labels.ndim != 3:
        raise InputError(f"labels must be 3-D (z, y, x), got shape {labels.shape}")
    pieces = np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.uint32)
    if labels.size and labels.min() > 0:
        pieces += 1  # np.unique numbers from 0, which means background
    return np.asarray(cc3d.connected_components(pieces, connectivity=26)).astype(np.uint32)


def erode_borders(labels: np.ndarray) -> np.ndarray:
    """Set voxels to 0 whose 3x3 window in their own section holds more than one instance.

    Background in the window does not count (K. Lee's rule, as in PyTorch Connectomics): only places
    where two instances touch are opened. Labels are (z, y, x) integers below 2**53, for scipy
    filters in double precision.
    """
    highest = ndimage.maximum_filter(labels, size=(1, 3, 3), mode="nearest")
    ceiling = labels.dtype.type(labels.max(initial=0) + 1)
    lowest = ndimage.minimum_filter(
        np.where(labels == 0, ceiling, labels), size=(1, 3, 3), mode="nearest"
    )
    return np.where(highest == lowest, labels, 0).astype(labels.dtype)


def affinities_of(labels: np.ndarray) -> np.ndarray:
    """Tell for each voxel and axis whether the previous voxel has the same nonzero label.

    Labels (z, y, x) give (3, z, y, x) float32 of 0 and 1, channels in the order z, y, x. The first
    plane of an axis has no previous voxel inside the crop; it counts as connected where it is not
    background.
    """
    out = np.empty((3, *labels.shape), dtype=np.float32)
    for axis in range(3):
        along, same = np.moveaxis(labels, axis, 0), np.moveaxis(out[axis], axis, 0)
        same[:1] = along[:1] > 0
        same[1:] = (along[1:] == along[:-1]) & (along[1:] > 0)
    return out


def p1_shape(shape: tuple[int, int, int], isotropic: bool) -> tuple[int, int, int]:
    """Return the size (z, y, x) of the prediction grid for an input of this size.

    `isotropic`: level 1 of the backbone also halves z (`ModelConfig.isotropy[1]`).
    """
    z, y, x = shape
    return (-(-z // 2) if isotropic else z, -(-y // 2), -(-x // 2))


def resize(volumes: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Resize (C, z, y, x) trilinearly, the way predictions are brought back to the input size.

    `align_corners=False` on purpose: inference upsamples with it, and the two must undo each other.
    """
    if volumes.shape[0] == 0:
        return volumes.new_zeros((0, *shape))
    return F.interpolate(volumes[None], size=shape, mode="trilinear", align_corners=False)[0]


def instance_masks(
    labels: np.ndarray, shape: tuple[int, int, int], min_voxels: int
) -> torch.Tensor:
    """Build the soft mask of every instance on the prediction grid.

    Instances (z, y, x) uint32, eroded, give (N, z1, y1, x1) float32 in increasing order of the
    label. Those of fewer than `min_voxels` are left to the background: below the mass limit of
    inference they can never become a label.
    """
    counts = np.bincount(labels.ravel())
    counts[:1] = 0
    kept = np.flatnonzero(counts >= max(1, min_voxels))
    flat = torch.from_numpy(labels.astype(np.int64))
    # a few at a time: all one-hot volumes of a large crop together would need gigabytes
    parts = [
        resize((flat[None] == torch.from_numpy(some)[:, None, None, None]).float(), shape)
        for some in np.array_split(kept, max(1, len(kept) // 16))
    ]
    return torch.cat(parts)


def sample_voxels(
    masks: torch.Tensor, count: int, exponent: float, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw voxels for the discrimination loss, the small instances over-represented.

    Voxels that instances claim whole are drawn without replacement, one of an instance of s voxels
    with a weight of s ** -exponent (Efraimidis & Spirakis 2006, by the largest perturbed logarithms
    of the weights).

    Parameters
    ----------
    masks : torch.Tensor
        (N, z1, y1, x1) soft masks; a voxel belongs to the instance with the largest.
    count : int
        Most voxels to draw.
    exponent : float
        0 draws voxels uniformly, 1 draws instances uniformly.

    Returns
    -------
    samples, instances : torch.Tensor
        (K,) int64 flat voxel indices and rows of `masks`, K at most `count`.
    """
    empty = torch.zeros(0, dtype=torch.int64)
    if masks.shape[0] == 0 or count == 0:
        return empty, empty
    flat = masks.flatten(1)
    voxels = torch.nonzero(flat.sum(0) >= 1.0)[:, 0].numpy()
    owners = flat.argmax(0).numpy()[voxels]
    sizes = np.bincount(owners, minlength=masks.shape[0])
    keys = rng.gumbel(size=len(voxels)) - exponent * np.log(sizes[owners])
    drawn = np.argsort(-keys, kind="stable")[:count]
    return torch.from_numpy(voxels[drawn]), torch.from_numpy(owners[drawn])


def make_targets(
    labels: np.ndarray,
    *,
    isotropic: bool = False,
    min_voxels: int = 40,
    samples: int = 4096,
    exponent: float = 0.6,
    rng: np.random.Generator,
    valid: np.ndarray | None = None,
) -> Targets:
    """Turn the labels of a crop into everything the losses need.

    Parameters
    ----------
    labels : numpy.ndarray
        (z, y, x) integers, 0 is background.
    isotropic : bool
        Whether P1 halves z too (`ModelConfig.isotropy[1]`).
    min_voxels : int
        Smallest instance, in input voxels, that gets a mask.
    samples : int
        Voxels drawn for the discrimination loss.
    exponent : float
        How strongly small instances are favoured in that draw.
    valid : numpy.ndarray or None
        (z, y, x) bool: where the labels are known (they are 0 elsewhere); None: everywhere.

    Raises
    ------
    InputError
        If `labels` is not 3-D.
    """
    pieces = erode_borders(relabel_pieces(labels))
    z, y, x = labels.shape
    shape = p1_shape((z, y, x), isotropic)
    masks = instance_masks(pieces, shape, min_voxels)
    voxels, pairs = (None, None) if valid is None else _valid_targets(valid, shape)
    if voxels is not None:
        masks = masks * voxels
    drawn, owners = sample_voxels(masks, samples, exponent, rng)
    return Targets(
        affinities=resize(torch.from_numpy(affinities_of(pieces)), shape),
        masks=masks,
        samples=drawn,
        sample_instances=owners,
        valid=voxels,
        affinities_valid=pairs,
    )


def _valid_targets(
    valid: np.ndarray, shape: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where voxels, and their pairs with the previous voxel on each axis, are known."""
    pairs = np.repeat(valid[None], 3, axis=0)
    for axis in range(3):
        np.moveaxis(pairs[axis], axis, 0)[1:] &= np.moveaxis(valid, axis, 0)[:-1]
    both = torch.from_numpy(np.concatenate([valid[None], pairs]).astype(np.float32))
    # A voxel of the coarser grid is known if all that it is made of is.
    valid_at_p1 = resize(both, shape) > 0.999
    return valid_at_p1[0], valid_at_p1[1:]
