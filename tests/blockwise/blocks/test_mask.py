"""Which blocks hold tissue."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from funlib.geometry import Coordinate

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.mask import mask_blocks
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
