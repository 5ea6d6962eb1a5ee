"""What a volume of another scale says of the voxels of a box."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.overlay import read_overlay
from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import open_volume

SHAPE = (6, 9, 11)


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 200, (5, 7, 8)).astype(np.uint16)


@pytest.fixture(scope="module")
def container(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("overlay") / "a.zarr"
    made = create_array(
        folder, "a", shape=data.shape, chunks=(2, 3, 8), dtype=data.dtype, voxel_size=(1, 1, 1)
    )
    made[:] = data
    return folder


triples = st.tuples(*[st.integers(1, 9)] * 3)


@settings(max_examples=60, deadline=None)
@given(
    size=triples,
    step=triples,
    offset=st.tuples(*[st.integers(-40, 40)] * 3),
    start=st.tuples(*[st.integers(0, 5)] * 3),
    most=st.sampled_from([1, 30, 10**6]),
)
def test_a_voxel_takes_the_value_at_its_centre(container, data, size, step, offset, start, most):
    grid = BlockGrid(volume_shape=SHAPE, voxel_size=size, write_shape=(4, 4, 4), offset=(7, -3, 0))
    placed = open_volume(container, "a", kind="labels")
    object.__setattr__(placed, "voxel_size", type(placed.voxel_size)(step))
    object.__setattr__(placed, "offset", type(placed.offset)(offset))
    found = read_overlay(placed, grid, start, SHAPE, most_voxels=most)
    assert found.dtype == data.dtype
    assert found.shape == tuple(b - a for a, b in zip(start, SHAPE, strict=True))
    for voxel in np.ndindex(found.shape):
        centre = [
            zero + (i + first + 0.5) * s
            for i, first, s, zero in zip(voxel, start, size, grid.offset, strict=True)
        ]
        place = [(c - o) // s for c, o, s in zip(centre, offset, step, strict=True)]
        inside = all(0 <= p < n for p, n in zip(place, data.shape, strict=True))
        assert found[voxel] == (data[tuple(map(int, place))] if inside else 0)
