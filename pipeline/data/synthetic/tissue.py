"""Neurites of the synthetic volume: to which skeleton each pixel of a plane belongs.

A pixel belongs to the neurite whose skeleton is nearest (distance less a local radius) in
smoothly warped space. Because skeletons do not meet, each cell holds its own skeleton and is in
one piece as long as the radii differ by less than the distance of the skeletons.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from agq.pipeline.data.synthetic.skeleton import noise

TILE = 8
SUPER = 32
GAP_CAP = 60.0
"""Distances to the second neurite are not followed further than this, in pixels."""

_U = np.uint64


class Plane(NamedTuple):
    """Arrays (y, x) of what lies at each pixel of a plane.

    Attributes
    ----------
    label
        Neurite.
    gap
        Distance to the border with the second neurite.
    mito
        Distance to the surface of a mitochondrion, negative inside.
    bouton
        1 among vesicles.
    """

    label: npt.NDArray[np.uint64]
    gap: npt.NDArray[np.float32]
    mito: npt.NDArray[np.float32]
    bouton: npt.NDArray[np.uint8]


_jit = numba.njit(cache=True, nogil=True)
_inline = numba.njit(cache=True, nogil=True, inline="always")


@_jit
def _warped(seed: int, z: float, y: float, x: float, out: Any) -> None:
    for a in range(3):
        wide = noise(seed + 101 + a, z / 210, y / 210, x / 210)
        fine = noise(seed + 111 + a, z / 48, y / 48, x / 48)
        out[a] = 46.0 * wide + 5.5 * fine
    out[0] += z
    out[1] += y
    out[2] += x


@_inline
def _distance(e: Any, z: float, y: float, x: float) -> Any:
    """(Plain distance to a segment, distance less the local radius, vector from the segment)."""
    vz, vy, vx = e[3] - e[0], e[4] - e[1], e[5] - e[2]
    wz, wy, wx = z - e[0], y - e[1], x - e[2]
    length = vz * vz + vy * vy + vx * vx
    t = 0.0
    if length > 0:
        t = min(1.0, max(0.0, (wz * vz + wy * vy + wx * vx) / length))
    wz, wy, wx = wz - t * vz, wy - t * vy, wx - t * vx
    d = math.sqrt(wz * wz + wy * wy + wx * wx)
    return d, d - e[6] - t * (e[7] - e[6]), wz, wy, wx


@_jit
def _near(ends: Any, ids: Any, among: Any, n: int, p: Any, slack: float, keep: Any) -> int:
    """Copy to ``keep`` the candidates that can be first or second within ``slack`` of p."""
    d1, d2, i1 = 1e9, 1e9, _U(0)
    for j in range(n):
        k = among[j]
        _, d, _, _, _ = _distance(ends[k], p[0], p[1], p[2])
        if d < d1:
            if ids[k] != i1:
                d2 = d1
            d1, i1 = d, ids[k]
        elif ids[k] != i1 and d < d2:
            d2 = d
    limit = min(d2, d1 + GAP_CAP) + slack
    m = 0
    for j in range(n):
        k = among[j]
        _, d, _, _, _ = _distance(ends[k], p[0], p[1], p[2])
        if d <= limit:
            keep[m] = k
            m += 1
    return m


@_jit
def _corners(seed: int, z: float, tile: Any, scale: Any, shift: Any, corner: Any) -> None:
    """Warp the four corners of a tile."""
    for q in range(4):
        y = (tile[0] + q // 2) * TILE * scale[0] + shift[0]
        x = (tile[1] + q % 2) * TILE * scale[1] + shift[1]
        _warped(seed, z, y, x, corner[q])


@_jit
def _fill(lines: Any, among: Any, n: int, p: Any, plane: Any, oy: int, ox: int) -> None:
    """Fill one pixel at position p, from its candidates."""
    d1, d2, i1, k1 = 1e9, 1e9, _U(0), 0
    dm, im = 1e9, _U(0)
    uz1 = uy1 = ux1 = uz2 = uy2 = ux2 = 0.0
    for j in range(n):
        k = among[j]
        plain, d, vz, vy, vx = _distance(lines.ends[k], p[0], p[1], p[2])
        scaled = 1 / max(plain, 1e-3)
        if d < d1:
            if lines.ids[k] != i1:
                d2, uz2, uy2, ux2 = d1, uz1, uy1, ux1
            d1, i1, k1 = d, lines.ids[k], k
            uz1, uy1, ux1 = vz * scaled, vy * scaled, vx * scaled
        elif lines.ids[k] != i1 and d < d2:
            d2 = d
            uz2, uy2, ux2 = vz * scaled, vy * scaled, vx * scaled
        if lines.flags[k] & 1 and plain < dm:
            dm, im = plain, lines.ids[k]
    plane.label[oy, ox] = i1
    # Over its gradient, the difference is the distance to the border.
    uz1, uy1, ux1 = uz1 - uz2, uy1 - uy2, ux1 - ux2
    steep = math.sqrt(uz1 * uz1 + uy1 * uy1 + ux1 * ux1)
    plane.gap[oy, ox] = min((d2 - d1) / max(steep, 0.3), 0.5 * GAP_CAP)
    r = min(17.0, 10.0 + 0.35 * max(lines.ends[k1, 6], lines.ends[k1, 7]))
    plane.mito[oy, ox] = dm - r if im == i1 else 1e3
    plane.bouton[oy, ox] = 1 if lines.flags[k1] & 2 else 0


@_jit
def cells(seed: int, z: float, shift: Any, start: Any, scale: Any, lines: Any, plane: Any) -> None:
    """Fill one plane: nearest neurite, gap to the second, depth in a mitochondrion, vesicles.

    Parameters
    ----------
    z
        Position of the plane in pixels.
    shift
        In-plane shift (y, x) of this section in pixels.
    start
        First voxel (y, x) of the plane's window.
    scale
        Pixels per voxel (y, x).
    lines
        `Lines` of a box that holds the window.
    plane
        `Plane` that is filled.
    """
    h, w = plane.label.shape
    diagonal = math.hypot(scale[0], scale[1])
    n = len(lines.ids)
    everything = np.arange(n)
    wide, close = np.empty(n, np.int64), np.empty(n, np.int64)
    p, corner = np.empty(3), np.empty((4, 3))
    for sy in range(start[0] // SUPER, (start[0] + h - 1) // SUPER + 1):
        for sx in range(start[1] // SUPER, (start[1] + w - 1) // SUPER + 1):
            cy = (sy + 0.5) * SUPER * scale[0] + shift[0]
            cx = (sx + 0.5) * SUPER * scale[1] + shift[1]
            _warped(seed, z, cy, cx, p)
            # Tiles are counted from the volume's origin, so the candidates of a pixel do not
            # depend on the window. 1.6 bounds the stretch by the warp, 1.25 the radii's slope.
            slack = 1.6 * 1.25 * SUPER * diagonal
            m = _near(lines.ends, lines.ids, everything, n, p, slack, wide)
            for ty in range(sy * SUPER // TILE, (sy + 1) * SUPER // TILE):
                y0, y1 = max(ty * TILE, start[0]), min((ty + 1) * TILE, start[0] + h)
                if y0 >= y1:
                    continue
                for tx in range(sx * SUPER // TILE, (sx + 1) * SUPER // TILE):
                    x0, x1 = max(tx * TILE, start[1]), min((tx + 1) * TILE, start[1] + w)
                    if x0 >= x1:
                        continue
                    _corners(seed, z, (ty, tx), scale, shift, corner)
                    for a in range(3):
                        p[a] = 0.25 * (corner[0, a] + corner[1, a] + corner[2, a] + corner[3, a])
                    far = 0.0
                    for q in range(4):
                        far = max(far, np.sqrt(np.sum((corner[q] - p) ** 2)))
                    mm = _near(lines.ends, lines.ids, wide, m, p, 2 * 1.25 * far, close)
                    for y in range(y0, y1):
                        fy = (y - ty * TILE) / TILE
                        for x in range(x0, x1):
                            fx = (x - tx * TILE) / TILE
                            for a in range(3):
                                p[a] = (1 - fy) * (
                                    (1 - fx) * corner[0, a] + fx * corner[1, a]
                                ) + fy * ((1 - fx) * corner[2, a] + fx * corner[3, a])
                            _fill(lines, close, mm, p, plane, y - start[0], x - start[1])
