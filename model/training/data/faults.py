"""Faults of serial sections that change greys only: blur, missing parts, cut-blur, cut-noise."""

import numpy as np
from scipy import ndimage

from agq.model.training.config import AugmentConfig


def spoil(raw: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Apply each fault by its chance.

    Parameters
    ----------
    raw : numpy.ndarray
        (z, y, x) float32 in [0, 1].
    config : AugmentConfig
        Chances.
    rng : numpy.random.Generator
        Source of the choice.

    Returns
    -------
    numpy.ndarray
        (z, y, x) float32 in [0, 1]; the input is left alone.
    """
    out = raw.copy()
    section = int(rng.integers(len(out)))
    if rng.random() < config.blur:
        out[section] = ndimage.gaussian_filter(out[section], rng.uniform(0.5, 3.0))
    section = int(rng.integers(len(out)))
    if rng.random() < config.motion_blur:
        size = int(rng.integers(3, 12))
        out[section] = ndimage.uniform_filter1d(out[section], size, axis=int(rng.integers(2)))
    section = int(rng.integers(len(out)))
    if rng.random() < config.missing_part:
        out[section][_stripe(out.shape[1:], rng)] = rng.uniform(0, 0.2)
    if rng.random() < config.cut_blur:
        box = _box(out.shape, rng)
        step = int(rng.integers(2, 7))
        part = out[box]
        rows, columns = (np.arange(n) // step * step for n in part.shape[1:])
        out[box] = part[:, rows][:, :, columns]
    if rng.random() < config.cut_noise:
        box = _box(out.shape, rng)
        noise = rng.uniform(-0.1, 0.1, out[box].shape).astype(np.float32)
        out[box] = np.clip(out[box] + noise, 0, 1)
    return out


def _stripe(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Mask (y, x) of a stripe through the section, as folds and cracks leave it."""
    y, x = np.indices(shape)
    angle = rng.uniform(0, np.pi)
    across = y * np.cos(angle) + x * np.sin(angle)
    middle = rng.uniform(across.min(), across.max())
    stripe: np.ndarray = np.abs(across - middle) <= rng.uniform(1, max(shape) / 12 + 1)
    return stripe


def _box(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[slice, ...]:
    """Draw a box of a quarter to a half of each axis, at least one voxel."""
    sizes = [max(1, int(n * rng.uniform(0.25, 0.5))) for n in shape]
    starts = [int(rng.integers(n - size + 1)) for n, size in zip(shape, sizes, strict=True)]
    return tuple(slice(a, a + size) for a, size in zip(starts, sizes, strict=True))
