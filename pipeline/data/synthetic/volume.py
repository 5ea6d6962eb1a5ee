"""A seeded EM-like volume with ground truth, of any size, made block by block.

Stands in for real data in the demo and in scaling tests: serial sections at 30x6x6 nm with
branching neurites in all directions, dark membranes (grey and wide where they lie flat in the
section), mitochondria, vesicles, and per-section shift and brightness. Every voxel of `block` is a
function of the parameters and its own position, so neither block size nor workers change the
result; `write` then gives parts of a neurite that are not connected inside the volume ids of their
own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from agq.blockwise.volumes.boxes import boxes, unordered
from agq.blockwise.volumes.create import create_array, write_chunk
from agq.blockwise.volumes.triples import Box
from agq.errors import InputError
from agq.pipeline.data.synthetic import tissue
from agq.pipeline.data.synthetic.connected import split_labels
from agq.pipeline.data.synthetic.skeleton import mix, noise, skeletons, unit

_PIXEL_NM = 6.0
_HALO = 6
"""Pixels rendered around a block so that in-plane blurring does not see the block's edge."""

_jit = numba.njit(cache=True, nogil=True)
_U = np.uint64


@dataclass(frozen=True)
class SyntheticParams:
    """What a synthetic volume looks like.

    Parameters
    ----------
    seed
        Volumes of different seeds share nothing.
    voxel_size
        Size of a voxel (z, y, x) in nm; the tissue itself does not change with it.
    membrane
        Half width of the unlabelled gap between two neurites, in pixels of 6 nm.
    noise
        Standard deviation of the fine noise, in grey values.
    jitter
        Standard deviation of the in-plane shift of a section, in pixels of 6 nm.
    """

    seed: int = 0
    voxel_size: tuple[float, float, float] = (30.0, 6.0, 6.0)
    membrane: float = 3.0
    noise: float = 12.0
    jitter: float = 1.3


@_jit
def _normal(seed: int, a: int, b: int, c: int) -> float:
    """Approximate a standard normal deviate by the sum of four uniform ones from one hash."""
    h = mix(seed, a, b, c, 5)
    total = 0.0
    for k in range(4):
        total += float((h >> _U(16 * k)) & _U(0xFFFF)) / 65536.0
    return (total - 2.0) * 1.7320508


@_jit
def _dots(seed: int, z: int, y: float, x: float, cell: float, share: float) -> float:
    """Distance to the nearest random dot of a section; ``share`` of the cells hold one."""
    iy, ix = int(np.floor(y / cell)), int(np.floor(x / cell))
    best = 1e9
    for j in range(iy - 1, iy + 2):
        for i in range(ix - 1, ix + 2):
            if unit(seed, z, j, i, 1) < share:
                dy = y - cell * (j + 0.2 + 0.6 * unit(seed, z, j, i, 2))
                dx = x - cell * (i + 0.2 + 0.6 * unit(seed, z, j, i, 3))
                best = min(best, dy * dy + dx * dx)
    return np.sqrt(best)


@_jit
def _paint(
    seed: int, section: int, start: Any, scale: Any, plane: Any, gaps: Any, grain: float, out: Any
) -> None:
    """Grey values of one section before blurring.

    ``start``, ``scale`` and ``plane`` are as in :func:`tissue.cells`; ``gaps`` are the gaps half a
    section before, in the section, and half a section after it.
    """
    h, w = plane.label.shape
    for oy in range(h):
        y = (start[0] + oy) * scale[0]
        for ox in range(w):
            x = (start[1] + ox) * scale[1]
            neurite = plane.label[oy, ox]
            low, high = np.int64(neurite & _U(0x7FFFFFFF)), np.int64(neurite >> _U(31))
            value = 156.0 + 44.0 * (unit(seed, 81, low, high, 0) - 0.5)
            value += 12.0 * noise(seed + 201, section, y / 11, x / 11)
            value += 12.0 * noise(seed + 202, section * 0.4, y / 45, x / 45)
            half = gaps[1, oy, ox]
            if plane.bouton[oy, ox]:
                d = _dots(seed + 211, section, y, x, 8.5, 0.75)
                if half > 6:
                    value += 14.0 - 62.0 * np.exp(-((d - 3.2) ** 2) / 1.6)
            elif half > 7:
                d = _dots(seed + 212, section, y, x, 15.0, 0.16)
                value -= 55.0 * np.exp(-d * d / 9.0)
                d = _dots(seed + 213, section // 2, y, x, 75.0, 0.22)
                if half > 14:
                    value -= 75.0 * np.exp(-((d - 7.0) ** 2) / 5.0)
            depth = plane.mito[oy, ox]
            if depth < 3 and half > 5:
                cristae = noise(seed + 221, section * 0.5, y / 5.0, x / 5.0)
                inside = 1 / (1 + np.exp(1.6 * depth))
                shell = np.exp(-((depth + 1.5) ** 2) / 3.0)
                value += inside * (76.0 + 40.0 * cristae - value) - 26.0 * shell
            dark = 0.0
            for k in range(3):
                g = gaps[k, oy, ox]
                # Two dark leaflets with a thin lighter cleft between them.
                leaf = np.exp(-((g / 3.1) ** 2)) - 0.30 * np.exp(-((g / 0.8) ** 2))
                dark += leaf * (0.5 if k == 1 else 0.25)
            thick = 0.88 + 0.14 * noise(seed + 231, section * 0.3, y / 26, x / 26)
            value += dark * thick * (36.0 - value)
            value += 7.0 * noise(seed + 241, section * 0.2, y / 380, x / 380)
            out[oy, ox] = value + grain * _normal(seed + 251, section, start[0] + oy, start[1] + ox)


def _section(params: SyntheticParams, z: int) -> tuple[npt.NDArray[np.float64], float, float]:
    """Shift (y, x) in pixels, gain and offset of a section."""
    draws = [_normal(params.seed + 301, z, k, 0) for k in range(4)]
    shift = np.array(draws[:2]) * params.jitter
    return shift, 1.0 + 0.07 * draws[2], -12.0 + 11.0 * draws[3]


def _render(
    params: SyntheticParams, z: int, first: Any, scale: Any, plane: tissue.Plane, gaps: Any
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]:
    """Return grey values and labels of one section without its halo; arguments as `_paint`'s."""
    _, gain, offset = _section(params, z)
    # The blur below keeps about 0.30 of the deviation of white noise.
    grain = params.noise / 0.30
    painted = np.empty(plane.label.shape, np.float32)
    _paint(params.seed, z, first, scale, plane, gaps, grain, painted)
    inner = (slice(_HALO, -_HALO), slice(_HALO, -_HALO))
    soft = ndimage.gaussian_filter(painted, 0.95, radius=_HALO - 1)
    grey = (soft[inner] - 128.0) * gain + 128.0 + offset
    # The opening removes crumbs of a few voxels where three neurites meet.
    inside = ndimage.binary_opening(gaps[1] > params.membrane, np.ones((3, 3), bool))
    labels = np.where(inside[inner], plane.label[inner], np.uint64(0))
    return np.clip(np.rint(grey), 1, 255).astype(np.uint8), labels


def block(
    start: Sequence[int], stop: Sequence[int], params: SyntheticParams
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]:
    """Make the voxels of one box of the volume.

    Parameters
    ----------
    start, stop
        First and past-the-end voxel (z, y, x); the volume has no bounds.

    Returns
    -------
    raw
        Uint8 grey values (z, y, x).
    labels
        Uint64 neurites (z, y, x), below 2**53; 0 where a membrane is.

    Raises
    ------
    InputError
        If the box is empty.
    """
    lo, hi = np.asarray(start, np.int64), np.asarray(stop, np.int64)
    if np.any(hi <= lo):
        raise InputError(f"synthetic volume: the box {tuple(start)} to {tuple(stop)} is empty")
    scale = np.array(params.voxel_size) / _PIXEL_NM
    first = lo[1:] - _HALO
    size = tuple(int(n) for n in hi[1:] - lo[1:] + 2 * _HALO)
    margin = 60.0
    lines = skeletons(
        params.seed,
        np.array([lo[0] - 0.5, *first]) * scale - margin,
        np.array([hi[0] + 0.5, *(hi[1:] + _HALO)]) * scale + margin,
    )
    gaps = np.empty((3, *size), np.float32)
    plane = tissue.Plane(
        np.empty(size, np.uint64), gaps[1], np.empty(size, np.float32), np.empty(size, np.uint8)
    )
    shape = tuple(int(n) for n in hi - lo)
    raw, labels = np.empty(shape, np.uint8), np.empty(shape, np.uint64)

    def fill(z: float, shift: Any, k: int) -> None:
        filled = plane._replace(gap=gaps[k])
        tissue.cells(params.seed, z * scale[0], shift, first, scale[1:], lines, filled)

    def between(z: int) -> Any:
        return 0.5 * (_section(params, z)[0] + _section(params, z + 1)[0])

    for z in range(lo[0], hi[0]):
        if z == lo[0]:
            fill(z - 0.5, between(z - 1), 0)
        else:
            gaps[0] = gaps[2]
        fill(z + 0.5, between(z), 2)
        # Last: of the planes between sections only the gaps are used.
        fill(z, _section(params, z)[0], 1)
        raw[z - lo[0]], labels[z - lo[0]] = _render(params, z, first, scale[1:], plane, gaps)
    return raw, labels


def _write_block(arrays: Sequence[Any], params: SyntheticParams, box: Box) -> None:
    made: tuple[npt.NDArray[Any], ...] = block(*box, params)
    for array, values in zip(arrays, made, strict=True):
        index = [first // size for first, size in zip(box[0], array.chunks, strict=True)]
        write_chunk(array, index, values)


def _check(shape: Sequence[int], block: Sequence[int], voxel_size: Sequence[float]) -> None:
    if len(shape) != 3 or min(*shape, *block) < 1:
        raise InputError(
            f"synthetic volume: shape {tuple(shape)} and block {block} must be 3 positive lengths"
        )
    if any(not float(v).is_integer() or v < 1 for v in voxel_size):
        raise InputError(f"synthetic volume: voxel_size {voxel_size} must be whole nm, 1 or more")


def write(
    container: Path,
    shape: Sequence[int],
    *,
    seed: int = 0,
    voxel_size: tuple[float, float, float] = (30.0, 6.0, 6.0),
    block: tuple[int, int, int] = (16, 256, 256),
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a synthetic volume as the zarr v3 arrays ``raw`` and ``labels``.

    Labels are those of a segmentation that is right about everything in the volume: each is one
    6-connected piece (see `agq.pipeline.data.synthetic.connected`).

    Parameters
    ----------
    container
        Local zarr group, made if missing; arrays of these names and this layout are overwritten.
    shape
        Voxels (z, y, x).
    voxel_size
        Voxel size (z, y, x) in nm.
    block
        Voxels (z, y, x) made at a time; also the chunks, so that each has one writer.
    workers
        Threads; by default one for each processor this process may use.
    on_progress
        Called with (blocks done, blocks in all) after each block; each is gone over four times.

    Raises
    ------
    InputError
        If a length is not positive, a voxel size is not whole, or the container holds arrays of
        these names with another layout.
    """
    _check(shape, block, voxel_size)
    params = SyntheticParams(seed=seed, voxel_size=voxel_size)
    chunks = tuple(min(b, s) for b, s in zip(block, shape, strict=True))
    arrays = []
    for name, dtype in (("raw", np.uint8), ("labels", np.uint64)):
        array = create_array(
            container,
            name,
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            voxel_size=[int(v) for v in voxel_size],
        )
        # Not at creation: an array that existed keeps the attributes it was made with.
        array.update_attributes({"synthetic": asdict(params)})
        arrays.append(array)
    blocks = boxes((0, 0, 0), shape, chunks)

    def report(done: int, _: int = 0) -> None:
        if on_progress is not None:
            on_progress(done, 4 * len(blocks))

    report(0)
    task = partial(_write_block, arrays, params)
    for done, _ in enumerate(unordered(task, blocks, workers=workers), 1):
        report(done)
    split_labels(arrays[1], workers=workers, on_progress=lambda done, _: report(len(blocks) + done))
