"""Raw as a predictor sees it: bad sections replaced, grey values stretched, whatever the blocks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.predict.raw_blocks import BlockError, RawBlocks, nearest_good
from agq.blockwise.predict.spec import PredictSpec
from agq.errors import InputError
from tests.helpers.predict_runs import SHAPE, make_grid, make_run, raw_volume


def whole(folder: Path, raw: np.ndarray, write: tuple[int, int, int], **changes: Any) -> np.ndarray:
    """Put what all blocks read together again."""
    grid = make_grid(raw.shape, write_shape=write)
    blocks = RawBlocks.open(make_run(folder, raw, grid, **changes))
    seen = np.zeros(raw.shape, raw.dtype)
    for number in range(grid.n_blocks):
        start, stop = grid.read_box(number)
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        part = blocks.read(number)
        seen[box] = part[tuple(slice(0, b - a) for a, b in zip(start, stop, strict=True))]
    return seen


@pytest.mark.parametrize("write", [(4, 16, 16), (1, 37, 40), (11, 20, 16)])
def test_bad_sections_are_the_nearest_good_ones(tmp_path, write):
    raw = raw_volume()
    expected = raw.copy()
    for z, source in [(0, 1), (4, 3), (5, 3), (6, 8), (7, 8), (10, 9)]:
        expected[z] = raw[source]
    bad = (0, 4, 5, 6, 7, 10)
    np.testing.assert_array_equal(whole(tmp_path, raw, write, bad_sections=bad), expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 30).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_nearest_good(case):
    depth, bad = case
    good = sorted(set(range(depth)) - bad)
    if not good:
        with pytest.raises(InputError, match="every section"):
            nearest_good(sorted(bad), depth)
        return
    expected = {z: min(good, key=lambda g: (abs(g - z), g)) for z in bad}
    assert nearest_good(sorted(bad), depth) == expected


def test_a_section_outside_the_volume_is_named():
    with pytest.raises(InputError, match="section 11 is not in the volume, which has 0 to 10"):
        nearest_good([3, 11], 11)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_grey_values_are_stretched_by_section(tmp_path, dtype):
    values = raw_volume().astype(dtype)
    ends = [(20 + z, 120 + 2 * z) for z in range(SHAPE[0])]
    seen = [
        whole(tmp_path / str(i), values, write, contrast=ends)
        for i, write in enumerate([(4, 16, 16), (11, 20, 16)])
    ]
    np.testing.assert_array_equal(*seen)
    black, white = np.array(ends, np.float32).T[:, :, None, None]
    expected = np.clip((values.astype(np.float32) - black) / (white - black), 0, 1)
    if dtype == "float32":
        np.testing.assert_array_equal(seen[0], expected)
    else:
        top = np.iinfo(dtype).max
        np.testing.assert_allclose(seen[0], np.rint(expected * top), atol=1)
    assert seen[0].dtype == dtype


def test_a_replaced_section_is_stretched_as_the_one_it_is_read_from(tmp_path):
    raw = raw_volume()
    raw[5] = raw[5] // 2
    ends = [(0.0, 255.0)] * 11
    ends[5] = (0.0, 127.5)
    spec = {"contrast": ends, "bad_sections": (4,)}
    seen = whole(tmp_path, raw, (4, 16, 16), **spec)
    np.testing.assert_array_equal(seen[4], seen[3])
    assert abs(int(seen[5].max()) - 2 * int(raw[5].max())) <= 1


def test_a_constant_block_stays_constant(tmp_path):
    raw = np.full(SHAPE, 100, np.uint8)
    ends = [(0.0, 100.0 + z) for z in range(11)]
    assert (whole(tmp_path, raw, (4, 16, 16), contrast=ends) == 100).all()


def test_a_bad_section_may_hold_anything(tmp_path):
    raw = raw_volume().astype(np.float32) / 255
    raw[5] = np.nan
    spec = make_run(tmp_path, raw)
    with pytest.raises(BlockError):
        RawBlocks.open(spec).read(13)
    again = spec.model_copy(update={"bad_sections": (5,)})
    assert np.isfinite(RawBlocks.open(again).read(13)).all()


def test_a_specification_of_an_earlier_release_changes_nothing(tmp_path):
    spec = make_run(tmp_path, raw_volume())
    earlier = spec.model_dump(exclude={"bad_sections", "hide_bad_sections", "contrast"})
    blocks = RawBlocks.open(PredictSpec.model_validate(earlier))
    assert (blocks.contrast, blocks.instead) == (None, {})
