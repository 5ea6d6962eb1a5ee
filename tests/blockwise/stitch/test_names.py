"""One name is one fragment, wherever its voxels lie: any grid of import, any superblocks."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.blocks.grid import LOCAL_BITS
from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.contacts import PARTS, read_evidence
from agq.blockwise.stitch.import_fragments import import_fragments
from agq.blockwise.stitch.merge.agglomeration import Merge, agglomerate
from agq.blockwise.stitch.names import FindShared, ListNames, leaf_names, ranges_of
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.stitch.segments import Cut, Resolve, SortSegments, WriteSegments, plan_ranges
from agq.blockwise.stitch.settings import DaskSettings, Thresholds
from agq.blockwise.stitch.superblocks import Superblock
from agq.blockwise.storage.arrays import load_arrays
from agq.errors import InputError
from tests.helpers.agglomeration import block_graphs, greedy
from tests.helpers.foreign import make_spec, open_arrays, put
from tests.helpers.stitch_leaves import write_leaves
from tests.helpers.stitch_runs import segmentation
from tests.helpers.whole_volume import contacts_from_volume


@pytest.fixture(scope="module")
def client():
    with dask_client(DaskSettings(workers=2), processes=False) as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def unsynced():
    """Thousands of small files; that they reach the disk is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@st.composite
def named_graphs(draw):
    """Graphs of pieces, of which any may have the same name but for those of one block."""
    shape, leaf, nodes, rows = draw(block_graphs())
    few = draw(st.integers(1, 12))
    names, taken = {}, set()
    for node in nodes:
        block = node >> LOCAL_BITS
        free = [n for n in range(1, few + 1) if (block, n) not in taken]
        name = draw(st.sampled_from(free)) if free and draw(st.booleans()) else 100 + len(names)
        # Names of any size, in an order that is not that of the pieces.
        names[node] = (name * 0x9E3779B97F4A7C15) % 2**64 or 1
        taken.add((block, name))
    return shape, leaf, nodes, rows, names


def add_names(files, levels, names):
    """Add the names of pieces to the evidence of leaves, as :func:`contacts.collect` does."""
    for leaf, _ in levels[0]:
        path = files.evidence(leaf)
        arrays = dict(load_arrays(path))
        of = np.vectorize(names.__getitem__, otypes=[np.uint64])
        arrays["names"] = of(arrays["nodes.ids"]) if len(arrays["nodes.ids"]) else np.zeros(0, "u8")
        for part in PARTS:
            u, v = (arrays[f"{part}.{end}"] for end in "uv")
            pairs = np.zeros((0, 2), np.uint64)
            if len(u):
                pairs = np.sort(np.stack((of(u), of(v)), axis=1), axis=1)
            apart = pairs[:, 0] != pairs[:, 1]
            for name in [name for name in arrays if name.startswith(f"{part}.")]:
                arrays[name] = arrays[name][apart]
            arrays[f"{part}.names"] = pairs[apart]
        path.unlink()
        files.save(path, arrays)


@settings(max_examples=8, deadline=None)
@given(named_graphs(), st.integers(0, 30), st.integers(1, 5))
def test_any_cut_of_names_equals_the_greedy_reference(tmp_path_factory, case, margin, most):
    shape, leaf, nodes, rows, names = case
    run_dir = tmp_path_factory.mktemp("run")
    sizes = {n: 1 + n % 7 for n in nodes}
    rows = [r for r in rows if abs(r[2]) <= 255 * r[3]]
    files, levels = write_leaves(run_dir, shape, leaf, nodes, sizes, rows)
    add_names(files, levels, names)
    lists = ListNames(levels[0], run_dir).run()
    assert sum(count for count, _ in lists) == sum(
        len(np.unique(load_arrays(files.evidence(p), "names")["names"])) for p, _ in levels[0]
    )
    # Few names are in few ranges; here every name helps to choose them.
    every = [np.array([name], np.uint64) for name in sorted(set(names.values()))]
    ranges = ranges_of(every, len(every), most)
    assert (ranges[0][1], ranges[-1][2]) == (0, 2**64 - 1)
    assert all(a[2] + 1 == b[1] for a, b in itertools.pairwise(ranges))
    assert len(ranges) >= len(every) // most
    assert FindShared(ranges, run_dir).run() == len(every)
    for level in levels:
        Merge(level, run_dir, Thresholds(across=0.5)).run()
    for level in levels:
        Cut(level, run_dir, margin).run()
    for level in reversed(levels):
        leaves = Resolve(level, run_dir, 0).run()
    plan = plan_ranges(leaves)
    SortSegments(plan, run_dir).run()
    count = sum(one.count for one in leaves)
    WriteSegments([r for r, _ in plan], run_dir, "fragment", count).run()

    whole = [(*sorted((names[u], names[v])), n - margin * d, d) for u, v, n, d in rows]
    cluster, _ = greedy(set(names.values()), [row for row in whole if row[0] != row[1]])
    assert np.load(files.smallest).tolist() == sorted(set(cluster.values()))
    for place, _ in levels[0]:
        ids = load_arrays(files.evidence(place), "nodes.ids")["nodes.ids"].tolist()
        segment = load_arrays(files.final(place), "segment")["segment"].tolist()
        assert segment == [cluster[names[n]] for n in ids]
    assert sum(one.small for one in leaves) == 0


def scattered(rng, shape, names):
    """Fragments of which many lie in several places, some of them single voxels."""
    cells = rng.choice(names, [-(-n // 3) for n in shape])
    fragments = np.kron(cells, np.ones((3, 3, 3), np.int64))[tuple(slice(0, n) for n in shape)]
    fragments = np.where(rng.random(shape) < 0.1, 0, fragments)
    return np.where(rng.random(shape) < 0.05, rng.choice(names, shape), fragments).astype(np.uint64)


@settings(max_examples=1, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_grid_of_the_import_does_not_matter(tmp_path_factory, client, seed):
    check_grids(tmp_path_factory, client, seed)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_grid_of_the_import_does_not_matter_at_length(tmp_path_factory, client, seed):
    check_grids(tmp_path_factory, client, seed)


def check_grids(tmp_path_factory, client, seed):
    """Segmentation, ids and classes are those of the whole volume, with all its ties."""
    folder = tmp_path_factory.mktemp("import")
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(5, 12, 3))
    fragments = scattered(rng, shape, rng.choice(2**50, 25, replace=False) + 1)
    affinities = rng.choice([100, 120, 128, 140, 160], (3, *shape)).astype(np.uint8)
    classes = np.kron(rng.integers(0, 4, (3, 3, 3)), np.ones((4, 4, 4), np.int64))
    classes = classes[tuple(slice(0, n) for n in shape)].astype(np.uint8)
    arrays = (("fragments", fragments), ("affinities", affinities), ("classes", classes))
    for name, data in arrays:
        put(folder / "in", name, data, 3, voxel_size=[30, 6, 6], offset=[0, 0, 0])
    evidence = contacts_from_volume(fragments, affinities, np.zeros(affinities.shape, bool))
    thresholds = Thresholds(across=0.5, within=0.5)
    opened = {"path": str(folder / "in"), "dataset": "classes"}
    for with_classes in (False, True):
        expected = None
        for n in range(3):
            block = tuple(int(n) for n in rng.integers(1, 13, 3)) if n else shape
            superblock = tuple(int(n) for n in rng.integers(1, 4, 3))
            out = folder / f"{n}{with_classes}"
            source = open_arrays(f"{folder / 'in'}::fragments", f"{folder / 'in'}::affinities")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("agq.blockwise.stitch.import_fragments.BLOCK", block)
                grid = import_fragments(source, out, client)
            options = {"classes": opened} if with_classes else {}
            spec = make_spec(
                out, grid, across=0.5, within=0.5, superblock=superblock, levels=1, **options
            )
            report = run_stitch(spec, client)
            found = (
                segmentation(out),
                report.fragments,
                report.segments,
                report.merges,
                report.classed,
            )
            if expected is None:
                expected = found
                if not with_classes:
                    result = agglomerate(evidence.nodes.ids, evidence.contacts, thresholds)
                    ids = np.append(np.uint64(0), np.unique(result.representatives))
                    names = dict(
                        zip(result.ids.tolist(), result.representatives.tolist(), strict=True)
                    )
                    whole = np.vectorize((names | {0: 0}).__getitem__, otypes=[np.uint64])(
                        fragments
                    )
                    assert np.array_equal(ids[found[0].astype(np.int64)], whole)
                    assert report.merges == len(result.merges)
            assert np.array_equal(found[0], expected[0]), (block, superblock)
            assert found[1:] == expected[1:]
            assert report.fragments == len(evidence.nodes)
            # In memory, as sweeps do it.
            stored = read_evidence(out)
            if not with_classes:
                again = agglomerate(
                    stored.nodes.ids, stored.contacts, thresholds, names=stored.names
                )
                assert len(np.unique(again.representatives)) == report.segments
        if with_classes:
            assert report.classed > 0 < report.forbidden_contacts


def test_voxels_that_touch_at_an_edge_of_blocks_are_one_fragment(tmp_path, client):
    """(0, 0, 255) and (0, 1, 256) lie in two blocks, and share no face."""
    fragments = np.zeros((20, 300, 600), np.uint64)
    for voxel, name in (
        ((0, 0, 255), 7), ((0, 1, 256), 7), ((0, 8, 100), 9), ((19, 299, 599), 9),
    ):  # fmt: skip
        fragments[voxel] = name
    put(tmp_path / "in", "fragments", fragments, 3)
    put(tmp_path / "in", "affinities", np.zeros((3, *fragments.shape), np.uint8), 3)
    names = (f"{tmp_path / 'in'}::{name}" for name in ("fragments", "affinities"))
    grid = import_fragments(open_arrays(*names, voxel_size=(30, 6, 6)), tmp_path / "out", client)
    for superblock in ((1, 1, 1), (2, 2, 4)):
        report = run_stitch(make_spec(tmp_path / "out", grid, superblock=superblock), client)
        assert (report.fragments, report.segments, report.merges) == (2, 2, 0)
        found = segmentation(tmp_path / "out")
        assert np.array_equal(found, (fragments == 7) + 2 * (fragments == 9).astype(np.uint64))


def test_a_name_waits_for_the_smallest_superblock_that_holds_it(tmp_path):
    nodes = [(b << LOCAL_BITS) | 1 for b in range(8)]
    files, levels = write_leaves(
        tmp_path / "r", (1, 1, 8), (1, 1, 1), nodes, dict.fromkeys(nodes, 3), []
    )
    add_names(files, levels, dict(zip(nodes, (5, 5, 6, 7, 6, 9, 7, 8), strict=True)))
    ListNames(levels[0], tmp_path / "r").run()
    assert FindShared([(0, 0, 6), (1, 7, 2**64 - 1)], tmp_path / "r").run() == 5
    found = {}
    for i in range(8):
        shared = leaf_names(files, Superblock(0, (0, 0, i)))
        columns = (shared.name, shared.levels, shared.homes, shared.sizes)
        found[i] = list(zip(*(column.tolist() for column in columns), strict=True))
    assert found == {
        0: [(5, 1, 1, 6)], 1: [(5, 1, 0, 6)], 2: [(6, 3, 1, 6)], 3: [(7, 3, 1, 6)],
        4: [(6, 3, 0, 6)], 5: [], 6: [(7, 3, 0, 6)], 7: [],
    }  # fmt: skip


def test_edits_are_for_whole_fragments(tmp_path, client):
    """A piece, wherever it lies, stands for its fragment; together with others, in any order."""
    fragments = np.zeros((4, 4, 24), np.uint64)
    fragments[0, 0, ::4] = (5, 6, 7, 5, 6, 7)
    classes = (fragments == 7).astype(np.uint8)
    placed = {"voxel_size": [10, 10, 10], "offset": [0, 0, 0]}
    for name, data in (("fragments", fragments), ("classes", classes)):
        put(tmp_path / "in", name, data, 3, **placed)
    put(tmp_path / "in", "affinities", np.zeros((3, *fragments.shape), np.uint8), 3, **placed)
    arrays = [f"{tmp_path / 'in'}::{name}" for name in ("fragments", "affinities")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agq.blockwise.stitch.import_fragments.BLOCK", (4, 4, 4))
        grid = import_fragments(open_arrays(*arrays), tmp_path / "out", client)
    edits = tmp_path / "edits.csv"

    def stitched(rows, superblock, **options):
        # Voxels of x = 0, 4, 8, ... at their middles.
        ends = (f"{kind},5 5 {40 * a + 5},5 5 {40 * b + 5}\n" for kind, a, b in rows)
        edits.write_text("kind,a,b\n" + "".join(ends))
        out = tmp_path / "out"
        run_stitch(make_spec(out, grid, superblock=superblock, edits=edits, **options), client)
        return segmentation(out)[0, 0, ::4].tolist()

    for superblock in ((1, 1, 1), (1, 1, 2)):
        assert stitched([("merge", 0, 4)], superblock) == [1, 1, 2, 1, 1, 2]
        assert stitched([("merge", 3, 1), ("merge", 2, 4)], superblock) == [1] * 6
        assert stitched([("split", 0, 2), ("merge", 5, 1)], superblock) == [1, 2, 2, 1, 2, 2]
        with pytest.raises(InputError, match="both ends of the split lie in fragment"):
            stitched([("split", 0, 3)], superblock)
        with pytest.raises(InputError, match="contradicts the merges that join them"):
            stitched([("merge", 0, 1), ("split", 3, 4)], superblock)
    opened = {"path": str(tmp_path / "in"), "dataset": "classes"}
    assert stitched([("merge", 0, 5)], (1, 1, 1), classes=opened) == [1, 2, 1, 1, 2, 1]
