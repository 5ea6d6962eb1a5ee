"""Skeletons of the synthetic volume: branching lines on a hashed lattice.

All positions are in pixels of 6 nm, all functions depend on (seed, global position) alone, so a
volume may be cut into blocks in any way without changing a voxel.

Space is filled with three families of lines, one per axis, that never meet (a rod
packing; period ``CELL``). Where two lines pass each other they go straight, swap (both turn), or
one forks and the other ends. Each node of a line thus has one predecessor, a neurite is a tree of
nodes, and its id comes from walking back to its birth. Nodes inside wide tubes of a second, coarse
packing all belong to that tube: thick dendrites, of which some of the leaving lines are branches.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

CELL = 76.0
"""Period of the packing in pixels: neurites are about 0.65 periods wide."""
TUBE = 7.5 * CELL
"""Period of the coarse packing of thick dendrites."""
REACH = 2.1 * CELL
"""Skeletons further than this from a pixel never matter (tests check that it is enough)."""

_P_SWAP, _P_FORK, _P_BIRTH = 0.30, 0.07, 0.012
_P_BRANCH_OF_TUBE, _P_MITO, _P_BOUTON = 0.10, 0.17, 0.18

_U = np.uint64


class Lines(NamedTuple):
    """Segments of skeletons.

    Attributes
    ----------
    ends
        Float64 (n, 8): start z, y, x, end z, y, x, radius at the start and at the end.
    ids
        Uint64 (n,): the neurite of each segment.
    flags
        Uint8 (n,): bit 0 a mitochondrion runs along it, bit 1 vesicles are around it.
    """

    ends: npt.NDArray[np.float64]
    ids: npt.NDArray[np.uint64]
    flags: npt.NDArray[np.uint8]


_jit = numba.njit(cache=True, nogil=True)


@numba.njit("uint64(int64,int64,int64,int64,int64)", cache=True, nogil=True)
def mix(seed: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Hash five integers to a uint64 (the finalizer of splitmix64 over each)."""
    h = _U(seed) + _U(0x9E3779B97F4A7C15)
    for v in (a, b, c, d):
        h = (h ^ _U(v)) + _U(0x9E3779B97F4A7C15)
        h = (h ^ (h >> _U(30))) * _U(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> _U(27))) * _U(0x94D049BB133111EB)
        h = h ^ (h >> _U(31))
    return h


@numba.njit("float64(int64,int64,int64,int64,int64)", cache=True, nogil=True)
def unit(seed: Any, a: Any, b: Any, c: Any, d: Any) -> float:
    """Hash five integers to a float in [0, 1)."""
    return float(mix(seed, a, b, c, d) >> _U(11)) * (1.0 / 9007199254740992.0)


@_jit
def noise(seed: int, z: float, y: float, x: float) -> float:
    """Value noise in [-1, 1] with lattice spacing 1 and smooth interpolation."""
    iz, iy, ix = math.floor(z), math.floor(y), math.floor(x)
    fz, fy, fx = z - iz, y - iy, x - ix
    fz, fy, fx = fz * fz * (3 - 2 * fz), fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
    total = 0.0
    for dz in range(2):
        wz = fz if dz else 1 - fz
        for dy in range(2):
            wy = fy if dy else 1 - fy
            for dx in range(2):
                wx = fx if dx else 1 - fx
                total += wz * wy * wx * unit(seed, int(iz) + dz, int(iy) + dy, int(ix) + dx, 77)
    return 2 * total - 1


@_jit
def _sign(seed: int, f: int, c: Any) -> int:
    e, g = (f + 1) % 3, (f + 2) % 3
    return 1 if mix(seed, 11, f, c[e], c[g]) & _U(1) else -1


@_jit
def _tube(seed: int, p: Any) -> Any:
    """Id of the dendrite whose tube holds the position, or 0."""
    best, best_id = 1.0, _U(0)
    for f in range(3):
        e, g = (f + 1) % 3, (f + 2) % 3
        m0, n0 = math.floor(p[e] / TUBE - 0.5), math.floor(p[g] / TUBE)
        for dm in range(2):
            for dn in range(2):
                m, n = int(m0) + dm, int(n0) + dn
                if unit(seed, 21, f, m, n) > 0.7:
                    continue
                radius = CELL * (0.65 + 0.85 * unit(seed, 22, f, m, n))
                phase = 6.2832 * unit(seed, 23, f, m, n)
                turn = p[f] / (9 * CELL) + phase
                de = p[e] - TUBE * (m + 0.5) - 0.7 * CELL * math.sin(turn)
                dg = p[g] - TUBE * n - 0.7 * CELL * math.sin(1.3 * turn + 2.0)
                radius *= 1 + 0.2 * math.sin(p[f] / (2.1 * CELL) + 2 * phase)
                q = math.sqrt(de * de + dg * dg) / radius
                if q < best:
                    best = q
                    best_id = (
                        (_U(1) << _U(51))
                        | (_U(f) << _U(48))
                        | (_U(m + 1024) & _U(0xFFFFFF)) << _U(24)
                        | (_U(n + 1024) & _U(0xFFFFFF))
                    )
    return best_id


@_jit
def _position(seed: int, f: int, h: int, c: Any, jitter: bool) -> Any:
    e, g = (f + 1) % 3, (f + 2) % 3
    p = np.empty(3)
    p[f] = c[f] + 0.25 + 0.5 * h
    p[e] = c[e] + 0.5
    p[g] = c[g]
    if jitter:
        for a in range(3):
            p[a] += 0.2 * (unit(seed, 31 + a, f * 2 + h, c[0] * 65536 + c[1], c[2]) - 0.5)
    return p * CELL


@_jit
def _code(f: int, h: int, c: Any) -> Any:
    code = _U(f * 2 + h)
    for a in range(3):
        code = (code << _U(16)) | (_U(c[a] + 1024) & _U(0xFFFF))
    return code + _U(1)


@_jit
def _predecessor(seed: int, f: int, h: int, c: Any, out: Any) -> tuple[int, int]:
    """Family and half of the node before node (f, h, c); its cell goes to ``out``."""
    s = _sign(seed, f, c)
    out[:] = c
    as_first = (h == 1) == (s == 1)
    family = f
    if not as_first:
        family = (f + 1) % 3
        if s == -1:
            out[f] += 1
    other = (family + 2) % 3
    u = unit(seed, 41, family, out[0] * 65536 + out[1], out[2])
    from_first = as_first
    if u < _P_SWAP:
        from_first = not as_first
    elif u < _P_SWAP + _P_FORK:
        from_first = True
    elif u < _P_SWAP + 2 * _P_FORK:
        from_first = False
    if from_first:
        return family, (0 if _sign(seed, family, out) == 1 else 1)
    if _sign(seed, other, out) == 1:
        out[other] -= 1
        return other, 1
    return other, 0


@_jit
def _joined(seed: int, f: int, h: int, c: Any, f0: int, h0: int, c0: Any) -> Any:
    """(Is the node one neurite with its predecessor, id of the node's tube or 0)."""
    tube = _tube(seed, _position(seed, f, h, c, False))
    before = _tube(seed, _position(seed, f0, h0, c0, False))
    key = c[0] * 65536 + c[1]
    if tube != _U(0):
        return tube == before, tube
    if before != _U(0):
        return unit(seed, 51, f * 2 + h, key, c[2]) < _P_BRANCH_OF_TUBE, tube
    return unit(seed, 52, f * 2 + h, key, c[2]) >= _P_BIRTH, tube


@_jit
def _neurite(seed: int, f: int, h: int, c: Any) -> Any:
    """Id of the neurite that a node belongs to."""
    cell, before, mark = c.copy(), np.empty(3, np.int64), c.copy()
    mark_f, mark_h, step, limit = f, h, 0, 8
    while True:
        f0, h0 = _predecessor(seed, f, h, cell, before)
        joined, tube = _joined(seed, f, h, cell, f0, h0, before)
        if tube != _U(0):
            return tube
        if not joined:
            return _code(f, h, cell)
        f, h = f0, h0
        cell[:] = before
        step += 1
        # A few walks run in a ring (found as Brent 1980 does); its name is its lowest code.
        if f == mark_f and h == mark_h and np.all(cell == mark):
            break
        if step == limit:
            mark_f, mark_h, step, limit = f, h, 0, 2 * limit
            mark[:] = cell
    lowest = _code(f, h, cell)
    for _ in range(step):
        f, h = _predecessor(seed, f, h, cell, before)
        cell[:] = before
        lowest = min(lowest, _code(f, h, cell))
    return lowest


@_jit
def skeletons(seed: int, low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> Lines:
    """Return the skeleton segments near a box.

    Parameters
    ----------
    low, high
        Corners (z, y, x) of the box in pixels, after warping.
    """
    first, last = np.empty(3, np.int64), np.empty(3, np.int64)
    n = 6
    for a in range(3):
        first[a] = math.floor((low[a] - REACH) / CELL) - 1
        last[a] = math.floor((high[a] + REACH) / CELL) + 2
        n *= last[a] - first[a]
    ends, ids, flags = np.empty((n, 8)), np.empty(n, np.uint64), np.empty(n, np.uint8)
    c, c0 = np.empty(3, np.int64), np.empty(3, np.int64)
    k = 0
    for z in range(first[0], last[0]):
        for y in range(first[1], last[1]):
            for x in range(first[2], last[2]):
                for fh in range(6):
                    f, h = fh // 2, fh % 2
                    c[0], c[1], c[2] = z, y, x
                    f0, h0 = _predecessor(seed, f, h, c, c0)
                    joined, _ = _joined(seed, f, h, c, f0, h0, c0)
                    ids[k] = _neurite(seed, f, h, c)
                    ends[k, :3] = _position(seed, f, h, c, True)
                    ends[k, 6] = _radius(seed, ids[k], f, h, c)
                    if joined:
                        ends[k, 3:6] = _position(seed, f0, h0, c0, True)
                        ends[k, 7] = _radius(seed, ids[k], f0, h0, c0)
                    else:
                        ends[k, 3:6] = ends[k, :3]
                        ends[k, 7] = ends[k, 6]
                    key = z * 65536 + y
                    mito = joined and unit(seed, 61, fh, key, x) < _P_MITO
                    # Whole stretches of an axon hold vesicles: decide by the line, in runs.
                    run = math.floor((ends[k, f] + 200 * unit(seed, 64, f, 0, 0)) / (1.5 * CELL))
                    axon = np.int64(ids[k] & _U(0x7FFFFFFF))
                    bouton = unit(seed, 62, axon, int(run), f) < _P_BOUTON
                    flags[k] = (1 if mito else 0) | (2 if bouton else 0)
                    k += 1
    return Lines(ends, ids, flags)


@_jit
def _radius(seed: int, neurite: Any, f: int, h: int, c: Any) -> float:
    own = unit(seed, 71, np.int64(neurite & _U(0x7FFFFFFF)), np.int64(neurite >> _U(31)), 0)
    here = unit(seed, 72, f * 2 + h, c[0] * 65536 + c[1], c[2])
    return CELL * (0.26 * own * own + 0.10 * here)
