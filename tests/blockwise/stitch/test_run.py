"""The whole stitch: against whole arrays, any batches and workers, resumed, and refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.packs import sidecar_path
from agq.blockwise.journal.reader import Journal, compact
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.snapshot import SnapshotError
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.stitch import run as stitch
from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.output.pyramid import Pyramid
from agq.blockwise.stitch.run import StitchSpec, run_stitch
from agq.blockwise.stitch.settings import DaskSettings, Thresholds
from agq.blockwise.stitch.steps import Step
from agq.blockwise.stitch.workers import StitchError
from agq.blockwise.storage.files import file_checksum
from agq.blockwise.storage.shards import ChunkFiles
from agq.blockwise.verify.check import verify
from agq.blockwise.volumes.create import chunk_box, chunk_file, open_array, write_chunk
from agq.errors import InputError, RunGoneError
from agq.pipeline.stitched import version_of
from tests.helpers.fragments import GRID, Run, box, make_run, same_partition, write_run
from tests.helpers.stitch_runs import (
    STEPS,
    expected_segments,
    open_cluster,
    results,
    segmentation,
)


def test_equals_the_whole_volume(run, run_dir, client):
    seen: dict[str, list] = {}
    report = run_stitch(
        run.spec(run_dir),
        client,
        lambda step, done, total: seen.setdefault(step, []).append((done, total)),
    )
    segments = segmentation(run_dir)
    assert np.array_equal(segments, expected_segments(run))
    ids, voxels = np.unique(segments[segments > 0], return_counts=True)
    assert report.segments == len(ids) == ids.max()
    assert report.fragments == len(np.unique(run.fragments[run.fragments > 0]))
    assert report.merges == report.fragments - report.segments > 0
    assert report.blocks == GRID.n_blocks
    assert (report.skipped, report.missing, report.small_segments) == (0, 0, 0)
    largest = [(entry["voxels"], entry["id"]) for entry in report.largest]
    order = sorted(zip(voxels.tolist(), ids.tolist(), strict=True), key=lambda e: (-e[0], e[1]))
    assert largest == order[:10]
    assert list(report.seconds) == STEPS
    assert report.reused == []
    assert set(seen) >= {"contacts", "agglomerate 1/3", "lut down 3/3", "relabel", "pyramid s1"}
    for counts in seen.values():
        assert counts == sorted(counts)
        assert counts[-1][0] == counts[-1][1]
    assert report.levels == len(list((run_dir / "data.zarr" / "segmentation").glob("s*")))
    journal = Journal(run_dir / "journal" / "relabel")
    assert journal.counts()["done"] == GRID.n_blocks


@pytest.mark.parametrize(
    "blocks",
    [
        BlockGrid(volume_shape=(4, 9, 8), voxel_size=(30, 6, 6), write_shape=(16, 16, 16)),
        BlockGrid(volume_shape=(13, 20, 7), voxel_size=(30, 6, 6), write_shape=(3, 9, 7)),
        BlockGrid(
            volume_shape=(5, 9, 40), voxel_size=(8, 8, 8), write_shape=(5, 4, 9), before=(1, 1, 1)
        ),
    ],
    ids=["one-block", "5x3x1", "1x3x5"],
)
def test_other_grids(blocks, tmp_path, client):
    run = make_run(blocks, seed=8)
    write_run(run, tmp_path)
    run_stitch(run.spec(tmp_path), client)
    assert np.array_equal(segmentation(tmp_path), expected_segments(run))


def test_label_through_every_block_and_background_blocks(tmp_path, client):
    truth = np.zeros(GRID.volume_shape, np.uint32)
    truth[:, :24] = 1
    run = make_run(GRID, truth=truth)
    empty = [n for n, sidecar in run.sidecars.items() if not len(sidecar.nodes)]
    assert len(empty) == 9
    write_run(run, tmp_path)
    report = run_stitch(run.spec(tmp_path), client)
    assert np.array_equal(segmentation(tmp_path), truth)
    assert (report.segments, report.fragments, report.merges) == (1, 18, 17)


def test_nothing_but_background(tmp_path, client):
    run = make_run(GRID, truth=np.zeros(GRID.volume_shape, np.uint32))
    write_run(run, tmp_path)
    report = run_stitch(run.spec(tmp_path), client)
    assert report.segments == report.fragments == 0
    assert not segmentation(tmp_path).any()


def test_skipped_blocks_are_background(tmp_path, client):
    run = make_run(GRID, seed=6, absent=(0, 13, 14))
    write_run(run, tmp_path)
    report = run_stitch(run.spec(tmp_path), client)
    assert np.array_equal(segmentation(tmp_path), expected_segments(run))
    assert (report.blocks, report.skipped) == (GRID.n_blocks - 3, 3)
    array = open_array(tmp_path / "data.zarr", "segmentation/s0", "r")
    assert ChunkFiles(array).encoded(GRID.index(13)) is None


def test_part_of_the_volume(run, run_dir, client):
    report = run_stitch(run.spec(run_dir, start=(0, 0, 0), stop=(11, 12, 20)), client)
    chosen = np.isin(BlockGrid.split_ids(run.fragments)[0], GRID.select((0, 0, 0), (11, 12, 20)))
    part = Run(
        GRID,
        run.sidecars,
        np.where(chosen, run.fragments, 0).astype(np.uint64),
        run.half_units,
        run.border,
        run.truth,
    )
    assert report.blocks == 6
    assert np.array_equal(segmentation(run_dir), expected_segments(part))


@pytest.mark.parametrize("batch_blocks", [1, 3, 256])
def test_batches_and_workers_change_nothing(run, run_dir, undisturbed, batch_blocks):
    with dask_client(DaskSettings(workers=1), processes=False) as alone:
        run_stitch(run.spec(run_dir, batch_blocks=batch_blocks), alone)
    assert results(run_dir) == undisturbed


def test_processes_and_an_existing_scheduler(run, run_dir, undisturbed):
    with open_cluster(2, processes=True) as cluster:
        existing = DaskSettings(address=cluster.scheduler_address)
        with dask_client(existing) as guest:
            run_stitch(run.spec(run_dir, batch_blocks=1), guest)
        # It is the user's: it goes on.
        with dask_client(existing) as guest:
            assert len(guest.ncores()) == 2
    for stage in ("relabel", "pyramid"):
        workers = list(Journal(run_dir / "journal" / stage).workers.values())
        # One for each process, though every block was a task of its own.
        assert len({w.info.pid for w in workers}) == len(workers) <= 2
        assert {w.exit for w in workers} == {"end"}
    assert results(run_dir) == undisturbed


def test_only_what_depends_on_a_change_is_redone(run, run_dir, client, undisturbed):
    run_stitch(run.spec(run_dir), client)
    assert run_stitch(run.spec(run_dir), client).reused == STEPS

    fewer = run_stitch(run.spec(run_dir, levels=2), client)
    assert fewer.reused == STEPS[:-1]
    assert sorted(p.name for p in (run_dir / "data.zarr/segmentation").glob("s*")) == ["s0", "s1"]

    large = run_stitch(run.spec(run_dir, min_size=30), client)
    assert large.reused == STEPS[:2]
    assert large.small_segments > 0
    whole = expected_segments(run)
    voxels = np.bincount(whole.ravel().astype(np.int64))
    assert same_partition(segmentation(run_dir), np.where(voxels[whole] >= 30, whole, 0))
    assert large.small_voxels == voxels[1:][voxels[1:] < 30].sum()

    strict = run_stitch(run.spec(run_dir, across=0.95), client)
    assert strict.reused == STEPS[:1]
    expected = expected_segments(run, Thresholds(across=0.95))
    assert np.array_equal(segmentation(run_dir), expected)
    assert strict.segments > large.segments

    named = run_stitch(run.spec(run_dir, segment_ids="fragment"), client)
    segments = segmentation(run_dir)
    assert same_partition(segments, whole)
    assert np.isin(segments[segments > 0], run.fragments).all()
    assert named.segments == len(np.unique(whole[whole > 0]))

    run_stitch(run.spec(run_dir), client)
    assert results(run_dir) == undisturbed


def test_the_segmentation_has_the_smallest_type_that_holds_its_ids(run, run_dir, client):
    def levels():
        group = run_dir / "data.zarr" / "segmentation"
        return {p.name: open_array(group, p.name, "r")[:] for p in sorted(group.glob("s*"))}

    run_stitch(run.spec(run_dir), client)
    small = levels()
    assert {str(labels.dtype) for labels in small.values()} == {"uint32"}
    report = run_stitch(run.spec(run_dir, dtype="uint64"), client)
    assert report.reused == STEPS[:3]
    large = levels()
    assert {str(labels.dtype) for labels in large.values()} == {"uint64"}
    assert small.keys() == large.keys()
    for name, labels in small.items():
        assert np.array_equal(labels, large[name])
    run_stitch(run.spec(run_dir, segment_ids="fragment"), client)
    assert {str(labels.dtype) for labels in levels().values()} == {"uint64"}


def test_removed_results_are_made_again(run, run_dir, client, undisturbed):
    run_stitch(run.spec(run_dir), client)
    for folder, reused in (
        ("data.zarr/segmentation", STEPS[:3]),
        ("data.zarr/segmentation/s2", STEPS[:4]),
        ("lut", [*STEPS[:2], *STEPS[3:]]),
        ("agglomeration", [STEPS[0], *STEPS[2:]]),
        ("contacts", STEPS[1:]),
        ("journal/relabel", STEPS[:3]),
    ):
        shutil.rmtree(run_dir / folder)
        assert run_stitch(run.spec(run_dir), client).reused == reused
        assert results(run_dir) == undisturbed


def test_failed_and_missing_blocks_are_refused(run, tmp_path, client):
    write_run(run, tmp_path, states={4: "failed", 5: None, 20: None})
    with pytest.raises(
        InputError, match=r"of 27 blocks 1 failed and 2 are missing \(block 4, 5, 20"
    ):
        run_stitch(run.spec(tmp_path), client)
    assert not (tmp_path / "data.zarr" / "segmentation").exists()

    report = run_stitch(run.spec(tmp_path, allow_missing=True), client)
    assert (report.missing, report.blocks) == (3, 24)
    without = make_run(GRID, seed=5, absent=(4, 5, 20))
    assert np.array_equal(segmentation(tmp_path), expected_segments(without))

    # Once they are there, the stitch starts over with them.
    with JournalWriter(tmp_path / "journal/predict", WorkerInfo("late", "localhost", 2)) as journal:
        journal.finish_many(BlockRecord(n, "done") for n in (4, 5, 20))
    report = run_stitch(run.spec(tmp_path), client)
    assert report.reused == []
    assert np.array_equal(segmentation(tmp_path), expected_segments(run))


def test_leaves_grow_where_there_were_too_many(run, run_dir, client, undisturbed, monkeypatch):
    monkeypatch.setattr(stitch, "MOST_LEAVES", 8)
    run_stitch(run.spec(run_dir, batch_blocks=1), client)
    assert 1 < len(list((run_dir / "contacts/0").iterdir())) <= 8
    assert results(run_dir) == undisturbed


def test_a_damaged_snapshot_of_the_journal_is_passed_over(run, run_dir, client):
    snapshot = compact(run_dir / "journal/predict")
    data = bytearray(snapshot.read_bytes())
    data[data.index(b"digest.npy") + 200] ^= 255
    snapshot.write_bytes(data)
    with pytest.raises(SnapshotError):
        Journal(run_dir / "journal/predict", lazy=True).digests(np.arange(GRID.n_blocks))
    run_stitch(run.spec(run_dir), client)
    assert np.array_equal(segmentation(run_dir), expected_segments(run))


def test_too_many_superblocks_leave_the_evidence_as_it_is(run, run_dir, client, monkeypatch):
    run_stitch(run.spec(run_dir), client)
    monkeypatch.setattr(stitch, "MOST_LEAVES", 26)
    with pytest.raises(InputError, match="more than 26; choose larger ones"):
        run_stitch(run.spec(run_dir, superblock=(1, 1, 1)), client)
    monkeypatch.undo()
    assert run_stitch(run.spec(run_dir), client).reused == STEPS


@pytest.mark.parametrize("levels", [1, None])
def test_a_stitch_stopped_in_between_is_nowhere_taken_for_done(run, run_dir, client, levels):
    """Also not the pyramid of an earlier one, whose coarse levels lie in what was begun anew."""
    run_stitch(run.spec(run_dir, levels=levels), client)
    before = results(run_dir)

    def stop(step: str, done: int, total: int) -> None:
        if step == "relabel" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stitch(run.spec(run_dir, levels=levels, across=0.95), client, stop)
    with pytest.raises(InputError, match="not stitched to the end"):
        version_of(run_dir)
    run_stitch(run.spec(run_dir, levels=levels), client)
    assert version_of(run_dir)
    assert results(run_dir) == before


def test_bad_input_is_one_clear_error(run, run_dir, client, tmp_path, monkeypatch):
    with pytest.raises(RunGoneError, match="nothing is gone"):
        run_stitch(run.spec(tmp_path / "nothing"), client)
    other = GRID.to_dict() | {"write_shape": [4, 11, 10]}
    with pytest.raises(InputError, match="not that of the block grid"):
        run_stitch(StitchSpec(run_dir=run_dir, grid=other), client)
    with pytest.raises(InputError, match="holds no block"):
        run_stitch(run.spec(run_dir, start=(0, 0, 0), stop=(0, 5, 5)), client)
    monkeypatch.setattr(stitch, "MOST_LEAVES", 26)
    with pytest.raises(InputError, match=r"stitch\.superblock: \(1, 1, 1\) blocks cut 27"):
        run_stitch(run.spec(run_dir, superblock=(1, 1, 1)), client)
    monkeypatch.undo()
    with pytest.raises(ValidationError, match="across"):
        run.spec(run_dir, across=1.2)
    with pytest.raises(ValidationError, match="write_shape"):
        StitchSpec(run_dir=run_dir, grid=GRID.to_dict() | {"write_shape": [0, 1, 1]})
    old = sidecar_path(run_dir, 7).with_suffix(".npz")
    sidecar_path(run_dir, 7).rename(old)
    with pytest.raises(InputError, match=r"7\.npz: sidecar of an older release"):
        run_stitch(run.spec(run_dir), client)
    old.unlink()
    sidecar_path(run_dir, 7).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"7\.agqs: sidecar is damaged"):
        run_stitch(run.spec(run_dir), client)
    sidecar_path(run_dir, 7).write_bytes(run.sidecars[7].to_bytes())
    run_stitch(run.spec(run_dir), client)
    assert np.array_equal(segmentation(run_dir), expected_segments(run))


def test_damaged_fragments_fail_alone_and_are_retried(run, run_dir, client):
    array = open_array(run_dir / "data.zarr", "fragments")
    chunk = chunk_file(array, GRID.index(9))
    good = chunk.read_bytes()
    chunk.write_bytes(b"damaged")
    with pytest.raises(StitchError, match="relabel: 1 blocks failed, first block 9"):
        run_stitch(run.spec(run_dir), client)
    assert Journal(run_dir / "journal" / "relabel").counts()["done"] == GRID.n_blocks - 8
    chunk.write_bytes(good)
    report = run_stitch(run.spec(run_dir), client)
    assert report.reused == STEPS[:3]
    assert np.array_equal(segmentation(run_dir), expected_segments(run))


class StopHereError(Exception):
    pass


@pytest.mark.parametrize(
    "step",
    [
        "contacts",
        "agglomerate 1/3",
        "agglomerate 3/3",
        "lut up 2/3",
        "lut down 2/3",
        "lut segments",
        "lut map",
        "relabel",
        "pyramid s1",
    ],
)
def test_stopped_in_any_step(run, run_dir, client, undisturbed, step):
    def stop(name: str, done: int, total: int) -> None:
        if name == step and done >= total / 2:
            raise StopHereError

    with pytest.raises(StopHereError):
        run_stitch(run.spec(run_dir), client, stop)
    first: dict[str, int] = {}
    run_stitch(run.spec(run_dir), client, lambda name, done, _: first.setdefault(name, done))
    if step in ("relabel", "pyramid s1"):
        assert first[step] > 0
    assert results(run_dir) == undisturbed


def test_a_stitch_of_a_former_release_is_read_checked_and_written_anew(
    run, run_dir, client, undisturbed
):
    """It had a file for each chunk, and a line for each in its journals."""
    run_stitch(run.spec(run_dir), client)
    container, pyramid = run_dir / "data.zarr", Pyramid.planned(Path(), "segmentation", GRID)
    former = replace(pyramid, container=container, passes=())
    labels = [segmentation(run_dir, level) for level in range(len(former.levels))]
    for stage in ("relabel", "pyramid"):
        shutil.rmtree(run_dir / "journal" / stage)
    shutil.rmtree(container / "segmentation")
    former.create(slice(None))
    former.write_metadata()
    for level, values in enumerate(labels):
        array, records = open_array(container, former.array(level)), []
        for index in np.ndindex(*former.grid(level)):
            start, stop = chunk_box(array, index)
            write_chunk(array, index, values[box(start, stop)].astype(array.dtype))
            number = int(former.numbers(level, np.array([index]))[0]) if level else 0
            sums = {"segmentation": file_checksum(chunk_file(array, index))}
            number = number if level else int(np.ravel_multi_index(index, GRID.shape))
            records.append(BlockRecord(number, "done", sums=sums))
        stage = "pyramid" if level else "relabel"
        with JournalWriter(run_dir / "journal" / stage, WorkerInfo("w", "here", 1)) as journal:
            journal.finish_many(records)
    for step in ("relabel", "pyramid"):
        marker = run_dir / "stitch" / f"{step}.json"
        marker.write_text(json.dumps({**Step.read(run_dir, step), "key": "former"}))
        marker.with_suffix(".sums").unlink()
    assert version_of(run_dir) == "former"
    assert np.array_equal(segmentation(run_dir), expected_segments(run))
    report = verify(run_dir, GRID, affinities=False)
    assert report.problems == []
    assert report.checked["segmentation"] == GRID.n_blocks
    flipped = chunk_file(open_array(container, "segmentation/s0"), (1, 1, 1))
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"!")
    assert [p.path for p in verify(run_dir, GRID, affinities=False).problems] == [
        "data.zarr/segmentation/s0/c/1/1/1"
    ]
    notes: list[str] = []
    again = run_stitch(run.spec(run_dir), client, on_note=notes.append)
    assert again.reused == STEPS[:3]
    assert any("former release" in note for note in notes)
    assert results(run_dir) == undisturbed
