"""Variations of a training crop: orientation, greys, and the faults of serial sections.

Own code rather than a library: flips, quarter turns, grey changes and section faults are a few
lines of numpy each (warping is scipy's), and drawing every number from the generator given keeps a
step a pure function of the seed and the step number.
"""

import numpy as np
from scipy import ndimage

from agq.model.training.config import AugmentConfig
from agq.model.training.data.warp import warp, warp_margin

WIDE_PART = 0.42
"""Share of a section that `wide_parts` fills."""


def orient(
    raw: np.ndarray, labels: np.ndarray, config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mirror and rotate raw and labels (z, y, x) alike, in views where possible.

    Quarter turns need equal sizes in y and x; other crops get half turns only.
    """
    mirrored = rng.random(3) < 0.5
    turns = int(rng.integers(4))
    if config.flips:
        axes = tuple(int(axis) for axis in np.flatnonzero(mirrored))
        raw, labels = np.flip(raw, axes), np.flip(labels, axes)
    if config.rotations:
        if raw.shape[1] != raw.shape[2]:
            turns -= turns % 2
        raw, labels = np.rot90(raw, turns, (1, 2)), np.rot90(labels, turns, (1, 2))
    if config.turn_axes and len(set(raw.shape)) == 1:
        order = rng.permutation(3)
        raw, labels = raw.transpose(order), labels.transpose(order)
    return raw, labels


def misalign(
    raw: np.ndarray,
    labels: np.ndarray,
    shape: tuple[int, int, int],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the crop out of a larger one, with a jump between two sections by chance.

    Half of the jumps move or turn one section only (a slip), the others all sections from there on.
    The labels move with the picture.

    Parameters
    ----------
    raw, labels : numpy.ndarray
        (z, y + 2 m, x + 2 m) with m = `config.max_shift`.
    shape : tuple of int
        Shape (z, y, x) wanted.
    """
    z, y, x = shape
    margin = config.max_shift
    happens = rng.random() < config.misalignment
    slip = rng.random() < 0.5
    section = int(rng.integers(1, max(2, z)))
    jump = rng.integers(-margin, margin + 1, size=2)
    shifts = np.zeros((z, 2), dtype=int)
    moved = slice(section, section + 1 if slip else None)
    if happens and config.rotation and rng.random() < config.rotation:
        angle = np.degrees(np.arctan2(rng.uniform(-margin, margin), max(y, x) / 2))
        raw, labels = _turned(raw, moved, angle), _turned(labels, moved, angle)
    elif happens:
        shifts[moved] = jump
    out_raw, out_labels = np.empty(shape, raw.dtype), np.empty(shape, labels.dtype)
    for k, (dy, dx) in enumerate(shifts):
        window = (k, slice(margin + dy, margin + dy + y), slice(margin + dx, margin + dx + x))
        out_raw[k], out_labels[k] = raw[window], labels[window]
    return out_raw, out_labels


def shade(raw: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Vary the greys of the crop, of each section, and blank a section by chance.

    Greys are (z, y, x) float32 in [0, 1], before and after.
    """
    sections = raw.shape[0]
    contrast = 1 + config.contrast * rng.uniform(-1, 1)
    brightness = config.brightness * rng.uniform(-1, 1)
    gamma = 2.0 ** (config.gamma * rng.uniform(-1, 1) * (rng.random() < config.gamma_chance))
    wobble = config.section_jitter * rng.uniform(-1, 1, size=(2, sections, 1, 1))
    noise = config.noise * rng.uniform()
    grain = rng.standard_normal(raw.shape, dtype=np.float32)
    blank = int(rng.integers(sections)) if rng.random() < config.missing_section else None
    level = rng.uniform(0, 0.2) if rng.random() < 0.7 else rng.uniform(0.8, 1)
    out = (raw - 0.5) * (contrast * (1 + wobble[0])) + 0.5 + brightness + wobble[1]
    out = np.clip(out, 0, 1) ** gamma + noise * grain
    if blank is not None:
        out[blank] = level
    return np.clip(out, 0, 1).astype(np.float32)


def spoil(raw: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Return a copy with each fault applied by its chance; (z, y, x) float32 in [0, 1]."""
    out = raw.copy()
    section = int(rng.integers(len(out)))
    if rng.random() < config.blur:
        out[section] = ndimage.gaussian_filter(out[section], rng.uniform(0.5, 3.0))
    smeared = rng.permutation(len(out))[: config.motion_blur_sections]
    if rng.random() < config.motion_blur:
        for one in smeared:
            width = int(rng.integers(3, 12))
            out[one] = ndimage.uniform_filter1d(out[one], width, axis=int(rng.integers(2)))
    section = int(rng.integers(len(out)))
    if rng.random() < config.missing_part:
        across, middle = _across(out.shape[1:], rng)
        stripe = np.abs(across - middle) <= rng.uniform(1, max(out.shape[1:]) / 12 + 1)
        out[section][stripe] = rng.uniform(0, 0.2)
    if rng.random() < config.wide_parts:
        for one in np.flatnonzero(rng.random(len(out)) < 0.5):
            across, _ = _across(out.shape[1:], rng)
            low = rng.uniform(0, 1 - WIDE_PART)
            first, last = np.quantile(across, (low, low + WIDE_PART))
            out[one][(across >= first) & (across <= last)] = out[one].mean()
    if rng.random() < config.cut_blur:
        box = _box(out.shape, rng)
        step = int(rng.integers(2, 7))
        part = out[box]
        rows, columns = (np.arange(n) // step * step for n in part.shape[1:])
        out[box] = part[:, rows][:, :, columns]
    if rng.random() < config.cut_noise:
        box = _box(out.shape, rng)
        reach = config.cut_noise_size
        noise = rng.uniform(-reach, reach, out[box].shape).astype(np.float32)
        out[box] = np.clip(out[box] + noise, 0, 1)
    return out


def margin(shape: tuple[int, int, int], config: AugmentConfig) -> int:
    """Return the voxels in y and x that `augment` needs around a crop of this shape."""
    return config.max_shift + warp_margin(_shifted(shape, config), config)


def spare_sections(config: AugmentConfig) -> int:
    """Return how many sections more than the crop's `augment` needs."""
    return 2 if config.deleted_sections else 0


def delete_sections(
    raw: np.ndarray,
    labels: np.ndarray,
    config: AugmentConfig,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Take `spare_sections` sections out of raw and labels (z, y, x): inner ones by chance."""
    spare, sections = spare_sections(config), len(raw)
    if not spare:
        return raw, labels
    gone = rng.permutation(np.arange(1, sections - 1))[:spare]
    if len(gone) < spare or rng.random() >= config.deleted_sections:
        gone = np.arange(sections - spare, sections)
    return np.delete(raw, gone, 0), np.delete(labels, gone, 0)


def _shifted(shape: tuple[int, int, int], config: AugmentConfig) -> tuple[int, int, int]:
    return (shape[0], shape[1] + 2 * config.max_shift, shape[2] + 2 * config.max_shift)


def augment(
    raw: np.ndarray,
    labels: np.ndarray,
    shape: tuple[int, int, int],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Make a training crop out of a larger one.

    Every number drawn comes from `rng`.

    Parameters
    ----------
    raw : numpy.ndarray
        (z + s, y + 2 m, x + 2 m) uint8, s = `spare_sections`, m = `margin`.
    labels : numpy.ndarray
        The same shape, integers.
    shape : tuple of int
        Crop (z, y, x).

    Returns
    -------
    raw, labels : numpy.ndarray
        (z, y, x): float32 in [0, 1], and the dtype given.
    """
    raw, labels = delete_sections(raw, labels, config, rng)
    raw, labels = warp(raw, labels, _shifted(shape, config), config, rng)
    raw, labels = misalign(raw, labels, shape, config, rng)
    raw, labels = orient(raw, labels, config, rng)
    grey = spoil(raw.astype(np.float32) / 255.0, config, rng)
    return shade(grey, config, rng), np.ascontiguousarray(labels)


def _across(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Draw a direction: the distance (y, x) along it, and a place in its range.

    Folds and cracks run straight through a section, perpendicular to it.
    """
    y, x = np.indices(shape)
    angle = rng.uniform(0, np.pi)
    across = y * np.cos(angle) + x * np.sin(angle)
    return across, rng.uniform(across.min(), across.max())


def _turned(volume: np.ndarray, sections: slice, degrees: float) -> np.ndarray:
    """Copy (z, y, x) with some sections turned about their middle; integers stay what they are."""
    out = volume.copy()
    y, x = volume.shape[1:]
    radians = np.deg2rad(degrees)
    rows, columns = np.indices((y, x))
    rows, columns = rows - (y - 1) / 2, columns - (x - 1) / 2
    near = (
        np.clip(np.rint(place + (size - 1) / 2).astype(np.int64), 0, size - 1)
        for place, size in (
            (rows * np.cos(radians) - columns * np.sin(radians), y),
            (rows * np.sin(radians) + columns * np.cos(radians), x),
        )
    )
    at = tuple(near)
    out[sections] = volume[(sections, *at)]
    return out


def _box(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[slice, ...]:
    """Draw a box of a quarter to a half of each axis, at least one voxel."""
    sizes = [max(1, int(n * rng.uniform(0.25, 0.5))) for n in shape]
    starts = [int(rng.integers(n - size + 1)) for n, size in zip(shape, sizes, strict=True)]
    return tuple(slice(a, a + size) for a, size in zip(starts, sizes, strict=True))
