"""Ids that stay over stitches, against sets of fragments."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.stitch import kept_ids
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.stitch.workers import DaskWorkers
from tests.helpers.fragments import make_run, write_run
from tests.helpers.stitch_runs import results, segmentation


@pytest.fixture(scope="module")
def noisy():
    grid = BlockGrid((8, 22, 20), (30, 6, 6), (4, 12, 10), after=(1, 1, 1))
    return make_run(grid, seed=5, noise=0.6)


@pytest.fixture(scope="module")
def largest(noisy):
    """Fragments, the largest first."""
    ids, sizes = np.unique(noisy.fragments[noisy.fragments > 0], return_counts=True)
    return ids[np.argsort(-sizes, kind="stable")].tolist()


def names_of(run, run_dir) -> dict[int, int]:
    """Return fragment -> segment id."""
    pairs = np.stack((run.fragments, segmentation(run_dir)))[:, run.fragments > 0]
    return dict(np.unique(pairs, axis=1).T.tolist())


def sets(names) -> dict[int, frozenset[int]]:
    members: dict[int, set[int]] = {}
    for fragment, segment in names.items():
        members.setdefault(segment, set()).add(fragment)
    return {segment: frozenset(found) for segment, found in members.items()}


def check(run, run_dir, before, most, report):
    """Compare ids and tables with sets of fragments; return the ids, and the largest ever given."""
    after = names_of(run, run_dir)
    old = {found: segment for segment, found in sets(before).items() if segment}
    new = {segment: found for segment, found in sets(after).items() if segment}
    kept = {segment for segment, found in new.items() if old.get(found) == segment}
    assert kept == {old[found] for found in new.values() if found in old}
    fresh = sorted(set(new) - kept, key=lambda segment: min(new[segment]))
    assert fresh == list(range(most + 1, most + 1 + len(fresh)))
    assert (report.ids["kept"], report.ids["new"]) == (len(kept), len(fresh))
    expected: dict[tuple[int, int], list[int]] = {}
    for fragment, segment in after.items():
        if segment != before[fragment]:
            row = expected.setdefault((before[fragment], segment), [0, 0])
            row[0] += 1
            row[1] += int((run.fragments == fragment).sum())
    rows = pq.read_table(run_dir / "lut" / "changed_ids.parquet").to_pylist()
    found = [(r["before"], r["after"], r["fragments"], r["voxels"]) for r in rows]
    assert found == [(*pair, *expected[pair]) for pair in sorted(expected)]
    shown = {entry["before"] for entry in report.ids["changed"]}
    assert shown <= {pair[0] for pair in expected}
    assert len(shown) == min(5, len({pair[0] for pair in expected}))
    table = pq.read_table(run_dir / "lut" / "segments.parquet").to_pydict()
    assert set(table["segment"]) == set(new)
    for segment, smallest in zip(table["segment"], table["smallest_fragment"], strict=True):
        assert min(new[segment]) == smallest
    return after, most + len(fresh)


@pytest.mark.parametrize("first", ["consecutive", "fragment"])
def test_segments_of_the_same_fragments_keep_their_ids(noisy, largest, client, tmp_path, first):
    made = []
    for superblock in ((1, 1, 1), (2, 1, 2))[: 2 if first == "consecutive" else 1]:
        folder = tmp_path / str(superblock)
        write_run(noisy, folder)
        spec = noisy.spec(folder, superblock=superblock, segment_ids=first, levels=1)
        run_stitch(spec, client)
        names = names_of(noisy, folder)
        most = max(names.values())
        edits = tmp_path / "edits.csv"
        rows = [f"merge,{largest[0]},{largest[1]}", f"merge,{largest[2]},{largest[5]}"]
        # Ids that go for good are not given again: that of the largest id becomes background.
        steps = [{"edits": edits}, {"edits": edits, "min_size": 30}, {}]
        for options in steps:
            edits.write_text("\n".join(["kind,a,b", *rows]))
            rows = rows[:1]
            options |= {"superblock": superblock, "segment_ids": "keep", "levels": 1}
            report = run_stitch(noisy.spec(folder, **options), client)
            names, most = check(noisy, folder, names, most, report)
        assert not (folder / "lut" / "changed").exists()
        again = run_stitch(noisy.spec(folder, **options), client)
        assert again.reused == list(again.seconds)
        assert again.ids == report.ids
        assert report.ids["most"] == most
        made.append(results(folder) | {"changed": changed(folder)})
    assert made[0] == made[-1]


def changed(folder):
    return (folder / "lut" / "changed_ids.parquet").read_bytes()


def test_a_first_stitch_numbers_from_1(noisy, client, tmp_path):
    for name, ids in (("plain", "consecutive"), ("kept", "keep")):
        write_run(noisy, tmp_path / name)
        report = run_stitch(noisy.spec(tmp_path / name, segment_ids=ids), client)
    plain, kept = (segmentation(tmp_path / name) for name in ("plain", "kept"))
    assert np.array_equal(plain, kept)
    assert report.ids == {"kept": 0, "new": report.segments, "most": report.segments}
    # What follows is not moved aside for a plain stitch, which numbers anew.
    run_stitch(noisy.spec(tmp_path / "kept", margin=0.05), client)
    run_stitch(noisy.spec(tmp_path / "plain", margin=0.05), client)
    assert results(tmp_path / "plain") == results(tmp_path / "kept")


def test_a_stitch_cut_off_ends_in_the_same(noisy, client, tmp_path, monkeypatch):
    move = kept_ids.Before.move

    def stop(*arguments):
        raise KeyboardInterrupt

    def moved(*arguments):
        move(*arguments)
        stop()

    places = {
        "undisturbed": None,
        "record written": (kept_ids.Step, "forget", stop),
        "forgotten": (kept_ids.Path, "rename", stop),
        "moved": (kept_ids.Before, "move", moved),
        "half done": (DaskWorkers, "run", stop),
    }
    made = {}
    write_run(noisy, tmp_path / "first")
    run_stitch(noisy.spec(tmp_path / "first", levels=1), client)
    for place, patched in places.items():
        folder = tmp_path / place
        shutil.copytree(tmp_path / "first", folder)
        spec = noisy.spec(folder, margin=0.05, segment_ids="keep", levels=1)
        with monkeypatch.context() as patch:
            if patched is not None:
                patch.setattr(*patched)
                with pytest.raises(KeyboardInterrupt):
                    run_stitch(spec, client)
        report = run_stitch(spec, client)
        assert report.ids["kept"] > 0 < report.ids["new"]
        made[place] = results(folder) | {"changed": changed(folder)}
    assert all(files == made["undisturbed"] for files in made.values())


def test_no_id_is_kept_when_blocks_are_others(noisy, client, tmp_path):
    folder, notes = tmp_path / "run", []
    write_run(noisy, folder)
    first = run_stitch(noisy.spec(folder, stop=(4, 22, 20)), client)
    spec = noisy.spec(folder, segment_ids="keep")
    report = run_stitch(spec, client, on_note=notes.append)
    assert any("no id is kept" in note for note in notes)
    assert report.ids == {
        "kept": 0,
        "new": report.segments,
        "most": first.segments + report.segments,
    }
    ids = np.load(folder / "lut" / "ids.npy")
    assert ids.tolist() == list(range(first.segments + 1, first.segments + 1 + report.segments))
    assert np.array_equal(np.unique(segmentation(folder))[1:], ids)
