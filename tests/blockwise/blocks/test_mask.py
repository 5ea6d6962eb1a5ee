"""Which blocks hold tissue."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from funlib.geometry import Coordinate

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.mask import Tissue, mask_blocks
from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import Volume, open_volume
from agq.errors import InputError


def grid_of(shape: Any, write: Any, offset: Any = (0, 0, 0)) -> BlockGrid:
    return BlockGrid(
        volume_shape=shape,
        voxel_size=Coordinate(30, 6, 6),
        write_shape=write,
        after=(1, 1, 1),
        offset=Coordinate(offset),
    )


def mask_of(
    folder: Path,
    data: np.ndarray,
    voxel_size: Any,
    offset: Any = (0, 0, 0),
    chunks: Any = (8, 24, 32),
) -> Volume:
    array = create_array(
        folder / "m.zarr",
        "mask",
        shape=data.shape,
        chunks=chunks,
        dtype=data.dtype,
        voxel_size=voxel_size,
        offset=offset,
    )
    array[...] = data
    return open_volume(folder / "m.zarr", "mask", kind="mask")


def reference(mask: Volume, grid: BlockGrid, numbers: Any) -> list[bool]:
    """Paint the mask at 1 world unit, in one dimension after the other, and look."""
    data = mask.read((0, 0, 0), mask.shape) != 0
    result = []
    for number in numbers:
        start, stop = grid.write_box(int(number))
        box = []
        for axis in range(3):
            begin = grid.offset[axis] + start[axis] * grid.voxel_size[axis]
            end = grid.offset[axis] + stop[axis] * grid.voxel_size[axis]
            places = (np.arange(begin, end) - mask.offset[axis]) // mask.voxel_size[axis]
            places = np.unique(places)
            box.append(places[(places >= 0) & (places < mask.shape[axis])])
        result.append(bool(data[np.ix_(*box)].any()))
    return result


@pytest.mark.parametrize("tile_voxels", [1, 100, 2000, 2**24])
@pytest.mark.parametrize(
    ("mask_voxel", "mask_offset", "mask_shape"),
    [
        ((30, 6, 6), (0, 0, 0), (20, 50, 61)),  # same scale
        ((60, 24, 24), (0, 0, 0), (10, 13, 16)),  # coarser by whole factors
        ((15, 3, 2), (0, 0, 0), (40, 100, 183)),  # finer
        ((40, 7, 11), (55, -13, 29), (9, 30, 20)),  # neither, shifted, covers a part
    ],
)
def test_against_painting(
    tmp_path: Path, mask_voxel: Any, mask_offset: Any, mask_shape: Any, tile_voxels: int
) -> None:
    rng = np.random.default_rng(3)
    data = (rng.random(mask_shape) < 0.004).astype(np.uint8) * 200
    mask = mask_of(tmp_path, data, mask_voxel, mask_offset)
    grid = grid_of((20, 50, 61), (3, 8, 9), (0, 6, -12))
    numbers = rng.permutation(grid.n_blocks)
    expected = reference(mask, grid, numbers)
    assert any(expected)
    assert not all(expected)
    assert mask_blocks(mask, grid, numbers, tile_voxels=tile_voxels).tolist() == expected
    some = numbers[::5]
    assert mask_blocks(mask, grid, some).tolist() == expected[::5]


@pytest.mark.parametrize("dtype", ["bool", "uint64", "int16"])
def test_types(tmp_path: Path, dtype: str) -> None:
    data = np.zeros((4, 8, 8), dtype)
    data[3, 7, 7] = 1 if dtype == "bool" else -1 if dtype == "int16" else 2**40
    mask = mask_of(tmp_path, data, (30, 6, 6))
    found = mask_blocks(mask, grid_of((4, 8, 8), (2, 4, 4)), range(8))
    assert found.tolist() == [False] * 7 + [True]


def test_neighbouring_mask_voxels_do_not_leak(tmp_path: Path) -> None:
    data = np.zeros((1, 1, 4), np.uint8)
    data[0, 0, 1] = 1
    mask = mask_of(tmp_path, data, (30, 6, 24))
    found = mask_blocks(mask, grid_of((1, 1, 16), (1, 1, 4)), range(4))
    assert found.tolist() == [False, True, False, False]


def test_only_needed_chunks_are_read(tmp_path: Path) -> None:
    data = np.ones((16, 16, 16), np.uint8)
    mask = mask_of(tmp_path, data, (30, 6, 6), chunks=(4, 4, 4))
    for chunk in (tmp_path / "m.zarr" / "mask" / "c").rglob("*"):
        if chunk.is_file() and not chunk.match("c/0/0/*"):
            chunk.write_bytes(b"damaged")
    grid = grid_of((16, 16, 16), (4, 4, 4))
    assert mask_blocks(mask, grid, [0, 1, 3]).all()
    with pytest.raises(Exception, match=r"zstd|decompress|Zstd"):
        mask_blocks(mask, grid, [4])


def test_no_blocks(tmp_path: Path) -> None:
    mask = mask_of(tmp_path, np.ones((4, 8, 8), np.uint8), (30, 6, 6))
    assert mask_blocks(mask, grid_of((4, 8, 8), (2, 4, 4)), []).shape == (0,)


def test_mask_that_misses_the_volume(tmp_path: Path) -> None:
    mask = mask_of(tmp_path, np.ones((4, 8, 8), np.uint8), (30, 6, 6), (0, 48, 0))
    with pytest.raises(InputError, match=r"mask covers .* does not touch the volume"):
        mask_blocks(mask, grid_of((4, 8, 8), (2, 4, 4)), range(8))


def test_two_million_blocks_under_a_coarse_mask(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = (rng.random((50, 50, 50)) < 0.3).astype(np.uint8)
    store = zarr.create_array(
        tmp_path / "m.zarr", shape=data.shape, chunks=(16, 25, 25), dtype="uint8"
    )
    store[...] = data
    mask = open_volume(tmp_path / "m.zarr", voxel_size=(960, 1536, 1536), kind="mask")
    grid = grid_of((1600, 12800, 12800), (8, 128, 128))
    begin = time.perf_counter()
    found = mask_blocks(mask, grid, np.arange(grid.n_blocks))
    assert grid.n_blocks == 200 * 100 * 100
    expected = data.repeat(4, axis=0).repeat(2, axis=1).repeat(2, axis=2) != 0
    np.testing.assert_array_equal(found.reshape(grid.shape), expected)
    assert time.perf_counter() - begin < 60


def _tissue_of(folder: Path, shown: np.ndarray, **context: Any) -> tuple[BlockGrid, Volume]:
    size, blocks = Coordinate(30, 6, 6), {"write_shape": (2, 4, 5), **context}
    return BlockGrid(shown.shape, size, **blocks), mask_of(folder, shown.astype(np.uint8), size)


@pytest.mark.parametrize("before", [(0, 0, 0), (1, 2, 1)])
def test_hidden_voxels_and_pairs_do_not_depend_on_the_block(tmp_path: Path, before: Any) -> None:
    shown = np.random.default_rng(0).random((5, 9, 12)) < 0.8
    grid, mask = _tissue_of(tmp_path, shown, before=before)
    for number in range(grid.n_blocks):
        box = tuple(slice(a, b) for a, b in zip(*grid.read_box(number), strict=True))
        tissue = Tissue.read(mask, grid, number)
        assert np.array_equal(tissue.shown, shown[box])
        for axis in range(3):
            pairs = shown.copy()
            later = tuple(slice(1 if d == axis else 0, None) for d in range(3))
            pairs[later] &= np.roll(shown, 1, axis)[later]
            assert np.array_equal(tissue.pairs[axis], pairs[box])


def test_labels_that_lose_voxels_are_cut_and_others_stay(tmp_path: Path) -> None:
    shown = np.ones((2, 4, 9), bool)
    shown[:, :, 3] = False
    grid, mask = _tissue_of(tmp_path, shown, write_shape=(2, 4, 9), after=(0, 0, 0))
    labels = np.full((2, 4, 9), 5, np.uint16)
    labels[:, 0, 5:] = 0
    labels[0, 0, 6] = labels[0, 0, 8] = 2  # two pieces of one label, as the predictor says
    affinities = np.full((3, 2, 4, 9), 200, np.uint8)
    kept, weights, origin = Tissue.read(mask, grid, 0).hide(labels, affinities)
    assert origin is not None
    assert not kept[:, :, 3].any()
    left, right, other = kept[0, 1, 0], kept[0, 1, 4], kept[0, 0, 6]
    assert len({0, left, right, other}) == 4
    assert kept[0, 0, 8] == other
    assert set(np.unique(kept)) == {0, left, right, other}
    assert origin[[left, right, other]].tolist() == [5, 5, 2]
    assert not weights[:, :, :, 3].any()
    assert not weights[2, :, :, 4].any()
    assert (weights[:2, :, :, 4] == 200).all()
    # A mask that hides nothing changes nothing.
    grid, mask = _tissue_of(tmp_path / "all", np.ones_like(shown), write_shape=(2, 4, 9))
    assert Tissue.read(mask, grid, 0).hide(labels, affinities) == (labels, affinities, None)
