"""Cut masks where the network's own affinities see a membrane.

Not part of the published method, and off unless asked for: a small or briefly trained network knows
membranes long before its masks stop leaking through them.
"""

from __future__ import annotations

import cc3d
import numpy as np
from scipy import ndimage


def split_at_membranes(
    channels: np.ndarray,
    affinities: np.ndarray,
    min_affinity: float,
    voxel_size: tuple[float, float, float],
) -> np.ndarray:
    """Divide masks into cores of high affinity, and give what is left to the nearest core.

    Parameters
    ----------
    channels : np.ndarray
        Integer (z, y, x): the winning channel of each voxel, 0 background.
    affinities : np.ndarray
        uint8 (3, z, y, x), affinity * 255.
    min_affinity : float
        Voxels whose mean affinity over the three channels is below this are no part of a core.
    voxel_size : tuple of float
        (z, y, x) in nanometres, for distances.

    Returns
    -------
    np.ndarray
        uint32 (z, y, x): 0 where `channels` is 0; otherwise a number per core and the voxels of
        its mask nearest to it. Voxels nearest to a core of another mask form pieces of their own.
    """
    sure = affinities.sum(axis=0, dtype=np.uint16) >= round(min_affinity * 3 * 255)
    cores = cc3d.connected_components(np.where(sure, channels, 0), connectivity=6)
    cores = cores.astype(np.uint32)
    rest = (channels > 0) & (cores == 0)
    if not cores.any() or not rest.any():
        return cores if cores.any() else channels.astype(np.uint32)
    nearest = ndimage.distance_transform_edt(
        cores == 0, sampling=voxel_size, return_distances=False, return_indices=True
    )
    z, y, x = nearest[:, rest]
    owner = np.where(channels[z, y, x] == channels[rest], cores[z, y, x], 0)
    orphan = owner == 0
    owner[orphan] = cores.max() + channels[rest][orphan].astype(np.uint32)
    cores[rest] = owner
    return cores
