import itertools
import json

import numpy as np
import pytest
from funlib.geometry import Coordinate, Roi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agq.blockwise.blocks.grid import LOCAL_BITS, BlockGrid
from agq.errors import InputError


def triple(low: int, high: int) -> st.SearchStrategy[tuple[int, int, int]]:
    one = st.integers(low, high)
    return st.tuples(one, one, one)


grids = st.builds(
    BlockGrid,
    volume_shape=triple(1, 10),
    voxel_size=triple(1, 40),
    write_shape=triple(1, 9),
    before=triple(0, 4),
    after=triple(0, 4),
    offset=triple(-100, 100),
)


# A busy machine is no failure.
PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def box_slices(box):
    return tuple(slice(a, b) for a, b in zip(*box, strict=True))


@given(grids)
@PATIENT
def test_every_voxel_is_written_by_exactly_one_block(grid):
    count = np.zeros(grid.volume_shape, int)
    for number in range(grid.n_blocks):
        start, stop = grid.write_box(number)
        assert all(0 <= a < b for a, b in zip(start, stop, strict=True))
        count[box_slices((start, stop))] += 1
    assert (count == 1).all()


@given(grids)
@PATIENT
def test_read_windows_have_one_size_and_stay_inside(grid):
    size = tuple(min(r, v) for r, v in zip(grid.read_shape, grid.volume_shape, strict=True))
    for number in range(grid.n_blocks):
        start, stop = grid.read_box(number)
        assert tuple(b - a for a, b in zip(start, stop, strict=True)) == size
        write_start, write_stop = grid.write_box(number)
        for axis in range(3):
            assert 0 <= start[axis] <= write_start[axis]
            assert write_stop[axis] <= stop[axis] <= grid.volume_shape[axis]
            # All of the context that exists is read, unless the volume is smaller than it.
            assert start[axis] <= max(0, write_start[axis] - grid.before[axis])
            full = write_start[axis] + grid.write_shape[axis] + grid.after[axis]
            assert stop[axis] >= min(full, grid.volume_shape[axis])


@given(grids)
@PATIENT
def test_crop_of_the_read_window_is_the_write_box(grid):
    volume = np.arange(np.prod(grid.volume_shape)).reshape(grid.volume_shape)
    for number in range(grid.n_blocks):
        window = volume[box_slices(grid.read_box(number))]
        written = volume[box_slices(grid.write_box(number))]
        assert np.array_equal(window[grid.write_in_read(number)], written)


@given(grids)
@PATIENT
def test_numbers_are_dense_and_in_c_order(grid):
    indices = [grid.index(number) for number in range(grid.n_blocks)]
    assert indices == list(itertools.product(*map(range, grid.shape)))
    assert [grid.number(index) for index in indices] == list(range(grid.n_blocks))


@given(grids)
@PATIENT
def test_neighbors_are_the_next_blocks(grid):
    for number, axis in itertools.product(range(grid.n_blocks), range(3)):
        other = grid.neighbor(number, axis)
        (start, stop) = grid.write_box(number)
        if other is None:
            assert stop[axis] == grid.volume_shape[axis]
        else:
            expected = list(start)
            expected[axis] = stop[axis]
            assert grid.write_box(other)[0] == tuple(expected)


@given(grids, triple(-4, 14), triple(-4, 14))
@PATIENT
def test_select_is_the_blocks_that_write_into_the_box(grid, start, stop):
    expected = [
        number
        for number in range(grid.n_blocks)
        if all(
            max(a, lo) < min(b, hi)
            for a, b, lo, hi in zip(*grid.write_box(number), start, stop, strict=True)
        )
    ]
    selected = grid.select(start, stop)
    assert selected.dtype == np.int64
    assert selected.tolist() == expected


@given(grids)
@PATIENT
def test_world_rois_convert_back(grid):
    for number in range(grid.n_blocks):
        assert grid.to_voxels(grid.write_roi(number)) == grid.write_box(number)
        assert grid.to_voxels(grid.read_roi(number)) == grid.read_box(number)


@given(grids)
@PATIENT
def test_blocks_are_found_by_their_unclipped_write_roi(grid):
    size = Coordinate(grid.write_shape) * grid.voxel_size
    for number in range(grid.n_blocks):
        start = grid.write_roi(number).offset
        assert grid.number_at(Roi(start, size)) == number
    with pytest.raises(ValueError, match="is not the write ROI of a block"):
        grid.number_at(Roi(start, size + Coordinate(1, 0, 0)))


@given(grids, st.data())
@PATIENT
def test_ids_are_unique_and_reversible(grid, data):
    blocks = st.integers(0, grid.n_blocks - 1)
    labels = st.integers(0, 2**LOCAL_BITS - 1)
    pairs = data.draw(st.lists(st.tuples(blocks, labels), min_size=1, max_size=20, unique=True))
    ids = np.array([grid.fragment_ids(n, np.uint32(local)) for n, local in pairs])
    numbers, local = BlockGrid.split_ids(ids)
    foreground = local != 0
    assert np.array_equal(foreground, [label != 0 for _, label in pairs])
    found = list(zip(numbers[foreground].tolist(), local[foreground].tolist(), strict=True))
    assert found == [pair for pair in pairs if pair[1]]
    assert (ids[~foreground] == 0).all()


@given(grids)
@PATIENT
def test_json_round_trip(grid):
    assert BlockGrid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


def test_published_setting():
    grid = BlockGrid((100, 1024, 1000), Coordinate(30, 6, 6))
    assert grid.read_shape == (17, 257, 257)
    assert grid.shape == (7, 4, 4)
    assert grid.read_box(0) == ((0, 0, 0), (17, 257, 257))
    assert grid.write_box(grid.n_blocks - 1) == ((96, 768, 768), (100, 1024, 1000))
    assert grid.read_box(grid.n_blocks - 1) == ((83, 767, 743), (100, 1024, 1000))
    assert grid.write_roi(1) == Roi((0, 0, 1536), (480, 1536, 1536))


def test_ids_of_the_largest_possible_grid_reach_the_last_bit():
    grid = BlockGrid((1, 2**43, 1), (1, 1, 1), write_shape=(1, 1, 1))
    top = grid.fragment_ids(grid.n_blocks - 1, np.uint32(2**LOCAL_BITS - 1))
    assert int(top) == 2**64 - 1
    assert [int(v) for v in BlockGrid.split_ids(top)] == [2**43 - 1, 2**LOCAL_BITS - 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"volume_shape": (1, 2**44, 1), "write_shape": (1, 1, 1)}, "fragment ids"),
        ({"volume_shape": (0, 4, 4)}, "volume_shape"),
        ({"write_shape": (4, 4)}, "write_shape"),
        ({"write_shape": (4, 4, -1)}, "write_shape"),
        ({"before": (0, -1, 0)}, "before"),
        ({"voxel_size": (4.5, 1, 1)}, "voxel_size"),
        ({"offset": "abc"}, "offset"),
        ({"block": 3}, "block"),
    ],
)
def test_bad_values_name_the_field(changes, message):
    values = {"volume_shape": (4, 4, 4), "voxel_size": (1, 1, 1)} | changes
    with pytest.raises(InputError, match=message):
        BlockGrid.from_dict(values)


def test_bad_requests_are_refused():
    grid = BlockGrid((8, 8, 8), (30, 6, 6), write_shape=(4, 4, 4))
    with pytest.raises(IndexError, match="no block 8"):
        grid.write_box(8)
    with pytest.raises(IndexError, match="no block at"):
        grid.number((0, 2, 0))
    with pytest.raises(ValueError, match="do not fit"):
        grid.fragment_ids(0, np.array([2**LOCAL_BITS]))
    with pytest.raises(InputError, match="voxel grid"):
        grid.to_voxels(Roi((15, 0, 0), (30, 6, 6)))
    with pytest.raises(ValueError, match="is not the write ROI"):
        grid.number_at(Roi((30, 0, 0), (120, 24, 24)))
    with pytest.raises(InputError, match="unbounded"):
        grid.to_voxels(Roi((None, 0, 0), (None, 6, 6)))


def test_a_volume_of_more_blocks_than_can_be_listed():
    grid = BlockGrid(volume_shape=(10**6,) * 3, voxel_size=(30, 6, 6))
    with pytest.raises(InputError, match="blocks are more than one command can list"):
        grid.select((0, 0, 0), grid.volume_shape)
