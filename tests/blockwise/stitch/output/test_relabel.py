"""The id map by block, and the blockwise relabelling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.blocks.grid import LOCAL_BITS
from agq.blockwise.stitch.output.relabel import (
    BlockLut,
    relabel_block,
)
from agq.blockwise.storage.arrays import save_arrays
from agq.errors import InputError


def fragment(number: int, label: int) -> int:
    return (number << LOCAL_BITS) | label


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.integers(0, 8), st.integers(1, 30)), st.integers(0, 2**64 - 1), max_size=40
    )
)
def test_map_by_block(names):
    names = {fragment(*name): segment for name, segment in names.items()}
    ids = sorted(names)
    lut = BlockLut.build(
        np.arange(9)[::-1],
        np.array(ids, np.uint64),
        np.array([names[i] for i in ids], np.uint64),
    )
    got = {
        fragment(number, label): int(value)
        for number in range(9)
        for label, value in enumerate(lut.block(number), 1)
    }
    assert {i: got.pop(i) for i in names} == names
    assert not any(got.values())


def test_map_file_and_foreign_blocks(tmp_path):
    ids = np.array([fragment(3, 1), fragment(5, 2)], np.uint64)
    lut = BlockLut.build(np.array([3, 5, 6]), ids, np.array([7, 8], np.uint64))
    save_arrays(tmp_path / "a" / "map.npz", lut.arrays())
    again = BlockLut.open(tmp_path / "a" / "map.npz")
    assert [again.block(n).tolist() for n in (3, 5, 6)] == [[7], [0, 8], []]
    for number in (2, 4, 7):
        with pytest.raises(InputError, match=f"block {number} is not in the id map"):
            again.block(number)
    with pytest.raises(InputError, match="none of the blocks"):
        BlockLut.build(np.array([3, 6]), ids, ids)


def test_relabel_block():
    rng = np.random.default_rng(0)
    number = 2**40 + 3
    local = rng.integers(0, 6, (4, 5, 6)).astype(np.uint64)
    lut = np.array([7, 0, 2**63 + 1, 9, 7], np.uint64)
    ids = np.where(local > 0, local | np.uint64(number << LOCAL_BITS), 0).astype(np.uint64)
    expected = np.concatenate((np.zeros(1, np.uint64), lut))[local]
    assert np.array_equal(relabel_block(ids, number, lut), expected)
    for foreign in (fragment(number, 6), fragment(number + 1, 1), fragment(number, 0)):
        ids[3, 4, 5] = foreign
        with pytest.raises(InputError, match=f"{foreign} is not in the id map"):
            relabel_block(ids, number, lut)


def test_segments_of_32_bits():
    ids = np.array([[[fragment(3, 1), fragment(3, 2), 0]]], np.uint64)
    out = np.empty(ids.shape, np.uint32)
    lut = np.array([2**32 - 1, 5], np.uint64)
    assert relabel_block(ids, 3, lut, out=out) is out
    assert out.tolist() == [[[2**32 - 1, 5, 0]]]
    with pytest.raises(InputError, match="segment id 4294967296 does not fit uint32"):
        relabel_block(ids, 3, lut + np.uint64(1), out=out)
