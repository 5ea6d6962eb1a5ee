"""The hierarchy against the plain greedy reference: any superblocks, any order of tasks."""

import itertools
import math
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.blocks.grid import LOCAL_BITS
from agq.blockwise.stitch.classes import ClassCounts, ClassRule
from agq.blockwise.stitch.contacts import ContactTable, merge_contacts
from agq.blockwise.stitch.edits import Edit, constrain
from agq.blockwise.stitch.merge.agglomeration import (
    SAME,
    Graph,
    MergeTable,
    ScoreTable,
    contract,
    join,
)
from agq.blockwise.stitch.superblocks import Superblock, SuperblockTree
from agq.errors import InputError
from tests.helpers.agglomeration import SCORES, block_graphs, greedy, greedy_pooled


def score_table(rows) -> ScoreTable:
    u, v, numerator, denominator = (
        (list(column) for column in zip(*rows, strict=True)) if rows else ([],) * 4
    )
    return ScoreTable(
        np.array(u, np.uint64),
        np.array(v, np.uint64),
        np.array(numerator, np.int64),
        np.array(denominator, np.int64),
    )


def leaf_graphs(grid_shape, leaf_shape, nodes, rows, kinds=None, edits=None):
    """Cut a graph of fragments into leaves, as the stitch does from its contacts."""
    tree = SuperblockTree(grid_shape, leaf_shape)

    def leaf_of(node):
        place = np.unravel_index(node >> LOCAL_BITS, grid_shape)
        z, y, x = (int(p) // n for p, n in zip(place, leaf_shape, strict=True))
        return Superblock(0, (z, y, x))

    own = {leaf: ([], [], ([], [], []), ([], [], [])) for leaf in map(leaf_of, nodes)}
    for node in nodes:
        own[leaf_of(node)][0].append(node)
    for row in rows:
        lower, upper = leaf_of(row[0]), leaf_of(row[1])
        if lower == upper:
            own[lower][1].append(row)
            continue
        axis = next(d for d in range(3) if lower.index[d] != upper.index[d])
        own[lower][2][axis].append(row)
        own[upper][3][axis].append(row)
    graphs = {}
    for leaf, (members, inner, above, below) in own.items():
        ids = np.array(sorted(members), np.uint64)
        graphs[leaf] = Graph.of_fragments(
            ids,
            score_table(inner),
            [score_table(face) for face in above],
            [score_table(face) for face in below],
            **({} if kinds is None else {"kinds": kinds.of(ids)}),
            edits=edits,
        )
    return tree, graphs


def hierarchical(grid_shape, leaf_shape, nodes, rows, shuffle=None, kinds=None, edits=None):
    """Agglomerate level by level; return node -> smallest of its cluster, and all merges."""
    tree, entering = leaf_graphs(grid_shape, leaf_shape, nodes, rows, kinds, edits)
    bars = np.zeros(0, np.uint64) if kinds is None else kinds.bars
    merges: list[MergeTable] = []
    leaves = tree.leaves(np.unique([node >> LOCAL_BITS for node in nodes]).astype(np.int64))
    assert set(leaves.places()) == set(entering)
    levels = [{leaf: [] for leaf in entering}, *map(dict, tree.levels(leaves))]
    residual: dict = {}
    sizes = []
    for level in levels:
        order = list(level)
        if shuffle is not None:
            shuffle(order)
        above = {}
        for superblock in order:
            children = level[superblock]
            graph = join([(c, residual[c]) for c in children]) if children else entering[superblock]
            made, above[superblock] = contract(graph, bars, edits)
            merges.append(made)
        residual = above
        sizes.append(sum(len(graph.nodes) for graph in residual.values()))
    assert sizes[-1] == 0  # the root hands nothing up
    cluster = {node: node for node in nodes}

    def find(node):
        while cluster[node] != node:
            node = cluster[node]
        return node

    listed = []
    for table in merges:
        for u, v, n, d in zip(
            table.u.tolist(),
            table.v.tolist(),
            table.numerator.tolist(),
            table.denominator.tolist(),
            strict=True,
        ):
            assert find(u) == u < v == find(v)
            cluster[v] = u
            listed.append((u, v, n, d))
    return {node: find(node) for node in nodes}, listed


def check(grid_shape, leaf_shape, nodes, rows, shuffle=None):
    expected, order = greedy(nodes, rows)
    found, merges = hierarchical(grid_shape, leaf_shape, nodes, rows, shuffle)
    assert found == expected
    assert sorted(merges) == sorted(order)


@settings(max_examples=100, deadline=None)
@given(block_graphs(), st.randoms(use_true_random=False))
def test_any_hierarchy_and_order_equals_the_greedy_reference(case, random):
    check(*case, random.shuffle)


@pytest.mark.slow
@settings(max_examples=2_000, deadline=None)
@given(block_graphs(), st.randoms(use_true_random=False))
def test_any_hierarchy_equals_the_greedy_reference_at_length(case, random):
    check(*case, random.shuffle)


@st.composite
def classed_graphs(draw):
    """Graphs whose fragments have classes, and pairs of classes that may merge all the same."""
    shape, leaf, nodes, rows = draw(block_graphs())
    some = st.sampled_from([0, 0, 1, 2, 3, 4, 2**40])
    classes = draw(st.lists(some, min_size=len(nodes), max_size=len(nodes)))
    pairs = st.sampled_from([(1, 2), (2, 3), (1, 3), (4, 3), (9, 1)])
    return shape, leaf, nodes, rows, dict(zip(nodes, classes, strict=True)), draw(st.sets(pairs))


def kinds_of(nodes, classes, may_merge):
    ids = np.array(sorted(nodes), np.uint64)
    ones = np.ones(len(ids), np.int64)
    known = np.array([classes[n] for n in ids.tolist()], np.uint64)
    counts = ClassCounts(ids, known, ones, ones).take(known > 0)
    return ClassRule(0, tuple(may_merge)).kinds(counts)


def check_classes(case, random):
    shape, leaf, nodes, rows, classes, may_merge = case
    kinds = kinds_of(nodes, classes, may_merge)
    expected, order = greedy(nodes, rows, classes, may_merge)
    # Contacts that may not merge are left out of the leaves, or found out on the way.
    if random.random() < 0.5:
        u, v = (np.array([row[end] for row in rows], np.uint64) for end in (0, 1))
        rows = [row for row, allowed in zip(rows, kinds.allow(u, v), strict=True) if allowed]
    found, merges = hierarchical(shape, leaf, nodes, rows, random.shuffle, kinds)
    assert found == expected
    assert sorted(merges) == sorted(order)


@settings(max_examples=150, deadline=None)
@given(classed_graphs(), st.randoms(use_true_random=False))
def test_classes_never_merge_in_any_hierarchy_and_order(case, random):
    check_classes(case, random)


@pytest.mark.slow
@settings(max_examples=3_000, deadline=None)
@given(classed_graphs(), st.randoms(use_true_random=False))
def test_classes_never_merge_in_any_hierarchy_at_length(case, random):
    check_classes(case, random)


@st.composite
def edited_graphs(draw):
    """Graphs with classes, and pairs of fragments that must be together or apart."""
    shape, leaf, nodes, rows, classes, may_merge = draw(classed_graphs())
    if draw(st.booleans()):
        classes = dict.fromkeys(classes, 0)
    if len(nodes) < 2:
        return shape, leaf, nodes, rows, classes, may_merge, [], []
    pair = st.lists(st.sampled_from(nodes), min_size=2, max_size=2, unique=True)
    return shape, leaf, nodes, rows, classes, may_merge, *draw(possible_edits(pair, classes))


@st.composite
def possible_edits(draw, pair, classes):
    """Pairs that do not contradict each other, nor the classes."""
    group = {node: frozenset([node]) for node in classes}
    together, apart = [], []
    for merges, (u, v) in draw(st.lists(st.tuples(st.booleans(), pair), max_size=12)):
        both = group[u] | group[v]
        rivals = any({p, q} <= both for p, q in apart)
        if merges and not rivals and len({classes[n] for n in both} - {0}) < 2:
            group |= dict.fromkeys(both, both)
            together.append((u, v))
        elif not merges and group[u] != group[v]:
            apart.append((u, v))
    return together, apart


def check_edits(case, random):
    shape, leaf, nodes, rows, classes, may_merge, together, apart = case
    edits = [Edit(i, True, pair, pair) for i, pair in enumerate(together)]
    edits += [Edit(i, False, pair, pair) for i, pair in enumerate(apart)]
    constraints = constrain(Path("edits.csv"), edits)
    random.shuffle(edits)
    assert constrain(Path("edits.csv"), edits).key == constraints.key
    kinds = kinds_of(nodes, classes, may_merge)
    expected, order = greedy(nodes, rows, classes, may_merge, together, apart)
    found, merges = hierarchical(shape, leaf, nodes, rows, random.shuffle, kinds, constraints)
    assert found == expected
    assert sorted(m for m in merges if m[2:] != (SAME, 1)) == sorted(order)


@settings(max_examples=300, deadline=None)
@given(edited_graphs(), st.randoms(use_true_random=False))
def test_edits_hold_in_any_hierarchy_and_order(case, random):
    check_edits(case, random)


@pytest.mark.slow
@settings(max_examples=3_000, deadline=None)
@given(edited_graphs(), st.randoms(use_true_random=False))
def test_edits_hold_in_any_hierarchy_at_length(case, random):
    check_edits(case, random)


def test_a_chain_joins_the_class_that_it_likes_best():
    """1 - 0 - 0 - 2: the weakest link of the chain is cut, through fragments of no class."""
    nodes = [(b << LOCAL_BITS) | 1 for b in range(4)]
    classes = dict(zip(nodes, (1, 0, 0, 2), strict=True))
    for scores in itertools.permutations((10, 20, 30)):
        rows = [(nodes[i], nodes[i + 1], score, 1) for i, score in enumerate(scores)]
        cluster, _ = greedy(nodes, rows, classes)
        cut = scores.index(10)
        assert [cluster[n] for n in nodes] == [nodes[0 if i <= cut else cut + 1] for i in range(4)]
        for may_merge in ((), ((1, 2),)):
            everything = ((4, 1, 1), (1, 1, 1))
            for leaf in everything:
                case = ((4, 1, 1), leaf, nodes, rows, classes, may_merge)
                check_classes(case, random.Random(0))


def large_graph(seed: int, shape=(3, 4, 5), most: int = 12, scores=SCORES):
    """Thousands of edges: chains of positive contacts through the blocks, vetoes inside."""
    rng = np.random.default_rng(seed)
    nodes = {
        place: [
            (int(np.ravel_multi_index(place, shape)) << LOCAL_BITS) | (i + 1)
            for i in range(rng.integers(0, most + 1))
        ]
        for place in np.ndindex(shape)
    }
    rows = []
    for place, own in nodes.items():
        for u, v in itertools.combinations(own, 2):
            if rng.random() < 0.3:
                count = int(rng.integers(1, 4))
                rows.append((u, v, int(rng.choice([-250, -20, -1, 0])) * count, count))
        for axis in range(3):
            other = nodes.get(tuple(p + (d == axis) for d, p in enumerate(place)), [])
            for u, v in itertools.product(own, other):
                if rng.random() < 0.25:
                    count = int(rng.integers(1, 4))
                    rows.append((u, v, int(rng.choice(scores)) * count, count))
    return [n for own in nodes.values() for n in own], rows


def whole(nodes, rows):
    ids = np.array(sorted(nodes), np.uint64)
    made, rest = contract(Graph.of_fragments(ids, score_table(rows)))
    assert len(rest.nodes) == len(rest.edges) == 0
    columns = (made.u, made.v, made.numerator, made.denominator)
    return sorted(zip(*(c.tolist() for c in columns), strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_large_graphs(seed):
    """One part of thousands of edges equals the reference (slow), all hierarchies equal that."""
    shape = (3, 4, 5)
    nodes, rows = large_graph(seed)
    assert len(rows) > 1500
    merges = whole(nodes, rows)
    if seed == 0:
        few, their = large_graph(seed, (2, 2, 3), 8)
        assert whole(few, their) == sorted(greedy(few, their)[1])
    rng = np.random.default_rng(seed)
    for leaf in ((1, 1, 1), (2, 2, 2), (1, 3, 2), (3, 4, 5), (2, 1, 5)):
        assert sorted(hierarchical(shape, leaf, nodes, rows, rng.shuffle)[1]) == merges, leaf


@st.composite
def large_block_graphs(draw):
    """Graphs of up to thousands of edges with few distinct scores, isolated and parallel ones."""
    shape = draw(st.tuples(*[st.integers(1, 4)] * 3))
    seed, most = draw(st.integers(0, 2**32 - 1)), draw(st.integers(4, 14))
    scores = draw(st.lists(st.sampled_from(SCORES), min_size=1, max_size=4))
    nodes, rows = large_graph(seed, shape, most, scores)
    # Parallel edges: contacts that came in parts, which add up before anything merges.
    rng = np.random.default_rng(seed)
    parts = [rows[i] for i in np.flatnonzero(rng.random(len(rows)) < 0.1)]
    return shape, draw(st.tuples(*[st.integers(1, 4)] * 3)), nodes, rows, parts


def check_large(case, shuffle):
    shape, leaf, nodes, rows, parts = case
    together = merged_rows([*rows, *parts])
    expected = greedy_pooled(nodes, [*rows, *parts])
    cluster, merges = hierarchical(shape, leaf, nodes, together, shuffle)
    assert cluster == expected[0]
    assert sorted(merges) == sorted(expected[1])
    # Isolated nodes stay what they are.
    touched = {n for u, v, *_ in together for n in (u, v)}
    assert all(cluster[n] == n for n in nodes if n not in touched)


def merged_rows(rows):
    """Add rows of one pair up, through the table of contacts that the stitch uses."""
    if not rows:
        return []
    u, v, numerator, denominator = (np.array(column, object) for column in zip(*rows, strict=True))
    count = denominator.astype(np.int64)
    table = merge_contacts(
        [
            ContactTable.across(
                u[part].astype(np.uint64),
                v[part].astype(np.uint64),
                numerator[part].astype(np.int64),
                count[part],
            )
            for part in (slice(None, None, 2), slice(1, None, 2))
        ]
    )
    columns = (table.u, table.v, table.across_sum, table.across_count)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@settings(max_examples=8, deadline=None)
@given(large_block_graphs(), st.randoms(use_true_random=False))
def test_large_graphs_equal_the_greedy_reference(case, random):
    check_large(case, random.shuffle)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=150, deadline=None)
@given(large_block_graphs(), st.randoms(use_true_random=False))
def test_large_graphs_equal_the_greedy_reference_at_length(case, random):
    check_large(case, random.shuffle)


@settings(max_examples=50, deadline=None)
@given(block_graphs())
def test_both_references_agree(case):
    _, _, nodes, rows = case
    assert greedy(nodes, rows) == greedy_pooled(nodes, rows)


def test_superblocks_hand_up_less_than_they_get():
    """Touching fragments outside holds a node back only while the best edge may lead there."""
    shape, leaf = (8, 8, 8), (4, 4, 4)
    rng = np.random.default_rng(0)
    nodes = [(b << LOCAL_BITS) | 1 for b in range(512)]
    rows = []
    for place in np.ndindex(shape):
        for axis in range(3):
            other = tuple(p + (d == axis) for d, p in enumerate(place))
            if max(other) < 8:
                u, v = (
                    int(np.ravel_multi_index(p, shape)) << LOCAL_BITS | 1 for p in (place, other)
                )
                rows.append((u, v, int(rng.integers(1, 500)), 1))
    tree, graphs = leaf_graphs(shape, leaf, nodes, rows)
    assert tree.depth == 2
    assert len(graphs) == 8
    for graph in graphs.values():
        merges, rest = contract(graph)
        assert len(rest.nodes) == len(graph.nodes) - len(merges) < 0.75 * len(graph.nodes)
        outside = np.concatenate([graph.nodes[face.node] for face in (*graph.upper, *graph.lower)])
        assert np.isin(outside, rest.nodes, invert=True).any()


def test_tree_of_uneven_grids():
    tree = SuperblockTree((5, 1, 9), (2, 2, 2))
    leaves = tree.leaves(np.array([0, 8, 17, 44]))
    assert [(leaf.index, blocks.tolist()) for leaf, blocks in leaves] == [
        ((0, 0, 0), [0]),
        ((0, 0, 4), [8, 17]),
        ((2, 0, 4), [44]),
    ]
    levels = tree.levels(leaves)
    assert tree.depth == 4 == len(levels) + 1
    assert list(levels[-1].places()) == [Superblock(3, (0, 0, 0))]
    assert levels[0].sizes.sum() == 3
    none = tree.leaves(np.zeros(0, np.int64))
    assert [list(level) for level in (none, *tree.levels(none))] == [[]] * 4


@st.composite
def _cut_grids(draw):
    grid = draw(st.tuples(*[st.integers(1, 7)] * 3))
    leaf = draw(st.tuples(*[st.integers(1, 9)] * 3))
    blocks = draw(st.sets(st.integers(0, math.prod(grid) - 1)))
    return grid, leaf, np.array(sorted(blocks), np.int64)


@settings(max_examples=100, deadline=None)
@given(_cut_grids(), st.integers(0, 20), st.integers(0, 20))
def test_families_hold_each_block_and_each_child_once(case, first, last):
    grid, leaf, blocks = case
    tree = SuperblockTree(grid, leaf)
    expected: dict = {}
    for number in blocks.tolist():
        place = zip(np.unravel_index(number, grid), leaf, strict=True)
        expected.setdefault(Superblock(0, tuple(int(i) // n for i, n in place)), []).append(number)
    leaves = tree.leaves(blocks)
    for level in (leaves, *tree.levels(leaves)):
        found = {superblock: list(members) for superblock, members in level}
        assert list(found.items()) == sorted(expected.items())
        assert list(level.places()) == list(found)
        assert level.sizes.tolist() == [len(members) for members in found.values()]
        part = pickle.loads(pickle.dumps(level[first:last]))
        assert list(part.places()) == list(found)[first:last] == list(level.holding(part).places())
        expected = {}
        for superblock in found:
            expected.setdefault(superblock.parent, []).append(superblock)
    assert not blocks.size or list(found) == [Superblock(tree.depth - 1, (0, 0, 0))]


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_beyond_64_bits_are_refused(sign):
    """Of edges that may merge here, and of those that only go up."""
    u, v = np.array([1, 1], np.uint64), np.array([2, 2], np.uint64)
    large = ScoreTable(u, v, np.full(2, sign * 2**62), np.ones(2, np.int64))
    outside = np.array([8, 9], np.uint64)
    face = ScoreTable(np.array([1, 2], np.uint64), outside, *np.ones((2, 2), np.int64))
    none = ScoreTable(*np.zeros((2, 0), np.uint64), *np.zeros((2, 0), np.int64))
    ids = np.array([1, 2], np.uint64)
    graph = Graph.of_fragments(ids, large, [face, none, none], [none, none, none])
    with pytest.raises(InputError, match="do not fit in 64 bits"):
        contract(graph)


def test_more_edges_than_a_process_holds_are_refused_with_what_helps(monkeypatch):
    monkeypatch.setattr("agq.blockwise.stitch.merge.agglomeration.MAX_EDGES", 1)
    nodes = np.array([1, 2, 3], np.uint64)
    graph = Graph.of_fragments(nodes, score_table([(1, 2, 1, 1), (2, 3, 1, 1)]))
    with pytest.raises(InputError, match=r"have 2 edges, and one process takes 1; .*min_contact"):
        contract(graph)
