"""The synthetic volume: independent of how it is cut, one object per label, EM-like."""

from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt
import pytest

from agq.blockwise.volumes.create import open_array
from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from agq.pipeline.data.synthetic import skeleton as synthetic_skeleton
from agq.pipeline.data.synthetic import tissue as synthetic_tissue
from agq.pipeline.data.synthetic import volume as synthetic
from agq.pipeline.data.synthetic.volume import SyntheticParams

SEED = 5


@pytest.fixture(scope="module")
def volume() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]:
    return synthetic.block((0, 0, 0), (17, 320, 320), SyntheticParams(seed=SEED))


@pytest.mark.parametrize(
    ("start", "stop"),
    [((0, 0, 0), (1, 32, 32)), ((3, 41, 7), (6, 138, 75)), ((16, 250, 301), (17, 320, 320))],
)
def test_a_block_is_the_same_alone_as_in_a_larger_one(volume: Any, start: Any, stop: Any) -> None:
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    for whole, part in zip(
        volume, synthetic.block(start, stop, SyntheticParams(SEED)), strict=True
    ):
        np.testing.assert_array_equal(whole[box], part)


def test_blocks_meet_before_the_origin_and_far_away() -> None:
    params = SyntheticParams(seed=2, voxel_size=(40.0, 12.0, 9.0))
    for z, y, x in ((-2, -20, -30), (20_000, 400_000, 123_456)):
        whole = synthetic.block((z, y, x), (z + 3, y + 40, x + 60), params)
        part = synthetic.block((z + 1, y + 13, x + 29), (z + 3, y + 40, x + 60), params)
        for a, b in zip(whole, part, strict=True):
            np.testing.assert_array_equal(a[1:, 13:, 29:], b)


def test_write_does_not_depend_on_block_size_or_workers(tmp_path: Path) -> None:
    shape, calls = (5, 70, 90), []
    synthetic.write(tmp_path / "a.zarr", shape, seed=1, block=(5, 70, 90), workers=1)
    synthetic.write(
        tmp_path / "b.zarr",
        shape,
        seed=1,
        block=(2, 33, 48),
        workers=3,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(n, 72) for n in range(73)]
    for name, dtype in (("raw", "uint8"), ("labels", "uint64")):
        a = open_volume(tmp_path / "a.zarr", name, kind="labels")
        b = open_volume(tmp_path / "b.zarr", name, kind="labels")
        assert a.shape == b.shape == shape
        assert tuple(a.voxel_size) == (30, 6, 6)
        assert a.dtype == np.dtype(dtype)
        assert b.chunks == (2, 33, 48)
        values = a.read((0, 0, 0), shape)
        np.testing.assert_array_equal(values, b.read((0, 0, 0), shape))
        assert len(np.unique(values)) >= 4


def test_write_over_a_volume_of_another_seed(tmp_path: Path) -> None:
    for seed in (1, 2):
        synthetic.write(tmp_path / "a.zarr", (2, 20, 30), seed=seed)
    labels = open_array(tmp_path / "a.zarr", "labels", "r")
    assert labels.attrs["synthetic"]["seed"] == 2
    neurites = synthetic.block((0, 0, 0), (2, 20, 30), SyntheticParams(seed=2))[1]
    np.testing.assert_array_equal(np.asarray(labels[:]) > 0, neurites > 0)
    with pytest.raises(InputError):
        synthetic.write(tmp_path / "a.zarr", (2, 20, 31))


def test_seeds_differ(volume: Any) -> None:
    raw, labels = synthetic.block((0, 0, 0), (2, 64, 64), SyntheticParams(seed=SEED + 1))
    assert np.mean(raw == volume[0][:2, :64, :64]) < 0.1
    shared = np.intersect1d(labels, volume[1][:2, :64, :64])
    assert np.mean(labels == volume[1][:2, :64, :64]) < 0.5
    assert len(shared) < len(np.unique(labels))


@pytest.mark.parametrize("seed", [SEED, 9])
def test_every_label_is_one_object_but_where_the_border_cuts_it(volume: Any, seed: int) -> None:
    labels = volume[1]
    if seed != SEED:
        _, labels = synthetic.block((0, 0, 0), (17, 320, 320), SyntheticParams(seed=seed))
    small = np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.uint32)
    assert small[labels == 0].max() == 0
    pieces, n = cc3d.connected_components(small, connectivity=6, return_N=True)
    owner = np.zeros(n + 1, np.int64)
    owner[pieces.ravel()] = small.ravel()
    sizes = np.bincount(pieces.ravel(), minlength=n + 1)
    at_border = np.zeros(n + 1, bool)
    for axis in range(3):
        for end in (0, -1):
            at_border[np.unique(np.take(pieces, end, axis))] = True
    largest = {int(o): 0 for o in owner[1:]}
    for piece in range(1, n + 1):
        if sizes[piece] > sizes[largest[int(owner[piece])]] or largest[int(owner[piece])] == 0:
            largest[int(owner[piece])] = piece
    extra = [p for p in range(1, n + 1) if p not in largest.values() and not at_border[p]]
    assert sum(sizes[p] for p in extra) < 1e-4 * sizes[1:].sum()


def test_it_looks_like_em(volume: Any) -> None:
    raw, labels = volume
    assert 95 < raw.mean() < 140
    assert 28 < raw.std() < 55
    assert 0.12 < np.mean(labels == 0) < 0.3
    assert raw[labels == 0].mean() < raw[labels > 0].mean() - 30
    sections = raw.mean(axis=(1, 2))
    assert sections.std() > 4
    ids, counts = np.unique(labels[:, :257:2, :257:2], return_counts=True)
    objects = np.count_nonzero(counts[ids > 0] > 100)
    assert 12 <= objects <= 45
    in_plane = [(labels[8] != np.roll(labels[8], 1, axis))[1:, 1:].mean() for axis in (0, 1)]
    assert 0.5 < in_plane[0] / in_plane[1] < 2


def test_neurites_run_across_many_blocks_in_all_directions(volume: Any) -> None:
    labels = volume[1]
    extents = []
    for label in np.unique(labels[labels > 0]):
        where = np.nonzero(labels == label)
        extents.append([int(w.max() - w.min() + 1) for w in where])
    spans = np.array(extents)
    assert np.sum(spans[:, 0] == 17) >= 5
    assert np.sum(spans[:, 1] > 200) >= 3
    assert np.sum(spans[:, 2] > 200) >= 3


def test_tiles_keep_every_skeleton_that_matters() -> None:
    """The tiled kernel equals a search over all skeletons, of a wider surrounding."""
    seed, z, start = 3, 40.0, np.array([100, 200])
    shift, scale, size = np.array([0.4, -1.2]), np.array([1.0, 1.0]), (40, 48)
    low, high = np.array([z, 100, 200]) - 60.0, np.array([z, 140, 248]) + 60.0
    label, gap = np.empty(size, np.uint64), np.empty(size, np.float32)
    mito, bouton = np.empty(size, np.float32), np.empty(size, np.uint8)
    near = synthetic_skeleton.skeletons(seed, low, high)
    plane = synthetic_tissue.Plane(label, gap, mito, bouton)
    synthetic_tissue.cells(seed, z, shift, start, scale, near, plane)
    ends, ids, _ = synthetic_skeleton.skeletons(seed, low - 200, high + 200)

    tile = synthetic_tissue.TILE
    corner = np.empty(3)
    for oy, ox in np.random.default_rng(0).integers(0, size, (400, 2)):
        y, x = start[0] + oy, start[1] + ox
        p = np.zeros(3)
        for dy in range(2):
            for dx in range(2):
                at = np.array([y // tile + dy, x // tile + dx]) * tile
                synthetic_tissue._warped(seed, z, *(at + shift), corner)
                weight = abs(1 - dy - y % tile / tile) * abs(1 - dx - x % tile / tile)
                p += weight * corner
        v, w = ends[:, 3:6] - ends[:, :3], p - ends[:, :3]
        length = np.maximum((v * v).sum(1), 1e-12)
        t = np.clip((v * w).sum(1) / length, 0, 1)
        d = np.linalg.norm(w - t[:, None] * v, axis=1) - (1 - t) * ends[:, 6] - t * ends[:, 7]
        first = int(np.argmin(d))
        assert label[oy, ox] == ids[first]
        second = d[ids != ids[first]].min() - d[first]
        # The gap is the difference over a gradient between 0.3 and 2.
        assert gap[oy, ox] >= min(second / 2, 0.5 * synthetic_tissue.GAP_CAP) - 1e-3
        assert gap[oy, ox] <= second / 0.3 + 1e-3


def test_bad_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty"):
        synthetic.block((0, 0, 0), (1, 0, 5), SyntheticParams())
    with pytest.raises(InputError, match="shape"):
        synthetic.write(tmp_path / "a.zarr", (4, 0, 4))
    with pytest.raises(InputError, match="voxel_size"):
        synthetic.write(tmp_path / "a.zarr", (4, 4, 4), voxel_size=(30.0, 6.0, 0.5))
