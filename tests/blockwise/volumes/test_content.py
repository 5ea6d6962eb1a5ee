"""The record of what a volume holds: copies have the same one, changed volumes another one."""

import re
import shutil
import time
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.volumes import content
from agq.blockwise.volumes.content import Content, difference, read_content
from agq.blockwise.volumes.open import Volume, open_volume
from tests.helpers.volumes import PLACE, SHAPE, put, put_n5, voxels


@pytest.fixture
def volume(tmp_path) -> Volume:
    put(tmp_path / "in.zarr", "raw", voxels(), **PLACE)
    return open_volume(tmp_path / "in.zarr", "raw")


def named_box(text: str | None) -> list[tuple[int, ...]]:
    assert text is not None
    return [tuple(map(int, re.findall(r"\d+", corner))) for corner in text.split(" to ")]


def test_a_copy_in_another_place_format_and_chunking_holds_the_same(tmp_path, volume):
    recorded = Content.model_validate_json(read_content(volume).model_dump_json())
    shutil.copytree(tmp_path / "in.zarr", tmp_path / "moved.zarr")
    put(tmp_path / "z2.zarr", "em", voxels(), zarr_format=2, chunks=(5, 7, 9), **PLACE)
    put_n5(tmp_path / "in.n5", voxels(), resolution=[6, 6, 30])
    copies = [
        open_volume(tmp_path / "moved.zarr", "raw"),
        open_volume(tmp_path / "z2.zarr"),
        open_volume(tmp_path / "in.n5"),
    ]
    for copy in copies:
        assert difference(copy, recorded) is None
    assert read_content(copies[0]) == recorded


@given(place=st.tuples(*(st.integers(0, n - 1) for n in SHAPE)))
@settings(max_examples=20, deadline=None)
def test_one_changed_voxel_of_a_small_volume_is_found(tmp_path_factory, place):
    folder = tmp_path_factory.mktemp("changed")
    put(folder / "in.zarr", "raw", voxels(), **PLACE)
    volume = open_volume(folder / "in.zarr", "raw")
    recorded = read_content(volume)
    array = zarr.open_array(folder / "in.zarr" / "raw", mode="r+")
    array[place] = 255
    start, stop = named_box(difference(volume, recorded))
    assert all(a <= p < b for a, p, b in zip(start, place, stop, strict=True))


class Counting:
    """An array of any size that counts the voxels read of it."""

    def __init__(self, layer: int | None = None) -> None:
        self.read = 0
        self.layer = layer

    def __getitem__(self, selection):
        shape = [part.stop - part.start for part in selection]
        self.read += prod(shape)
        changed = self.layer is not None and selection[0].start <= self.layer < selection[0].stop
        return np.full(shape, selection[0].start % 200 + changed, np.uint8)


def test_a_volume_of_a_million_chunks_is_read_in_a_moment(volume):
    array = Counting()
    shape, chunks = (6400, 6400, 6400), (64, 64, 64)
    large = replace(volume, shape=shape, chunks=chunks, _array=array)
    began = time.monotonic()
    recorded = read_content(large)
    assert time.monotonic() - began < 5
    assert array.read <= content.BUDGET
    assert len(recorded.model_dump_json()) < 10_000
    # A replaced section is found, wherever it is.
    for layer in (0, 3000, 6399):
        changed = replace(large, _array=Counting(layer))
        start, stop = named_box(difference(changed, recorded))
        assert start[0] <= layer < stop[0]
    array.read = 0
    assert difference(large, recorded, most=64) is None
    assert array.read <= 64 * 64**3


def test_a_chunk_larger_than_memory_allows_is_read_in_parts(volume):
    array = Counting()
    shape = (2000, 2000, 2000)
    recorded = read_content(replace(volume, shape=shape, chunks=shape, _array=array))
    assert prod(recorded.box) <= 2**25
    assert array.read <= 2**28


def test_what_cannot_be_read_does_not_differ(tmp_path, volume):
    whole = read_content(volume)
    chunk = tmp_path / "in.zarr" / "raw" / "c" / "0" / "0" / "0"
    stored = chunk.read_bytes()
    chunk.write_bytes(b"damaged")
    damaged = read_content(volume)
    assert damaged.sums.split()[0] == "-"
    assert damaged.sums.split()[1:] == whole.sums.split()[1:]
    assert difference(volume, whole) is None
    chunk.write_bytes(stored)
    assert difference(volume, damaged) is None


def test_another_shape_differs(tmp_path, volume):
    put(tmp_path / "other.zarr", "raw", voxels((5, 7, 8)), **PLACE)
    other = open_volume(tmp_path / "other.zarr", "raw")
    assert difference(other, read_content(volume)) == "its shape is (5, 7, 8), not (5, 7, 9)"
