"""Overlap evidence and margins."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agq.blockwise.stitch.contacts import ContactTable, face_contacts, read_evidence
from agq.blockwise.stitch.merge.agglomeration import agglomerate, scores
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.stitch.settings import Thresholds
from agq.errors import InputError
from tests.helpers.contacts import OVERLAP, files, from_sidecars, grid, rows
from tests.helpers.fragments import GRID, make_run, same_partition, write_run
from tests.helpers.stitch_runs import expected_segments, results, segmentation


def plain_overlap(run, lower, upper, axis):
    """Count u & v, u and v on the planes that both blocks labelled, voxel by voxel."""
    below, above = run.sidecars[lower].planes[axis], run.sidecars[upper].planes[axis]
    both, us, vs = Counter(), Counter(), Counter()
    for one, other in (
        (below.after_labels, above.low_labels),
        (below.high_labels, above.before_labels),
    ):
        if one is None or other is None:
            continue
        for a, b in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True):
            us[a] += 1
            vs[b] += 1
            both[a, b] += 1
    known = [set(run.sidecars[n].nodes.tolist()) for n in (lower, upper)]
    pairs = {(a, b) for a, b in both if a in known[0] and b in known[1]}
    pairs |= {
        (a, b)
        for a, b in zip(
            below.high_labels.ravel().tolist(), above.low_labels.ravel().tolist(), strict=True
        )
        if a and b
    }
    return {(a, b): (both[a, b], us[a], vs[b]) for a, b in pairs}


@pytest.mark.parametrize(
    "context", [((0, 0, 0), (1, 1, 1)), ((2, 1, 1), (0, 0, 0)), ((1, 1, 1), (2, 2, 2))]
)
@pytest.mark.parametrize("scrambled", [0, 60])
def test_overlap_equals_a_plain_count(context, scrambled):
    blocks = grid((4, 12, 10), *context)
    run = make_run(blocks, seed=6, scrambled=scrambled)
    opened, seen = files(run), 0
    for lower in range(blocks.n_blocks):
        for axis in range(3):
            upper = blocks.neighbor(lower, axis)
            if upper is None:
                continue
            table = face_contacts(opened[lower], opened[upper], axis, blocks, overlap=True)
            columns = [getattr(table, name).tolist() for name in OVERLAP]
            pairs = zip((table.u & 0x1FFFFF).tolist(), (table.v & 0x1FFFFF).tolist(), strict=True)
            got = dict(zip(pairs, zip(*columns, strict=True), strict=True))
            assert got == plain_overlap(run, lower, upper, axis)
            plain = face_contacts(opened[lower], opened[upper], axis, blocks)
            touching = table.across_count > 0
            assert np.array_equal(table.across_sum[touching], plain.across_sum)
            assert np.array_equal(table.u[touching], plain.u)
            seen += int((~touching).sum())
    assert (
        seen > 1000 if scrambled else seen == 0
    )  # labels that meet only in the overlap have rows too
    whole = from_sidecars(run, overlap=True)
    assert rows(
        from_sidecars(run, [range(9), range(9, blocks.n_blocks)], overlap=True), OVERLAP
    ) == rows(whole, OVERLAP)


def one(across=(0, 0), within=(0, 0), overlap=(0, 0, 0)) -> ContactTable:
    columns = [np.array([n], np.int64) for n in (*across, *within, *overlap)]
    return ContactTable(np.ones(1, np.uint64), np.full(1, 2, np.uint64), *columns)


def score(contact: ContactTable, **rule) -> tuple[int, int]:
    numerator, denominator = scores(contact, Thresholds(**rule))
    return int(numerator[0]), int(denominator[0])


def test_what_each_kind_of_evidence_counts():
    touching = one(across=(450 * 8, 8), overlap=(3, 4, 5))  # 3 of 6 voxels agree
    assert score(touching) == ((450 - 357) * 8, 8)
    assert score(touching, evidence="overlap", overlap=0.4) == (510 * 3 - 204 * 6, 6)
    assert score(touching, evidence="both", overlap=0.5) == ((450 - 357) * 8, 8)  # not below
    assert score(touching, evidence="overlap", overlap=0.5) == (0, 6)  # must exceed
    veto = score(touching, evidence="both", overlap=0.500001)
    assert Fraction(*veto) / Thresholds(overlap=0.500001).units == Fraction(450 - 510, 510)
    inside = one(within=(400 * 5, 5))
    for kind in ("affinity", "overlap", "both"):
        assert score(inside, evidence=kind) == ((400 - 510) * 5, 5)
    apart = one(overlap=(2, 3, 2))
    assert score(apart, evidence="overlap")[1] == 3
    assert score(apart) == score(apart, evidence="both") == (0, 0)  # no edge


def test_small_contacts_are_left_out_before_merging():
    small, large = one(across=(500 * 3, 3)), one(across=(500 * 4, 4))
    assert score(small, min_contact=4) == (0, 0)
    assert score(large, min_contact=4)[0] > 0
    assert score(one(within=(0, 1)), min_contact=4) == (-510, 1)  # inside blocks all count


@given(
    count=st.one_of(st.integers(1, 300), st.integers(1, 2**28)),
    share=st.integers(0, 510),
    off=st.integers(-3, 3),
    across=st.sampled_from([0.0, 0.5, 0.7, 0.123457]),
    margin=st.sampled_from([0.0, 0.1, -0.25]),
)
def test_a_square_root_weighs_less_and_decides_the_same(count, share, off, across, margin):
    total = min(max(share * count + off, 0), 510 * count)
    rule = Thresholds(across=across, margin=margin)
    plain = score(one(across=(total, count)), across=across, margin=margin)
    top, weight = score(
        one(across=(total, count)), across=across, margin=margin, contact_weight="sqrt"
    )
    assert weight == math.isqrt(4096 * count)
    assert (top > 0) == (plain[0] > 0)
    mean = Fraction(*plain) + int(Fraction(f"{margin:.6f}") * rule.units)
    assert 0 <= top + int(Fraction(f"{margin:.6f}") * rule.units) * weight - mean * weight < 1


def test_margins_move_all_thresholds():
    contact = one(across=(450 * 8, 8), within=(300, 1))
    n, d = score(contact)
    assert score(contact, margin=0.1) == (n - 51 * d, d)
    assert score(contact, margin=-0.25) == (2 * n + 255 * d, d)  # in 1/1020
    with pytest.raises(ValueError, match="margin"):
        Thresholds(margin=1.5)
    with pytest.raises(ValueError, match="min_contact"):
        Thresholds(min_contact=-1)


@pytest.mark.parametrize(
    "rule",
    [
        {"evidence": "overlap", "overlap": 0.3},
        {"evidence": "both"},
        {"min_contact": 6},
        {"contact_weight": "sqrt"},
    ],
)
@pytest.mark.parametrize("scrambled", [0, 60])
def test_stitched_by_other_evidence(tmp_path, client, rule, scrambled):
    if scrambled:  # then few labels overlap by much
        rule = rule | {"overlap": 0.05, "within": 0.2, "min_contact": 0}
    run = make_run(GRID, seed=5, scrambled=scrambled)
    write_run(run, tmp_path)
    report = run_stitch(run.spec(tmp_path, **rule), client)
    evidence = from_sidecars(run, overlap="evidence" in rule)
    result = agglomerate(evidence.nodes.ids, evidence.contacts, Thresholds(**rule))
    names = dict(zip(result.ids.tolist(), result.representatives.tolist(), strict=True)) | {0: 0}
    expected = np.vectorize(names.__getitem__, otypes=[np.uint64])(run.fragments)
    assert same_partition(segmentation(tmp_path), expected)
    assert 0 < report.merges == len(result.merges)
    if "evidence" in rule:
        stored = read_evidence(tmp_path)
        assert rows(stored, OVERLAP) == rows(evidence, OVERLAP)


def test_overlap_needs_blocks_that_overlap(tmp_path, client):
    run = make_run(grid((4, 12, 10), (0, 0, 0), (1, 0, 1)), seed=5)
    write_run(run, tmp_path)
    with pytest.raises(InputError, match=r"no context on y .*use affinity"):
        run_stitch(run.spec(tmp_path, evidence="both"), client)


def test_a_larger_margin_cuts_the_stored_merges(tmp_path, client):
    run = make_run(GRID, seed=5, noise=0.6)
    write_run(run, tmp_path)
    first = run_stitch(run.spec(tmp_path, margin_floor=-0.1), client)
    assert np.array_equal(segmentation(tmp_path), expected_segments(run))
    counts = {0.0: first.segments}
    notes: list[str] = []
    for margin in (0.1, -0.05):
        report = run_stitch(run.spec(tmp_path, margin=margin), client, on_note=notes.append)
        assert "cut again" in notes.pop()
        assert report.reused == ["contacts", "agglomerate"], margin
        expected = expected_segments(run, Thresholds(margin=margin))
        assert np.array_equal(segmentation(tmp_path), expected)
        counts[margin] = report.segments
    assert sorted(counts, key=counts.__getitem__) == sorted(counts)
    assert len(set(counts.values())) == 3
    lower = run_stitch(run.spec(tmp_path, margin=-0.2), client, on_note=notes.append)
    assert "margin below that of the stored merges" in notes.pop()
    assert lower.reused == ["contacts"]
    assert np.array_equal(segmentation(tmp_path), expected_segments(run, Thresholds(margin=-0.2)))


@pytest.mark.parametrize(
    ("margin", "weight"), [(0.1, "voxels"), (0.123457, "voxels"), (0.123457, "sqrt")]
)
def test_a_cut_has_the_bytes_of_a_run_from_the_start(tmp_path, client, margin, weight):
    """Also with a rule of which one part moves: overlaps, small contacts, ids and sizes."""
    run = make_run(GRID, seed=5, noise=0.6)
    rule = {"evidence": "both", "overlap": 0.3, "min_contact": 3, "min_size": 6}
    rule |= {"contact_weight": weight}
    for name in ("later", "start"):
        write_run(run, tmp_path / name)
    run_stitch(run.spec(tmp_path / "later", **rule), client)
    run_stitch(run.spec(tmp_path / "later", **rule, margin=margin), client)
    run_stitch(run.spec(tmp_path / "start", **rule, margin=margin), client)
    assert results(tmp_path / "later") == results(tmp_path / "start")


@pytest.mark.parametrize(
    "change",
    [{"across": 0.6}, {"within": 0.9}, {"min_contact": 4}, {"contact_weight": "sqrt"}],
    ids=lambda c: next(iter(c)),
)
def test_one_threshold_alone_merges_again_from_the_contacts(tmp_path, client, change):
    run = make_run(GRID, seed=5, noise=0.6)
    write_run(run, tmp_path)
    run_stitch(run.spec(tmp_path), client)
    for sidecar in (tmp_path / "sidecars").rglob("*.agq?"):
        sidecar.unlink()  # contacts are stored: neither voxels nor sidecars are read again
    notes: list[str] = []
    report = run_stitch(run.spec(tmp_path, **change), client, on_note=notes.append)
    assert report.reused == ["contacts"]
    (note,) = notes
    assert "merging again, from the stored contacts" in note
    assert np.array_equal(segmentation(tmp_path), expected_segments(run, Thresholds(**change)))
