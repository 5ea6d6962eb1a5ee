from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from agq.blockwise.predict.block_threads import BlockError, BlockFiles
from agq.blockwise.storage.files import file_checksum
from agq.errors import InputError
from tests.helpers import fakes
from tests.helpers.predict_runs import make_grid, make_run, raw_volume
from tests.helpers.sidecars import read_sidecar

CONTEXTS = [((0, 0, 0), (1, 1, 1)), ((2, 5, 5), (2, 5, 5))]


def open_run(folder, raw, **changes) -> BlockFiles:
    grid = changes.pop("grid", None)
    spec = make_run(folder, raw, grid, **changes)
    return BlockFiles.open(spec, Path(spec.run_dir))


@pytest.mark.parametrize("shape", [(3, 9, 10), (1, 1, 1), (5, 17, 17), (4, 40, 3), (11, 37, 40)])
@pytest.mark.parametrize("context", CONTEXTS)
def test_windows_have_one_shape_and_writes_hit_their_voxels(tmp_path, shape, context):
    raw = raw_volume((12, 40, 40))[tuple(slice(n) for n in shape)].copy()
    grid = make_grid(shape, before=context[0], after=context[1])
    files = open_run(tmp_path, raw, grid=grid)
    predictor = fakes.threshold()
    expected = np.zeros(shape, np.uint64)
    for number in range(grid.n_blocks):
        window = files.read(number)
        assert window.shape == grid.read_shape
        read, write = ([slice(a, b) for a, b in zip(*f(number), strict=True)] for f in _boxes(grid))
        inside = tuple(slice(0, s.stop - s.start) for s in read)
        assert np.array_equal(window[inside], raw[tuple(read)])
        (prediction,) = predictor.predict([window])
        sums = files.write(number, prediction)
        local = prediction.labels[inside][grid.write_in_read(number)].astype(np.uint64)
        expected[tuple(write)] = np.where(local, local + (number << 21), 0)
        assert sums["fragments"] == file_checksum(files.writer.files(number)[0])
        assert read_sidecar(files.run_dir, number).number == number
    stored = zarr.open_array(files.run_dir / "data.zarr" / "fragments")[:]
    assert np.array_equal(stored, expected)


def _boxes(grid):
    return grid.read_box, grid.write_box


def test_a_small_volume_is_reflected_behind_its_end(tmp_path):
    raw = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    window = open_run(tmp_path, raw).read(0)
    assert np.array_equal(window, np.pad(raw, ((0, 3), (0, 14), (0, 13)), mode="reflect"))
    assert window[0, 0, :7].tolist() == [0, 1, 2, 3, 2, 1, 0]


def test_values_that_are_no_numbers_are_refused(tmp_path):
    raw = raw_volume().astype(np.float32)
    raw[1, 1, 1], raw[1, 1, 2] = np.nan, -np.inf
    files = open_run(tmp_path, raw)
    with pytest.raises(BlockError, match="raw has 2 NaN or infinite of 1445 voxels"):
        files.read(0)
    assert files.read(26).dtype == np.float32


def test_wrong_predictions_are_refused(tmp_path):
    files = open_run(tmp_path, raw_volume())
    (good,) = fakes.threshold().predict([files.read(0)])
    with pytest.raises(BlockError, match=r"labels \(4, 17, 17\)"):
        files.write(0, replace(good, labels=good.labels[1:]))
    with pytest.raises(BlockError, match="labels of int64"):
        files.write(0, replace(good, labels=good.labels.astype(np.int64)))
    with pytest.raises(BlockError, match="affinities of float64"):
        files.write(0, replace(good, affinities=good.affinities / 255))
    assert not (files.run_dir / "sidecars").exists()


def test_affinities_are_optional(tmp_path):
    files = open_run(tmp_path, raw_volume(), affinities=False)
    (prediction,) = fakes.threshold().predict([files.read(5)])
    assert set(files.write(5, prediction)) == {"fragments", "sidecar"}
    assert not (files.run_dir / "data.zarr" / "affinities").exists()


def test_stored_affinities_are_those_of_the_write_box(tmp_path):
    files = open_run(tmp_path, raw_volume())
    (prediction,) = fakes.threshold().predict([files.read(26)])
    files.write(26, prediction)
    crop = files.grid.write_in_read(26)
    stored = zarr.open_array(files.run_dir / "data.zarr" / "affinities")[:, 8:, 32:, 32:]
    assert np.array_equal(stored, prediction.affinities[(slice(None), *crop)])


def test_input_and_outputs_must_fit_the_grid(tmp_path):
    spec = make_run(tmp_path, raw_volume())
    other = spec.model_copy(update={"grid": make_grid((11, 37, 41)).to_dict()})
    with pytest.raises(InputError, match=r"has \(11, 37, 40\) voxels"):
        BlockFiles.open(other, Path(spec.run_dir))
    other = spec.model_copy(update={"grid": make_grid(write_shape=(2, 16, 16)).to_dict()})
    with pytest.raises(InputError, match="do not fit the block grid"):
        BlockFiles.open(other, Path(spec.run_dir))
