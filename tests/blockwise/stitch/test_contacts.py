"""Contacts: sidecars against whole arrays, and tables that add up in any order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.stitch.contacts import ContactTable, face_contacts, merge_contacts
from agq.errors import InputError
from tests.helpers.contacts import COLUMNS, files, from_sidecars, grid, rows
from tests.helpers.fragments import GRID, make_run
from tests.helpers.whole_volume import contacts_from_volume


@pytest.mark.parametrize(
    "blocks",
    [
        GRID,
        grid((4, 12, 10), (0, 0, 0), (1, 1, 1)),
        grid((4, 12, 10), (2, 3, 1), (2, 3, 1)),
        grid((4, 12, 10), (0, 0, 0), (0, 0, 0)),
        grid((5, 11, 26), (1, 0, 0), (0, 2, 1)),
        grid((3, 33, 7), (0, 1, 0), (1, 1, 1)),
        grid((16, 64, 64), (0, 0, 0), (1, 1, 1)),
        grid((1, 9, 9), (1, 1, 1), (1, 1, 1), (3, 20, 9)),
    ],
    ids=str,
)
def test_sidecars_equal_the_assembled_volume(blocks):
    run = make_run(blocks, seed=4)
    expected = contacts_from_volume(run.fragments, run.half_units, run.border)
    assert rows(from_sidecars(run)) == rows(expected)
    assert (blocks.n_blocks == 1) == (expected.contacts.across_count.sum() == 0)


@pytest.mark.parametrize("seed", range(4))
def test_partition_into_batches_changes_nothing(seed):
    run = make_run(GRID, seed=1)
    whole = from_sidecars(run)
    rng = np.random.default_rng(seed)
    order = rng.permutation(GRID.n_blocks)
    cuts = np.sort(rng.choice(np.arange(1, GRID.n_blocks), 5, replace=False))
    parts = from_sidecars(run, np.split(order, cuts))
    assert rows(whole) == rows(parts)


def test_absent_blocks_give_no_contacts():
    run = make_run(GRID, seed=2, absent=(4, 13, 26))
    expected = contacts_from_volume(run.fragments, run.half_units, run.border)
    assert rows(from_sidecars(run)) == rows(expected)
    numbers, _ = GRID.split_ids(expected.nodes.ids)
    assert not set(numbers.tolist()) & {4, 13, 26}


def test_affinity_is_the_mean_where_both_blocks_read_the_plane():
    blocks = grid((4, 12, 10), (0, 0, 0), (1, 0, 0))
    run = make_run(blocks, seed=0, truth=np.ones(blocks.volume_shape, np.uint32))
    numbers = (0, blocks.neighbor(0, 0), 1)
    lower, above, right = (run.sidecars[n] for n in numbers)
    opened = files(run)
    both = face_contacts(*(opened[n] for n in numbers[:2]), 0, blocks)
    mean = lower.planes[0].after_affinity.astype(int) + above.planes[0].low_affinity
    assert both.across_sum.tolist() == [mean.sum()]
    alone = face_contacts(opened[0], opened[1], 2, blocks)
    assert alone.across_sum.tolist() == [2 * right.planes[2].low_affinity.astype(int).sum()]


def test_faces_of_other_grids_are_refused():
    run, other = make_run(GRID), make_run(grid((4, 11, 10), (0, 0, 0), (1, 1, 1)))
    with pytest.raises(InputError, match="different grids"):
        face_contacts(files(run)[0], files(other)[1], 2, GRID)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tables_add_up_in_any_partition(data):
    pair = st.tuples(st.integers(1, 6), st.integers(1, 6)).filter(lambda p: p[0] < p[1])
    row = st.tuples(pair, st.lists(st.integers(0, 2**40), min_size=4, max_size=4))
    given_rows = data.draw(st.lists(row, max_size=25))
    base = 2**63
    tables = [
        ContactTable(
            *(np.array([base + i], np.uint64) for i in pair),
            *(np.array([n], np.int64) for n in (*numbers, 1, 2, 3)),
        )
        for pair, numbers in given_rows
    ]
    expected: dict = {}
    for pair, numbers in given_rows:
        old = expected.get(pair, [0] * 4)
        expected[pair] = [a + b for a, b in zip(old, numbers, strict=True)]
    cut = data.draw(st.integers(0, len(tables)))
    merged = merge_contacts([merge_contacts(tables[cut:]), merge_contacts(tables[:cut])])
    columns = [getattr(merged, name).tolist() for name in COLUMNS]
    got = {(u - base, v - base): list(sums) for u, v, *sums in zip(*columns, strict=True)}
    assert got == expected
    assert merged.size_v.sum() == 3 * merged.overlap.sum() == 3 * len(given_rows)
    assert list(got) == sorted(got)


def test_self_contacts_are_refused():
    one, sums = np.ones(1, np.uint64), np.ones(1, np.int64)
    with pytest.raises(InputError, match="u < v"):
        merge_contacts([ContactTable.across(one, one, sums, sums)])


def test_volume_arguments_are_checked():
    labels = np.ones((2, 3, 4), np.uint64)
    affinities, border = np.ones((3, 2, 3, 4), np.uint8), np.zeros((3, 2, 3, 4), bool)
    with pytest.raises(InputError, match="do not fit together"):
        contacts_from_volume(labels, affinities[:2], border)
    with pytest.raises(InputError, match="need uint64"):
        contacts_from_volume(labels.astype(np.int64), affinities, border)
    with pytest.raises(InputError, match="half units"):
        contacts_from_volume(labels, affinities.astype(np.float32), border)


def test_uint8_affinities_count_double():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (3, 4, 5)).astype(np.uint64)
    affinities = rng.integers(0, 256, (3, 3, 4, 5)).astype(np.uint8)
    border = rng.random(affinities.shape) < 0.5
    single = contacts_from_volume(labels, affinities, border)
    double = contacts_from_volume(labels, 2 * affinities.astype(np.uint16), border)
    assert rows(single) == rows(double)
