"""Classes that must not merge: the class of a fragment, and whole stitches against the oracle."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from agq.blockwise.stitch.classes import ClassCounts, ClassRule, read_classes
from agq.blockwise.stitch.merge.agglomeration import agglomerate, score_contacts
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.stitch.settings import MergeSettings, Thresholds
from agq.blockwise.volumes.content import read_content
from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from tests.helpers.agglomeration import greedy
from tests.helpers.fragments import GRID, make_run, write_run
from tests.helpers.stitch_runs import STEPS, results, segmentation
from tests.helpers.whole_volume import contacts_from_volume

STEP = (45, 10, 9)
"""Voxel size of the classes: no multiple of that of the fragments, nor the other way round."""


def write_classes(container: Path, seed: int, dtype: str = "uint16") -> dict:
    """Write classes over a part of the grid; return how to open them."""
    data = np.random.default_rng(seed).integers(0, 4, (5, 14, 17)).astype(dtype)
    placed = {"voxel_size": STEP, "offset": (90, 6, 18)}
    array = create_array(
        container, "classes", shape=data.shape, chunks=(2, 8, 17), dtype=dtype, **placed
    )
    array[:] = data
    return {"path": str(container), "dataset": "classes"}


def class_of_fragments(fragments: np.ndarray, opened: dict) -> dict[int, int]:
    """Return the class of each fragment, voxel by voxel."""
    volume = open_volume(**opened, kind="labels")
    data = volume.read((0, 0, 0), volume.shape)
    votes: dict[int, Counter] = {}
    for voxel in np.ndindex(fragments.shape):
        centre = [
            o + (i + 0.5) * s for i, o, s in zip(voxel, GRID.offset, GRID.voxel_size, strict=True)
        ]
        place = [int((c - o) // s) for c, o, s in zip(centre, volume.offset, STEP, strict=True)]
        inside = all(0 <= p < n for p, n in zip(place, data.shape, strict=True))
        if fragments[voxel] and inside and data[tuple(place)]:
            votes.setdefault(int(fragments[voxel]), Counter())[int(data[tuple(place)])] += 1
    return {f: min(v, key=lambda c: (-v[c], c)) for f, v in votes.items()}


@pytest.fixture(scope="module")
def noisy():
    return make_run(GRID, seed=5, noise=0.6)


def expected(run, classes, may_merge=()):
    evidence = contacts_from_volume(run.fragments, run.half_units, run.border)
    table = score_contacts(evidence.contacts, Thresholds())
    columns = (table.u, table.v, table.numerator, table.denominator)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    cluster, merges = greedy(evidence.nodes.ids.tolist(), rows, classes, may_merge)
    number = {root: i + 1 for i, root in enumerate(sorted(set(cluster.values())))}
    names = {node: number[root] for node, root in cluster.items()} | {0: 0}
    return np.vectorize(names.__getitem__, otypes=[np.uint64])(run.fragments), len(merges)


@pytest.mark.parametrize("may_merge", [(), ((1, 2),)])
def test_a_stitch_equals_the_oracle_for_any_superblocks(noisy, client, tmp_path, may_merge):
    opened = write_classes(tmp_path / "c.zarr", 3)
    classes = class_of_fragments(noisy.fragments, opened)
    segments, merges = expected(noisy, classes, may_merge)
    assert merges < expected(noisy, {})[1]  # the classes matter
    for superblock in ((1, 1, 1), (2, 2, 2)):
        folder = tmp_path / str(superblock)
        write_run(noisy, folder)
        spec = noisy.spec(
            folder, superblock=superblock, classes=opened, classes_may_merge=may_merge
        )
        report = run_stitch(spec, client)
        assert np.array_equal(segmentation(folder), segments), superblock
        assert (report.classed, report.merges) == (len(classes), merges)
        assert report.several_classes > 0
        evidence = contacts_from_volume(noisy.fragments, noisy.half_units, noisy.border).contacts
        ends = zip(evidence.u.tolist(), evidence.v.tolist(), strict=True)
        pairs = [tuple(sorted((classes.get(u, 0), classes.get(v, 0)))) for u, v in ends]
        apart = [p for p in pairs if p[0] and p[0] != p[1] and p not in may_merge]
        assert report.forbidden_contacts == len(apart) > 0


def test_what_changes_runs_again_and_nothing_else(noisy, client, tmp_path):
    folder = tmp_path / "run"
    write_run(noisy, folder)
    run_stitch(noisy.spec(folder), client)
    without = results(folder)
    keys = {path.name: path.read_bytes() for path in (folder / "stitch").glob("*.json")}
    assert set(keys) == {f"{step}.json" for step in STEPS}

    opened = write_classes(tmp_path / "c.zarr", 3)
    first = run_stitch(noisy.spec(folder, classes=opened), client)
    assert first.reused == ["contacts"]
    apart = results(folder)
    assert apart != without
    table = noisy.spec(folder, classes=opened, classes_may_merge=((2, 3),))
    assert run_stitch(table, client).reused == ["contacts", "classes"]
    # Another file with the same classes is the same; other classes in the same file are not.
    moved = write_classes(tmp_path / "moved.zarr", 3)
    assert run_stitch(noisy.spec(folder, classes=moved), client).reused == ["contacts", "classes"]
    assert results(folder) == apart
    write_classes(tmp_path / "moved.zarr", 4)
    changed = run_stitch(noisy.spec(folder, classes=moved), client)
    assert changed.reused == ["contacts"]
    # A change that the record of the content misses: the counts decide.
    write_classes(tmp_path / "moved.zarr", 3)
    shutil.rmtree(folder / "classes")
    record = read_content(open_volume(**moved, kind="labels"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agq.blockwise.stitch.run.read_content", lambda volume: record)
        assert run_stitch(noisy.spec(folder, classes=moved), client).reused == ["contacts"]
        assert results(folder) == apart
        write_classes(tmp_path / "moved.zarr", 4)
        assert "pyramid" in run_stitch(noisy.spec(folder, classes=moved), client).reused
        shutil.rmtree(folder / "classes")
        assert run_stitch(noisy.spec(folder, classes=moved), client).reused == ["contacts"]
    assert results(folder) != apart
    # Without classes all is as it was, to the keys of the steps.
    run_stitch(noisy.spec(folder), client)
    assert results(folder) == without
    assert {name: (folder / "stitch" / name).read_bytes() for name in keys} == keys
    margin = run_stitch(noisy.spec(folder, classes=opened, margin=0.1), client)
    cut = results(folder)
    lower = noisy.spec(folder, classes=opened, margin=0.02)
    assert run_stitch(lower, client).merges > margin.merges
    assert (
        "agglomerate" in run_stitch(noisy.spec(folder, classes=opened, margin=0.1), client).reused
    )
    assert results(folder) == cut


def test_the_class_of_a_fragment():
    rows = [(5, 1, 4, 10), (5, 3, 4, 10), (7, 2, 1, 100), (9, 1, 3, 10), (9, 2, 6, 10)]
    counts = ClassCounts(
        *(
            np.array(column, dtype)
            for column, dtype in zip(zip(*rows, strict=True), "QQqq", strict=True)
        )
    )
    rule = ClassRule(0, ())
    kinds = rule.kinds(counts)
    assert kinds.ids.tolist() == [5, 7, 9]
    assert kinds.values.tolist() == [1, 2, 2]  # of 5, the smaller of equals
    assert rule.several(counts) == 2
    assert ClassRule(0, ((1, 3),)).several(counts) == 1
    most = ClassRule(0.4, ())
    assert most.kinds(counts).ids.tolist() == [9]
    assert most.several(counts) == 0
    one = np.array([1], np.uint64)
    exactly = ClassCounts(one, one, np.array([57]), np.array([100]))
    assert not len(ClassRule(0.57, ()).kinds(exactly).ids)  # 0.57 * 100 is below 57 as a float
    ids = np.array([5, 6, 7, 9], np.uint64)
    assert kinds.allow(ids[[0, 0, 0, 2]], ids[[1, 2, 3, 3]]).tolist() == [True, False, False, True]


def test_agglomeration_in_memory_keeps_classes_apart(noisy, tmp_path):
    opened = write_classes(tmp_path / "c.zarr", 3)
    classes = class_of_fragments(noisy.fragments, opened)
    evidence = contacts_from_volume(noisy.fragments, noisy.half_units, noisy.border)
    ones = np.ones(len(classes), np.int64)
    known = np.array(sorted(classes.items()), np.uint64)
    kinds = ClassRule(0, ()).kinds(ClassCounts(known[:, 0], known[:, 1], ones, ones))
    found = agglomerate(evidence.nodes.ids, evidence.contacts, Thresholds(), kinds)
    assert len(found.merges) == expected(noisy, classes)[1]


def test_classes_that_cannot_be_used(noisy, client, tmp_path):
    def one(name, value, dtype="int64", **placed):
        array = create_array(
            tmp_path / name, "a", shape=(2, 2, 2), chunks=(2, 2, 2), dtype=dtype,
            **{"voxel_size": (90, 90, 90), **placed},
        )  # fmt: skip
        array[:] = value
        return {"path": str(tmp_path / name), "dataset": "a"}

    def read(**opened):
        return read_classes(open_volume(**opened, kind="labels"), GRID, (0, 0, 0), (1, 1, 1))

    assert read(**one("largest", 2**63 - 1)) == 2**63 - 1
    with pytest.raises(InputError, match="class -3 is below 0"):
        read(**one("negative", -3))
    with pytest.raises(InputError, match="is not below 2"):
        read(**one("too-large", 2**63, "uint64"))
    write_run(noisy, tmp_path / "run")
    far = one("far", 1, offset=(10**6, 0, 0))
    with pytest.raises(InputError, match="does not touch the volume"):
        run_stitch(noisy.spec(tmp_path / "run", classes=far), client)
    with pytest.raises(ValidationError, match="names more than 63 classes"):
        MergeSettings(classes_may_merge=tuple((i, i + 1) for i in range(1, 64)))
    assert MergeSettings(classes_may_merge=tuple((i, i + 1) for i in range(1, 63)))
