"""The id map by block, and the blockwise relabelling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stitch_helpers import GRID

from blockwise.agglomerate import Agglomeration, MergeTable
from blockwise.arrays import create_array, open_array
from blockwise.errors import InputError
from blockwise.grid import LOCAL_BITS
from blockwise.journal import Journal
from blockwise.relabel import BlockLut, build_lut, relabel_batch, relabel_block, run_journalled

NO_MERGES = MergeTable(
    *(np.zeros(0, np.uint64),) * 2,
    *(np.zeros(0, np.int64),) * 2,
)


def fragment(number: int, label: int) -> int:
    return (number << LOCAL_BITS) | label


def agglomeration(segments: dict[int, int]) -> Agglomeration:
    ids = sorted(segments)
    return Agglomeration(
        np.array(ids, np.uint64), np.array([segments[i] for i in ids], np.uint64), NO_MERGES
    )


@st.composite
def clusterings(draw):
    """Fragments of up to 9 blocks with gaps in their labels, in random clusters, and sizes."""
    names = draw(st.sets(st.tuples(st.integers(0, 8), st.integers(1, 30)), max_size=40))
    ids = sorted(fragment(*name) for name in names)
    labels = draw(st.lists(st.integers(0, 6), min_size=len(ids), max_size=len(ids)))
    segments = {
        i: min(j for j, other in zip(ids, labels, strict=True) if other == label)
        for i, label in zip(ids, labels, strict=True)
    }
    sizes = draw(st.lists(st.integers(1, 9), min_size=len(ids), max_size=len(ids)))
    return segments, np.array(sizes, np.int64)


@settings(max_examples=150, deadline=None)
@given(clusterings(), st.sampled_from(["consecutive", "fragment"]), st.integers(0, 15))
def test_map_by_block(case, segment_ids, min_size):
    segments, sizes = case
    lut, table = build_lut(
        agglomeration(segments), sizes, 9, segment_ids=segment_ids, min_size=min_size
    )
    voxels: dict[int, int] = {}
    for (_, segment), size in zip(sorted(segments.items()), sizes.tolist(), strict=True):
        voxels[segment] = voxels.get(segment, 0) + size
    kept = [segment for segment in sorted(voxels) if voxels[segment] >= min_size]
    names = {s: i if segment_ids == "consecutive" else s for i, s in enumerate(kept, 1)}
    expected = {i: names.get(segment, 0) for i, segment in segments.items()}
    got = {
        fragment(number, label): int(value)
        for number in range(9)
        for label, value in enumerate(lut.block(number), 1)
    }
    assert {i: got.pop(i) for i in expected} == expected
    assert not any(got.values())
    assert table.ids.tolist() == [names[s] for s in kept]
    assert table.sizes.tolist() == [voxels[s] for s in kept]
    counts = [list(segments.values()).count(s) for s in kept]
    assert table.fragments.tolist() == counts
    assert table.small_segments == len(voxels) - len(kept)
    assert table.small_voxels == sum(voxels.values()) - int(table.sizes.sum())


def test_map_round_trip_reads_one_slice(tmp_path):
    lut, _ = build_lut(
        agglomeration({fragment(3, 1): fragment(3, 1), fragment(5, 2): fragment(3, 1)}),
        np.ones(2, np.int64),
        7,
    )
    lut.save(tmp_path)
    again = BlockLut.open(tmp_path)
    assert isinstance(again.segments, np.memmap)
    assert [again.block(n).tolist() for n in range(7)] == [[], [], [], [1], [], [0, 1], []]


def test_fragments_outside_the_grid_are_refused():
    with pytest.raises(InputError, match="block 8 of a grid of 8"):
        build_lut(agglomeration({fragment(8, 1): fragment(8, 1)}), np.ones(1, np.int64), 8)


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


def test_batch_records_what_failed_and_goes_on(tmp_path):
    options = {
        "shape": GRID.volume_shape,
        "chunks": GRID.write_shape,
        "dtype": np.uint64,
        "voxel_size": GRID.voxel_size,
    }
    fragments = create_array(tmp_path / "c", "fragments", **options)
    create_array(tmp_path / "c", "segmentation/s0", **options)
    for number in (0, 1, 2):
        start, stop = GRID.write_box(number)
        fragments[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = fragment(
            number, 1
        )
    lut, _ = build_lut(
        agglomeration({fragment(0, 1): fragment(0, 1), fragment(2, 1): fragment(0, 1)}),
        np.ones(2, np.int64),
        GRID.n_blocks,
    )
    lut.save(tmp_path / "lut")
    failed = relabel_batch(
        str(tmp_path / "c"),
        "fragments",
        "segmentation/s0",
        str(tmp_path / "lut"),
        str(tmp_path / "journal"),
        GRID.to_dict(),
        [0, 1, 2],
    )
    assert failed == 1
    journal = Journal(tmp_path / "journal")
    assert np.flatnonzero(journal.done(GRID.n_blocks)).tolist() == [0, 2]
    (record,) = journal.failed()
    assert record.block == 1
    assert "not in the id map" in (record.reason or "")
    assert "Traceback" in (record.error or "")
    written = open_array(tmp_path / "c", "segmentation/s0", "r")[:]
    for number, value in ((0, 1), (1, 0), (2, 1)):
        start, stop = GRID.write_box(number)
        inside = written[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
        assert (inside == value).all()


def test_journal_line_comes_after_the_work(tmp_path):
    seen = []

    def work(number: int) -> int:
        seen.append((number, int(Journal(tmp_path).done(5)[number])))
        return 10

    assert run_journalled(tmp_path, range(5), work) == 0
    assert seen == [(n, 0) for n in range(5)]
    assert Journal(tmp_path).done(5).all()
    assert Journal(tmp_path).record(3).voxels == 10
