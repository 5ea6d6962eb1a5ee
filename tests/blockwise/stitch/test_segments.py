"""From contacts on disk to segment ids, by superblocks: against the greedy reference."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.blocks.grid import LOCAL_BITS
from agq.blockwise.stitch.merge.agglomeration import Merge
from agq.blockwise.stitch.output.relabel import BlockLut
from agq.blockwise.stitch.segments import (
    Cut,
    Map,
    Resolve,
    SortSegments,
    WriteSegments,
    plan_ranges,
)
from agq.blockwise.stitch.settings import Thresholds
from agq.blockwise.stitch.superblocks import groups, leaf_shape
from tests.helpers.agglomeration import block_graphs, greedy
from tests.helpers.stitch_leaves import write_leaves


def segments_of(files, levels, margin, min_size, segment_ids):
    run_dir = files.run_dir
    for level in levels:
        Cut(level, run_dir, margin).run()
    for level in reversed(levels):
        leaves = Resolve(level, run_dir, min_size).run()
    ranges = plan_ranges(leaves)
    SortSegments(ranges, run_dir).run()
    count = sum(leaf.count for leaf in leaves)
    report = {
        "segments": count,
        "small_segments": sum(leaf.small for leaf in leaves),
        "small_voxels": sum(leaf.small_voxels for leaf in leaves),
        **WriteSegments([r for r, _ in ranges], run_dir, segment_ids, count).run(),
    }
    Map(levels[0], run_dir, segment_ids).run()
    named = {}
    for leaf, blocks in levels[0]:
        lut = BlockLut.open(files.map(leaf))
        for number in blocks:
            for label, segment in enumerate(lut.block(number).tolist(), 1):
                named[(number << LOCAL_BITS) | label] = segment
    return named, report, pq.read_table(files.segments).to_pydict()


@settings(max_examples=20, deadline=None)
@given(
    case=block_graphs(),
    margin=st.integers(0, 30),
    min_size=st.integers(0, 12),
    segment_ids=st.sampled_from(["consecutive", "fragment"]),
    size=st.integers(1, 9),
)
def test_ids_equal_the_reference(tmp_path_factory, case, margin, min_size, segment_ids, size):
    shape, leaf, nodes, rows = case
    run_dir = tmp_path_factory.mktemp("run")
    sizes = {n: 1 + (n * size) % 7 for n in nodes}
    rows = [r for r in rows if abs(r[2]) <= 255 * r[3]]
    files, levels = write_leaves(run_dir, shape, leaf, nodes, sizes, rows)
    for level in levels:
        Merge(level, run_dir, Thresholds(across=0.5)).run()
    # As if the thresholds had been higher from the start.
    cluster, _ = greedy(nodes, [(u, v, n - margin * d, d) for u, v, n, d in rows])
    named, report, table = segments_of(files, levels, margin, min_size, segment_ids)

    voxels: dict[int, int] = {}
    members: dict[int, list[int]] = {}
    for node, smallest in cluster.items():
        voxels[smallest] = voxels.get(smallest, 0) + sizes[node]
        members.setdefault(smallest, []).append(node)
    kept = sorted(s for s in voxels if voxels[s] >= min_size)
    ids = {s: i if segment_ids == "consecutive" else s for i, s in enumerate(kept, 1)}
    assert {n: named.pop(n) for n in nodes} == {n: ids.get(cluster[n], 0) for n in nodes}
    assert not any(named.values())
    assert table["segment"] == [ids[s] for s in kept]
    assert table["smallest_fragment"] == kept == np.load(files.smallest).tolist()
    assert table["voxels"] == [voxels[s] for s in kept]
    assert table["fragments"] == [len(members[s]) for s in kept]
    for name, modulus in (("z", 97), ("y", 89), ("x", 83)):
        assert table[f"begin_{name}"] == [min(n % modulus for n in members[s]) for s in kept]
        assert table[f"end_{name}"] == [max(n % modulus for n in members[s]) + 2 for s in kept]
    assert report["segments"] == len(kept)
    assert report["small_segments"] == len(voxels) - len(kept)
    assert report["small_voxels"] == sum(voxels.values()) - sum(voxels[s] for s in kept)
    order = sorted(kept, key=lambda s: (-voxels[s], ids[s]))[:10]
    assert report["largest"] == [
        {"id": ids[s], "voxels": voxels[s], "fragments": len(members[s])} for s in order
    ]


def test_tasks_share_work_and_leaves_keep_workers_busy():
    weights = np.array([5, 1, 1, 9, 1, 1, 1, 1])
    parts = groups(weights, 4)
    assert [i for part in parts for i in range(8)[part]] == list(range(8))
    assert 3 <= len(parts) <= 5
    assert len(groups(np.ones(1000, np.int64), 7)) in (7, 8)
    assert groups(np.zeros(0, np.int64), 4) == []
    assert leaf_shape((8, 8, 8), 512, 2, 512) == (4, 4, 4)
    assert leaf_shape((100, 100, 100), 10**6, 2, 512) == (8, 8, 8)
    assert leaf_shape((1, 40, 3), 120, 1, 512) == (1, 4, 4)


@pytest.mark.parametrize("rows", [10, 70_000])
def test_row_groups_do_not_depend_on_layers(tmp_path, rows):
    """The same bytes, whether the segments come in one layer of superblocks or in many."""
    found = []
    for leaf in ((1, 1, 1), (4, 1, 1)):
        nodes = [(b << LOCAL_BITS) | (i + 1) for b in range(4) for i in range(rows // 4)]
        sizes = dict.fromkeys(nodes, 3)
        files, levels = write_leaves(tmp_path / str(leaf), (4, 1, 1), leaf, nodes, sizes, [])
        for level in levels:
            Merge(level, files.run_dir, Thresholds(across=0.5)).run()
        _, report, _ = segments_of(files, levels, 0, 0, "consecutive")
        assert report["segments"] == len(nodes)
        found.append((files.segments.read_bytes(), files.smallest.read_bytes()))
    assert found[0] == found[1]
