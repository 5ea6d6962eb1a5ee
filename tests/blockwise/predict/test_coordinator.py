import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.packs import sidecar_path
from agq.blockwise.blocks.sidecar import build_sidecar
from agq.blockwise.journal.reader import Journal, compact
from agq.blockwise.journal.records import this_worker
from agq.blockwise.journal.snapshot import open_snapshot
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.predict.coordinator import PredictProgress, PredictSpec, run_predict
from agq.blockwise.predict.local_processes import EXIT_STOP_RUN, Dispatcher
from agq.blockwise.predict.paths import journal_folder, log_path, session_path
from agq.blockwise.threads import EXIT_DISK
from agq.blockwise.volumes.create import chunk_file, open_array
from agq.errors import InputError, RunStoppedError
from tests.helpers import fakes
from tests.helpers.predict_runs import SHAPE, make_grid, make_run, mark, outputs, raw_volume
from tests.helpers.sidecars import read_sidecar

GRID = make_grid()
ALL = np.arange(GRID.n_blocks)


def journal(spec: PredictSpec) -> Journal:
    return Journal(Path(spec.run_dir) / "journal" / "predict")


def box(corners):
    return tuple(slice(a, b) for a, b in zip(*corners, strict=True))


def expected_fragments(raw: np.ndarray, grid: BlockGrid) -> np.ndarray:
    """Block by block in this process, without any of the machinery."""
    result = np.zeros(raw.shape, np.uint64)
    predictor = fakes.threshold()
    for number in range(grid.n_blocks):
        window = raw[box(grid.read_box(number))]
        missing = [(0, r - n) for r, n in zip(grid.read_shape, window.shape, strict=True)]
        (labelled,) = predictor.predict([np.pad(window, missing, mode="reflect")])
        labels = labelled.labels[grid.write_in_read(number)].astype(np.uint64)
        result[box(grid.write_box(number))] = np.where(labels, labels + (number << 21), 0)
    return result


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    """Output bytes of one worker, one block at a time."""
    spec = make_run(tmp_path_factory.mktemp("undisturbed"), raw_volume())
    seen: list[PredictProgress] = []
    report = run_predict(spec, ALL, on_progress=seen.append)
    assert (report.blocks, report.done, report.skipped, report.failed) == (27, 27, 0, ())
    assert report.voxels == np.prod(SHAPE)
    assert (seen[-1].total, seen[-1].done, seen[-1].failed) == (27, 27, 0)
    fragments = zarr.open_array(Path(spec.run_dir) / "data.zarr" / "fragments")[:]
    assert np.array_equal(fragments, expected_fragments(raw_volume(), GRID))
    records = list(journal(spec).records())
    assert [r.block for r in records] == list(range(27))
    assert {r.state for r in records} == {"done"}
    assert sum(r.voxels for r in records) == np.prod(SHAPE)
    assert records[26].roi == ((60 + 8 * 30, -12 + 32 * 6, 600 + 32 * 6), (90, 30, 48))
    assert {frozenset(r.sums) for r in records} == {
        frozenset(("fragments", "sidecar", "affinities"))
    }
    for number in (0, 13, 26):
        check_sidecar(spec, number)
    result = outputs(spec)
    assert sum(name.startswith("sidecars/") for name in result) == 27
    assert sum("fragments/c/" in name for name in result) == 27
    assert sum("affinities/c/" in name for name in result) == 27
    return result


def check_sidecar(spec: PredictSpec, number: int) -> None:
    window = raw_volume()[box(GRID.read_box(number))]
    (labelled,) = fakes.threshold().predict([window])
    expected = build_sidecar(labelled.labels, labelled.affinities, GRID, number)
    assert read_sidecar(Path(spec.run_dir), number).to_bytes() == expected.to_bytes()


@pytest.mark.parametrize(
    ("workers", "batch", "prefetch"),
    [(2, 1, 1), (1, 3, 1), pytest.param(2, 3, 5, marks=pytest.mark.slow)],
)
def test_bytes_do_not_depend_on_workers_or_batches(tmp_path, undisturbed, workers, batch, prefetch):
    options = {"batch_size": batch, "state": str(tmp_path), "delay_s": 0.02}
    spec = make_run(tmp_path, raw_volume(), options=options, workers=workers, prefetch=prefetch)
    report = run_predict(spec, np.random.default_rng(workers).permutation(ALL))
    assert report.done == 27
    assert outputs(spec) == undisturbed
    batches = [int(n) for n in (tmp_path / "batches").read_text().split()]
    assert sum(batches) == 27
    assert (max(batches) > 1) == (batch > 1)


def test_the_journal_is_compacted_while_a_run_goes_on(tmp_path, undisturbed, monkeypatch):
    """So that who watches a run of 10^7 blocks need not read as many lines."""
    monkeypatch.setattr("agq.blockwise.predict.coordinator._COMPACT_BLOCKS", 5)
    spec = make_run(tmp_path, raw_volume())
    assert run_predict(spec, ALL).done == 27
    snapshot = open_snapshot(journal(spec).folder)
    assert snapshot is not None
    assert len(snapshot.rows()) >= 5
    assert journal(spec).done(27).all()
    assert outputs(spec) == undisturbed


def test_a_roi_computes_only_its_blocks_with_the_same_bytes(tmp_path, undisturbed):
    spec = make_run(tmp_path, raw_volume())
    numbers = GRID.select((5, 17, 20), (6, 40, 33))
    chosen = numbers[numbers != 13]
    assert run_predict(spec, chosen).done == chosen.size
    done = journal(spec).done(GRID.n_blocks)
    assert np.flatnonzero(done).tolist() == chosen.tolist()
    partial = outputs(spec)
    assert partial.items() <= undisturbed.items()
    assert len([n for n in partial if n.startswith("sidecars/")]) == chosen.size
    rest = run_predict(spec, np.flatnonzero(~done))
    assert rest.blocks == 27 - chosen.size
    assert outputs(spec) == undisturbed


def test_stages_overlap_and_give_the_same_bytes(tmp_path, undisturbed):
    """Each block is finished only after another one was begun: see the predictor."""
    staged = {"factory": "tests.helpers.fakes:staged", "retries": 0}
    spec = make_run(tmp_path / "all", raw_volume(), options={"blocks": 27}, **staged)
    assert run_predict(spec, ALL).done == 27
    assert outputs(spec) == undisturbed
    raw = raw_volume()
    mark(GRID, raw, 13, fakes.RAISE)
    spec = make_run(tmp_path / "bad", raw, options={"marks": True, "blocks": 26}, **staged)
    report = run_predict(spec, ALL)
    assert (report.done, report.failed) == (26, (13,))
    (record,) = journal(spec).failed()
    assert record.reason == "RuntimeError: this block cannot be prepared"


def test_nothing_to_do_starts_nothing(tmp_path):
    spec = make_run(tmp_path, raw_volume(), factory="tests.helpers.fakes:broken")
    report = run_predict(spec, np.zeros(0, np.int64))
    assert (report.blocks, report.done, report.failed) == (0, 0, ())
    assert not (Path(spec.run_dir) / "logs").exists()


def test_a_block_that_raises_fails_alone(tmp_path, undisturbed):
    raw = raw_volume()
    mark(GRID, raw, 13, fakes.RAISE)
    spec = make_run(
        tmp_path, raw, options={"marks": True, "batch_size": 3, "delay_s": 0.02}, retries=2
    )
    report = run_predict(spec, ALL)
    assert report.failed == (13,)
    assert (report.done, report.retries, report.workers_lost) == (26, 3, 0)
    (record,) = journal(spec).failed()
    assert (record.block, record.attempt) == (13, 3)
    assert record.reason == "RuntimeError: this block cannot be predicted"
    assert "in _misbehave" in record.error
    roi = GRID.write_roi(13)
    assert record.roi == (tuple(roi.offset), tuple(roi.shape))
    clean = make_run(tmp_path / "clean", raw, options={"batch_size": 3})
    run_predict(clean, ALL)
    assert outputs(spec).items() < outputs(clean).items()
    # The command that retries only what failed: same run, other circumstances.
    spec = spec.model_copy(update={"options": {}})
    assert run_predict(spec, [13]).done == 1
    assert journal(spec).failed() == []
    assert outputs(spec) == outputs(clean)


def test_a_predictor_that_ends_the_program_fails_its_block_only(tmp_path):
    raw = raw_volume()
    mark(GRID, raw, 13, fakes.EXIT)
    mark(GRID, raw, 4, fakes.CANCEL)
    spec = make_run(tmp_path, raw, options={"marks": True, "batch_size": 3}, retries=0)
    report = run_predict(spec, ALL)
    assert (report.done, report.failed, report.workers_lost) == (25, (4, 13), 0)
    reasons = {record.block: record.reason for record in journal(spec).failed()}
    assert reasons == {4: "CancelledError: ", 13: "SystemExit: 0"}
    log = (Path(spec.run_dir) / "logs" / "predict" / "worker-0.log").read_text()
    assert log.count("Traceback") >= 2
    assert "in _misbehave" in log


def test_a_block_that_raises_once_is_retried(tmp_path):
    raw = raw_volume()
    mark(GRID, raw, 13, fakes.RAISE)
    options = {"marks": True, "times": 1, "state": str(tmp_path)}
    spec = make_run(tmp_path, raw, options=options, workers=2)
    report = run_predict(spec, ALL)
    assert (report.done, report.failed, report.retries) == (27, (), 1)
    assert journal(spec).record(13).attempt == 2


def test_a_block_that_kills_its_worker_fails_alone(tmp_path):
    raw = raw_volume()
    mark(GRID, raw, 13, fakes.KILL)
    spec = make_run(tmp_path, raw, options={"marks": True}, workers=2, retries=1, prefetch=3)
    report = run_predict(spec, ALL)
    assert (report.done, report.failed) == (26, (13,))
    # Twice in company, twice alone.
    assert report.workers_lost == 4
    (record,) = journal(spec).failed()
    assert "SIGKILL" in record.reason
    assert "worker-" in record.reason
    # What the killed workers may have left of their blocks goes when predict runs next.
    held = {block for worker in journal(spec).workers.values() for block in worker.current}
    assert 13 in held
    array = open_array(Path(spec.run_dir) / "data.zarr", "fragments")
    chunks = [chunk_file(array, GRID.index(n)) for n in (13, np.setdiff1d(ALL, list(held))[0])]
    litter = [file.with_name(f"{file.name}.{'0f' * 16}.partial") for file in chunks]
    for file in litter:
        file.write_bytes(b"half")
    run_predict(spec, ALL[:0])
    assert [file.exists() for file in litter] == [False, True]


def test_what_a_worker_told_to_end_left_half_written_goes(tmp_path):
    spec = make_run(tmp_path, raw_volume())
    folder = journal_folder(spec.run_dir)
    writer = JournalWriter(folder, this_worker("told"))
    writer.begin(13)
    writer.close("terminated")
    sidecar = sidecar_path(Path(spec.run_dir), 13)
    half = sidecar.with_name(f".{sidecar.name}.{'0f' * 8}.tmp")
    half.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):  # the second time from a snapshot of the journal
        half.write_bytes(b"half")
        run_predict(spec, ALL[:0])
        assert not half.exists()
        assert not journal(spec).running()
        compact(folder)


@pytest.mark.slow
def test_a_block_that_hangs_is_given_up_after_its_timeout(tmp_path):
    raw = raw_volume()
    mark(GRID, raw, 13, fakes.HANG)
    spec = make_run(tmp_path, raw, options={"marks": True}, retries=0, timeout_s=15)
    report = run_predict(spec, ALL)
    assert (report.done, report.failed, report.workers_lost) == (26, (13,), 2)
    (record,) = journal(spec).failed()
    assert "longer than 15 s" in record.reason


def test_bad_input_fails_only_the_blocks_that_read_it(tmp_path):
    raw = raw_volume().astype(np.float32)
    raw[1, 1, 1] = np.nan
    raw[box(GRID.read_box(2))] = 7
    spec = make_run(tmp_path, raw, options={"state": str(tmp_path)}, retries=1)
    (tmp_path / "in.zarr" / "raw" / "c" / "0" / "2" / "2").write_bytes(b"not zstd")
    report = run_predict(spec, ALL)
    corrupt = GRID.select((0, 32, 32), (11, 37, 40)).tolist()
    assert corrupt == [8, 17, 26]
    readers = [n for n in ALL.tolist() if all(hi > 32 for hi in GRID.read_box(n)[1][1:])]
    assert set(corrupt) < set(readers)
    assert report.failed == (0, *readers)
    assert report.retries == 2 * len(report.failed)
    assert report.skipped == 1
    assert report.done == 26 - len(report.failed)
    found = journal(spec)
    assert (found.record(2).state, found.record(2).reason) == ("skipped", "constant")
    failed = {record.block: record for record in found.failed()}
    assert failed[0].reason == "BlockError: raw has 1 NaN or infinite of 1445 voxels"
    assert "Traceback" in failed[26].error
    # Neither constant nor bad blocks ever reach the predictor.
    assert len((tmp_path / "batches").read_text().split()) == report.done


def test_a_volume_smaller_than_a_block(tmp_path):
    raw = raw_volume()[:3, :9, :10].copy()
    spec = make_run(tmp_path, raw)
    assert run_predict(spec, [0]).done == 1
    fragments = zarr.open_array(Path(spec.run_dir) / "data.zarr" / "fragments")[:]
    assert fragments.any()
    assert np.array_equal(fragments, expected_fragments(raw, make_grid(raw.shape)))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("tests.helpers.fakes:broken", "RuntimeError: no weights here"),
        ("tests.helpers.fakes:leaving", "SystemExit: no licence"),
        (
            "tests.helpers.fakes:absent",
            "predictor factory 'tests.helpers.fakes:absent': .* 'absent'",
        ),
    ],
)
def test_a_worker_that_cannot_start_ends_the_run(tmp_path, factory, message):
    spec = make_run(tmp_path, raw_volume(), factory=factory)
    with pytest.raises(InputError, match=f"worker 0 cannot start: {message}") as caught:
        run_predict(spec, ALL)
    assert "\n" not in str(caught.value)
    assert json.loads((Path(spec.run_dir) / "session.json").read_bytes())["state"] == "closed"


def test_input_that_is_gone_ends_the_run(tmp_path):
    spec = make_run(tmp_path, raw_volume())
    (tmp_path / "in.zarr").rename(tmp_path / "moved.zarr")
    with pytest.raises(InputError, match=r"worker 0 cannot start: .*in\.zarr"):
        run_predict(spec, ALL)


def test_workers_that_die_at_the_start_end_the_run(tmp_path):
    spec = make_run(tmp_path, raw_volume(), factory="tests.helpers.fakes:crashing")
    with pytest.raises(RunStoppedError, match=r"3 workers in a row .* SIGKILL"):
        run_predict(spec, ALL)


def test_a_full_disk_stops_the_run_in_one_line(tmp_path):
    raw = raw_volume()
    mark(GRID, raw, 13, fakes.FULL_DISK)
    spec = make_run(tmp_path, raw, options={"marks": True}, workers=2)
    with pytest.raises(RunStoppedError, match=r"block 13 .*No space left on device") as caught:
        run_predict(spec, ALL)
    assert "\n" not in str(caught.value)
    assert "resume" in str(caught.value)
    assert journal(spec).failed()[0].block == 13


@pytest.fixture
def small_disk(tmp_path):
    """Yield a folder on a file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount the small file system that this test fills")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk_leaves_a_run_that_resumes(tmp_path, small_disk, undisturbed):
    spec = make_run(tmp_path, raw_volume())
    shutil.move(spec.run_dir, small_disk / "run")
    spec = spec.model_copy(update={"run_dir": str(small_disk / "run")})
    ballast = small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(bytes(free - 150_000))
    with pytest.raises(RunStoppedError, match="No space left on device"):
        run_predict(spec, ALL)
    done = journal(spec).done(27)
    assert 0 < done.sum() < 27
    assert outputs(spec).items() <= undisturbed.items()
    ballast.unlink()
    assert run_predict(spec, np.flatnonzero(~done)).failed == ()
    assert outputs(spec) == undisturbed


@pytest.mark.parametrize(("obstacle", "status"), [("full", EXIT_DISK), ("folder", 1)])
def test_a_dispatcher_that_nobody_could_join_ends(small_disk, obstacle, status, tmp_path):
    """It would wait for workers for ever: they find it through the file it could not write."""
    spec = make_run(tmp_path, raw_volume())
    shutil.move(spec.run_dir, small_disk / "run")
    spec = spec.model_copy(update={"run_dir": str(small_disk / "run")})
    spec.save()
    if obstacle == "full":
        log_path(spec.run_dir, "x").parent.mkdir(parents=True)
        (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    else:
        session_path(spec.run_dir).mkdir()
    dispatcher = Dispatcher(spec.run_dir, ALL, alone=False)
    deadline = time.monotonic() + 30
    while (code := dispatcher.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    dispatcher.kill()
    assert code == status


def test_a_worker_that_starts_on_a_full_disk_is_not_at_fault(small_disk, tmp_path):
    """On a cluster its host starts it again when there is room; elsewhere the run stops."""
    spec = make_run(tmp_path, raw_volume())
    shutil.move(spec.run_dir, small_disk / "run")
    spec = spec.model_copy(update={"run_dir": str(small_disk / "run")})
    spec.save()
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    command = [sys.executable, "-m", "agq.blockwise.predict.worker", spec.run_dir, "--wait", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == EXIT_STOP_RUN
    assert "a worker cannot start: [Errno 28] No space left on device" in done.stderr


def test_a_disk_too_full_for_a_session_is_a_full_disk(tmp_path, monkeypatch):
    """So that a coordinator on a cluster waits until it can be written again."""

    class Ended:
        def __init__(self, *_, **__):
            pass

        def poll(self):
            return EXIT_DISK

        def kill(self):
            pass

    monkeypatch.setattr("agq.blockwise.predict.coordinator.Dispatcher", Ended)
    spec = make_run(tmp_path, raw_volume(), workers=0)
    with pytest.raises(OSError, match=r"No space left on device: .*session\.json"):
        run_predict(spec, ALL)


def test_blocks_outside_the_grid_are_refused(tmp_path):
    spec = make_run(tmp_path, raw_volume())
    with pytest.raises(InputError, match="27 blocks"):
        run_predict(spec, [0, 27])
