"""The agglomeration against a plain greedy reference, waterz and the published results."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.stitch.contacts import ContactTable, merge_contacts
from agq.blockwise.stitch.merge.agglomeration import MergeTable, agglomerate, scores
from agq.blockwise.stitch.merge.kernel import compare_fractions
from agq.blockwise.stitch.settings import Thresholds
from agq.errors import InputError
from tests.helpers.agglomeration import greedy

COLUMNS = ("u", "v", "across_sum", "across_count", "within_sum", "within_count")


def table(rows) -> ContactTable:
    columns = np.array(rows, dtype=object).reshape(-1, 6).T
    types = [np.uint64, np.uint64, *[np.int64] * 4]
    none = np.zeros(columns.shape[1], np.int64)
    return ContactTable(
        *(c.astype(t) for c, t in zip(columns, types, strict=True)), none, none, none
    )


def check_against_reference(nodes, rows, thresholds):
    contacts = table(rows)
    if thresholds.contact_weight == "sqrt":  # a contact is weighed whole
        contacts = merge_contacts([contacts])
    numerators, denominators = scores(contacts, thresholds)
    plain = [
        (int(u), int(v), int(n), int(d))
        for u, v, n, d in zip(contacts.u, contacts.v, numerators, denominators, strict=True)
    ]
    cluster, merges = greedy(nodes, plain)
    result = agglomerate(np.array(sorted(nodes), np.uint64), contacts, thresholds)
    assert dict(zip(result.ids.tolist(), result.representatives.tolist(), strict=True)) == cluster
    assert merge_rows(result.merges) == merges
    order = [Fraction(n, d) for _, _, n, d in merges]
    assert order == sorted(order, reverse=True)
    return result


def merge_rows(merges: MergeTable) -> list:
    columns = (merges.u, merges.v, merges.numerator, merges.denominator)
    return list(zip(*(c.tolist() for c in columns), strict=True))


@st.composite
def graphs(draw):
    """Graphs in which ties are the rule: few affinities, few counts, parallel edges."""
    n = draw(st.integers(1, 14))
    base = draw(st.sampled_from([1, 2**21 + 1, 2**63 + 5]))
    nodes = [base + 3 * i for i in range(n)]
    pair = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda p: p[0] < p[1])
    affinity = st.sampled_from([0, 200, 357, 358, 400, 510])
    count = st.sampled_from([1, 1, 2, 3, 6])
    row = st.tuples(pair, affinity, count, st.sampled_from([300, 500, 510]), st.integers(0, 1))
    drawn = draw(st.lists(row, max_size=40)) if n > 1 else []
    rows = [
        (nodes[i], nodes[j], a * c, c, w * wc, wc) for (i, j), a, c, w, wc in drawn if c + wc > 0
    ]
    return nodes, rows


RULES = [
    Thresholds(),
    Thresholds(across=0.5, within=0.9),
    Thresholds(across=0, within=0),
    Thresholds(across=0.5, within=0.9, contact_weight="sqrt"),
]


@settings(max_examples=400, deadline=None)
@given(graphs(), st.sampled_from(RULES))
def test_equals_the_greedy_reference(graph, thresholds):
    check_against_reference(*graph, thresholds)


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_greedy_reference_on_larger_graphs(seed):
    rng = np.random.default_rng(seed)
    n = 70
    nodes = sorted(int(x) for x in rng.choice(2**40, n, replace=False) + 1)
    rows = []
    for _ in range(400):
        i, j = sorted(rng.choice(n, 2, replace=False))
        count = int(rng.integers(1, 5))
        affinity = int(rng.choice([340, 357, 360, 420, 480, 510]))
        within = int(rng.integers(0, 5) == 0)
        rows.append((nodes[i], nodes[j], affinity * count, count, 480 * within, within))
    result = check_against_reference(nodes, rows, Thresholds())
    assert 0 < len(result.merges) < n


@pytest.mark.parametrize("seed", range(5))
def test_large_sums_are_compared_exactly(seed):
    """Sums as over 10^12 voxels, scores that differ by less than a float can tell."""
    rng = np.random.default_rng(seed)
    n, count = 12, 10**12
    rows = []
    for _ in range(40):
        i, j = sorted(rng.choice(n, 2, replace=False))
        own = count + int(rng.integers(0, 3))
        rows.append((i + 1, j + 1, 400 * own + int(rng.integers(0, 3)), own, 0, 0))
    check_against_reference(range(1, n + 1), rows, Thresholds())


@settings(max_examples=500, deadline=None)
@given(
    *[st.one_of(st.integers(1, 50), st.integers(2**31 - 3, 2**31 + 3), st.integers(1, 2**62))] * 4
)
def test_compare_fractions(n1, d1, n2, d2):
    difference = Fraction(n1, d1) - Fraction(n2, d2)
    assert compare_fractions(n1, d1, n2, d2) == (difference > 0) - (difference < 0)
    assert compare_fractions(n1, d1, n1, d1) == 0


def test_order_of_rows_changes_nothing():
    rng = np.random.default_rng(3)
    rows = [
        (*sorted((rng.choice(40, 2, replace=False) + 1).tolist()), 400 * c, c, 0, 0)
        for c in rng.integers(1, 3, 120).tolist()
    ]
    ids = np.arange(1, 41, dtype=np.uint64)
    first = agglomerate(ids, table(rows), Thresholds())
    for _ in range(10):
        rng.shuffle(rows)
        other = agglomerate(rng.permutation(ids), table(rows), Thresholds())
        assert np.array_equal(first.representatives, other.representatives)
        assert merge_rows(first.merges) == merge_rows(other.merges)


def test_published_rule():
    """Labels of one block never merge directly; inside a block affinities veto, strictly."""
    assert Thresholds().units == 510
    assert Thresholds().in_units[:2] == (357, 510)
    ids = np.array([1, 2, 3], np.uint64)

    def segments(*rows):
        return len(set(agglomerate(ids, table(rows), Thresholds()).representatives.tolist()))

    assert segments((1, 2, 0, 0, 510, 1)) == 3
    assert segments((1, 2, 357 * 4, 4, 0, 0)) == 3  # exactly at the threshold: strict
    assert segments((1, 2, 357 * 4 + 1, 4, 0, 0)) == 2
    # nb (ab - 0.7) > ni (1 - ai): 10 * 0.1 against 5 * 0.2, once equal and once one unit above.
    join = (1, 2, 510 * 5, 5, 0, 0)
    assert segments(join, (1, 3, 408 * 10, 10, 0, 0), (2, 3, 0, 0, 408 * 5, 5)) == 2
    assert segments(join, (1, 3, 408 * 10 + 1, 10, 0, 0), (2, 3, 0, 0, 408 * 5, 5)) == 1


def decimals(low: int = 0, high: int = 10**6):
    return st.one_of(
        st.sampled_from([0.0, 0.35, 0.7, 0.75, 0.999999]),
        st.integers(low, high).map(lambda n: n / 10**6),
    )


@settings(max_examples=200, deadline=None)
@given(graphs(), decimals(), decimals(), decimals(0, 500000), decimals(0, 300000))
def test_thresholds_are_the_decimals_written(graph, across, within, margin, more):
    """Every mean against the decimal text of a threshold, in fractions; and a cut at any margin."""
    nodes, rows = graph
    written = [Fraction(str(value)) for value in (across, within, margin)]
    plain = [
        (u, v, Fraction(a, 510) - written[0] * n + Fraction(w, 510) - written[1] * m, n + m)
        for u, v, a, n, w, m in rows
    ]
    rule = Thresholds(across=across, within=within, margin=margin)
    floor = [(u, v, score - written[2] * weight, weight) for u, v, score, weight in plain]
    result = check_against_reference(nodes, rows, rule)
    got = dict(zip(result.ids.tolist(), result.representatives.tolist(), strict=True))
    expected, merges = greedy(nodes, floor)
    assert got == expected
    scored = [(u, v, Fraction(n, d * rule.units)) for u, v, n, d in merge_rows(result.merges)]
    assert scored == [(u, v, Fraction(n) / d) for u, v, n, d in merges]
    raised = Fraction(str(more))
    kept = result.merges.above(raised * rule.units)
    assert len(kept) == sum(score > raised for *_, score in scored)


@pytest.mark.parametrize("threshold", ["0.75", "0.35", "0.1", "0.123456", "1"])
def test_a_mean_of_exactly_the_threshold_does_not_merge(threshold):
    count = 10**6
    at = Fraction(threshold) * 510 * count
    assert at.denominator == 1
    for kind, rule in {"across": {"within": 1.0}, "within": {"across": 1.0}}.items():
        for more, merged in ((0, 0), (1, 1)):
            row = (
                (int(at) + more, count, 0, 0) if kind == "across" else (0, 0, int(at) + more, count)
            )
            if int(at) + more > 510 * count:
                continue
            rule = rule | {kind: float(threshold)}
            result = agglomerate(
                np.array([1, 2], np.uint64), table([(1, 2, *row)]), Thresholds(**rule)
            )
            assert len(result.merges) == merged, (kind, more)


def test_isolated_nodes_and_empty_graphs():
    ids = np.array([7, 5], np.uint64)
    result = agglomerate(ids, ContactTable.empty(), Thresholds())
    assert result.ids.tolist() == result.representatives.tolist() == [5, 7]
    nothing = agglomerate(np.zeros(0, np.uint64), ContactTable.empty(), Thresholds())
    assert len(nothing.ids) == len(nothing.merges) == 0


def test_bad_graphs_are_refused():
    ids = np.array([1, 2], np.uint64)
    with pytest.raises(InputError, match="fragment 9 is not among"):
        agglomerate(ids, table([(1, 9, 1, 1, 0, 0)]), Thresholds())
    with pytest.raises(InputError, match="u < v"):
        agglomerate(ids, table([(2, 2, 1, 1, 0, 0)]), Thresholds())
    with pytest.raises(InputError, match="distinct"):
        agglomerate(np.array([1, 1], np.uint64), ContactTable.empty(), Thresholds())
    with pytest.raises(InputError, match="distinct"):
        agglomerate(np.array([0, 1], np.uint64), ContactTable.empty(), Thresholds())
    with pytest.raises(ValueError, match=r"across\n.*less than or equal to 1"):
        Thresholds(across=1.5)
    with pytest.raises(InputError, match="64 bits"):
        agglomerate(ids, table([(1, 2, 2**62 + 2**61, 1, 0, 0)]), Thresholds())
    pairs = [(1, 2, 400 * 10**12, 10**12, 0, 0)]
    assert len(agglomerate(ids, table(pairs), Thresholds(across=0.75)).merges) == 1
    with pytest.raises(InputError, match="64 bits; thresholds and margins of fewer decimals"):
        agglomerate(ids, table(pairs), Thresholds(across=0.123456))
