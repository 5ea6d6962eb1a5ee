"""Sidecars: contents against a plain count, planes, and the file format."""

import json
import os
import random
import struct
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import zstd

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.label_pairs import PairTable
from agq.blockwise.blocks.packs import sidecar_path
from agq.blockwise.blocks.sidecar import (
    build_sidecar,
    open_sidecar,
)
from agq.errors import InputError
from tests.helpers.fuzz import attack, odd_bytes, odd_document, require_one_line
from tests.helpers.sidecars import read_sidecar, sidecar_from

GRID = BlockGrid(
    volume_shape=(7, 13, 10), voxel_size=(30, 6, 6), write_shape=(3, 5, 4), after=(1, 1, 1)
)


def block_arrays(grid: BlockGrid, number: int, labels: int = 4, dtype: type = np.uint16):
    rng = np.random.default_rng(number)
    start, stop = grid.read_box(number)
    shape = tuple(b - a for a, b in zip(start, stop, strict=True))
    return (
        rng.integers(0, labels + 1, shape).astype(dtype),
        rng.integers(0, 256, (3, *shape)).astype(np.uint8),
    )


def plain_contacts(labels: np.ndarray, affinities: np.ndarray) -> dict:
    sums: Counter = Counter()
    counts: Counter = Counter()
    for axis in range(3):
        for index in np.ndindex(labels.shape):
            if index[axis] == 0:
                continue
            before = list(index)
            before[axis] -= 1
            a, b = int(labels[index]), int(labels[tuple(before)])
            if a and b and a != b:
                sums[min(a, b), max(a, b)] += int(affinities[(axis, *index)])
                counts[min(a, b), max(a, b)] += 1
    return {pair: (sums[pair], counts[pair]) for pair in counts}


@pytest.mark.parametrize("number", range(GRID.n_blocks))
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_contents_equal_a_plain_count(number, dtype):
    labels, affinities = block_arrays(GRID, number, dtype=dtype)
    sidecar = build_sidecar(labels, affinities, GRID, number)
    box = GRID.write_in_read(number)
    inner = labels[box]
    values, sizes = np.unique(inner[inner > 0], return_counts=True)
    assert np.array_equal(sidecar.nodes, values)
    assert np.array_equal(sidecar.sizes, sizes)
    pairs = zip(sidecar.u.tolist(), sidecar.v.tolist(), strict=True)
    rows = zip(sidecar.aff_sum.tolist(), sidecar.count.tolist(), strict=True)
    table = dict(zip(pairs, rows, strict=True))
    assert list(table) == sorted(table)
    assert table == plain_contacts(inner, affinities[(slice(None), *box)])


@pytest.mark.parametrize("number", range(GRID.n_blocks))
def test_planes_are_those_of_the_read_arrays(number):
    labels, affinities = block_arrays(GRID, number)
    sidecar = build_sidecar(labels, affinities, GRID, number)
    box = GRID.write_in_read(number)
    for axis, planes in enumerate(sidecar.planes):
        low, high = box[axis].start, box[axis].stop

        def plane(array, index, axis=axis):
            return array[tuple(index if d == axis else box[d] for d in range(3))]

        assert np.array_equal(planes.low_labels, plane(labels, low))
        assert np.array_equal(planes.low_affinity, plane(affinities[axis], low))
        assert np.array_equal(planes.high_labels, plane(labels, high - 1))
        if high < labels.shape[axis]:
            assert np.array_equal(planes.after_labels, plane(labels, high))
            assert np.array_equal(planes.after_affinity, plane(affinities[axis], high))
        else:
            assert planes.after_labels is None
            assert planes.after_affinity is None
        if low:
            assert np.array_equal(planes.before_labels, plane(labels, low - 1))
        else:
            assert planes.before_labels is None


def test_bytes_are_deterministic_and_round_trip(tmp_path):
    labels, affinities = block_arrays(GRID, 5)
    sidecar = build_sidecar(labels, affinities, GRID, 5)
    data = sidecar.to_bytes()
    assert data == build_sidecar(labels.copy(), affinities.copy(), GRID, 5).to_bytes()
    assert sidecar_from(data).to_bytes() == data
    path = sidecar_path(tmp_path, 1005)
    assert path == tmp_path / "sidecars" / "0000001" / "1005.agqs"
    _write(sidecar_path(tmp_path, 5), data)
    assert read_sidecar(tmp_path, 5).to_bytes() == data
    file = open_sidecar(tmp_path, 5)
    assert file.frame("tables")["u"].dtype == np.uint32
    assert np.array_equal(file.frame("high_0")["after_affinity"], sidecar.planes[0].after_affinity)
    assert set(file.frame("high_0")) == {"high_labels", "after_affinity"}
    assert np.array_equal(file.frame("outer_0")["after_labels"], sidecar.planes[0].after_labels)


def test_boxes_and_names():
    labels, affinities = block_arrays(GRID, 5)
    names = np.arange(100, 105, dtype=np.uint64)
    sidecar = build_sidecar(labels, affinities, GRID, 5, names)
    inner = labels[GRID.write_in_read(5)]
    for label, box in zip(sidecar.nodes, sidecar.boxes.tolist(), strict=True):
        where = np.argwhere(inner == label)
        assert box == [*where.min(axis=0), *(where.max(axis=0) + 1)]
    again = sidecar_from(sidecar.to_bytes())
    assert np.array_equal(again.original_labels, names[sidecar.nodes])


def _write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_all_background_block():
    labels, affinities = block_arrays(GRID, 0)
    sidecar = build_sidecar(np.zeros_like(labels), affinities, GRID, 0)
    assert sidecar.nodes.size == sidecar.u.size == 0
    assert sidecar_from(sidecar.to_bytes()).count.dtype == np.int64


def test_bad_arrays_and_files_are_refused(tmp_path):
    labels, affinities = block_arrays(GRID, 0)
    with pytest.raises(InputError, match="read box's shape"):
        build_sidecar(labels[1:], affinities, GRID, 0)
    with pytest.raises(InputError, match="need uint16"):
        build_sidecar(labels.astype(np.int64), affinities, GRID, 0)
    data = build_sidecar(labels, affinities, GRID, 0).to_bytes()
    flipped = data[:-100] + bytes([data[-100] ^ 255]) + data[-99:]
    for bad in (data[: len(data) // 2], b"", b"no sidecar", data[:200] + b"?" * 50, flipped):
        with pytest.raises(InputError, match="damaged"):
            sidecar_from(bad)
    with pytest.raises(InputError, match="format version 1, this release reads 2"):
        sidecar_from(data.replace(b'"version":2', b'"version":1'))
    with pytest.raises(InputError, match="block 3 is missing"):
        read_sidecar(tmp_path, 3)
    old = sidecar_path(tmp_path, 3).with_suffix(".npz")
    old.parent.mkdir(parents=True)
    np.savez(old, labels=labels)
    with pytest.raises(InputError, match=r"3\.npz: sidecar of an older release.*--overwrite"):
        read_sidecar(tmp_path, 3)
    _write(sidecar_path(tmp_path, 3), data)
    with pytest.raises(InputError, match="holds block 0, not block 3"):
        read_sidecar(tmp_path, 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 70000), st.booleans())
def test_pair_table_grows_and_keeps_large_ids(seed, labels, ordered):
    rng = np.random.default_rng(seed)
    base = np.uint64(2**63 + 2**40)
    first, second = rng.integers(0, labels, (2, 30, 101)).astype(np.uint64)
    ids = [np.where(x > 0, x + base, x).astype(np.uint64) for x in (first, second)]
    values = rng.integers(0, 511, first.shape).astype(np.uint16)
    table = PairTable(ordered=ordered)
    table.add(ids[0], ids[1], values)
    expected: Counter = Counter()
    for a, b, value in zip(first.ravel(), second.ravel(), values.ravel(), strict=True):
        if a and b and (ordered or a != b):
            key = (int(a), int(b)) if ordered else (int(min(a, b)), int(max(a, b)))
            expected[key] += int(value) * 10**6 + 1
    columns = table.columns()
    offset = int(base)
    got = {
        (u - offset, v - offset): total * 10**6 + count
        for u, v, total, count in zip(
            *(c.tolist() for c in (columns.u, columns.v, columns.total, columns.count)), strict=True
        )
    }
    assert got == expected
    assert list(got) == sorted(got)


def header_of(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack_from("<I", data, 4)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: object, frames: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return b"".join((b"AGQS", struct.pack("<I", len(text)), text, frames))


@pytest.fixture(scope="module")
def whole() -> bytes:
    labels, affinities = block_arrays(GRID, 0)
    return build_sidecar(
        labels, affinities, GRID, 0, original_labels=np.arange(10, dtype=np.uint64)
    ).to_bytes()


def test_the_contents_are_as_they_were(whole):
    assert sidecar_from(whole).to_bytes() == whole


@pytest.mark.fuzz
def test_damaged_sidecars(whole):
    header, frames = header_of(whole)

    def case(rng: random.Random) -> bytes:
        if rng.random() < 0.6:
            return with_header(odd_document(rng, header), frames)
        return odd_bytes(rng, whole)

    def look(data: bytes) -> None:
        sidecar = sidecar_from(data)
        n, m = len(sidecar.nodes), len(sidecar.u)
        assert sidecar.boxes.shape == (n, 6)
        assert len(sidecar.sizes) == n
        assert len(sidecar.v) == len(sidecar.count) == len(sidecar.aff_sum) == m
        for planes in sidecar.planes:
            assert planes.low_labels.shape == planes.low_affinity.shape
        assert 0 <= sidecar.number < 2**63

    assert attack(look, case, 300)


@pytest.mark.parametrize(
    "form",
    [
        *(["nodes", "<u4", [10**12]], ["nodes", "<u4", [-1]], ["nodes", "<u4", [2**70]]),
        *(["nodes", "<f8", [4]], ["nodes", "V1000000000", [1]], ["nodes", "|O", [4]]),
        *(["nodes", "<u4", 4], ["nodes", "<u4", [True]], ["other", "<u4", [4]], [], 3),
    ],
    ids=str,
)
def test_arrays_that_no_sidecar_has(whole, form):
    header, frames = header_of(whole)
    header["frames"][0][2][0] = form
    assert "damaged" in require_one_line(lambda: sidecar_from(with_header(header, frames)))


def test_a_frame_that_claims_to_hold_much_more(whole):
    header, frames = header_of(whole)
    bomb = zstd.compress(bytes(2**28), 1)
    assert len(bomb) < 2**16
    header["frames"][0][1] = len(bomb)
    rest = frames[header_of(whole)[0]["frames"][0][1] :]
    assert "damaged" in require_one_line(lambda: sidecar_from(with_header(header, bomb + rest)))


@pytest.mark.parametrize("levels", [80, 200_000])
def test_a_header_that_is_too_deep(whole, levels):
    text = b"[" * levels + b"]" * levels
    data = b"".join((b"AGQS", struct.pack("<I", len(text)), text))
    assert "levels" in require_one_line(lambda: sidecar_from(data))


def test_what_is_no_sidecar_file(tmp_path):
    path = sidecar_path(tmp_path, 3)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert "FIFO" in require_one_line(lambda: open_sidecar(tmp_path, 3))
    path.unlink()
    path.touch()
    os.truncate(path, 2**40)
    assert "bytes" in require_one_line(lambda: open_sidecar(tmp_path, 3))
