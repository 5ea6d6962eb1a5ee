"""A journal that reads of its snapshot what is asked for says what one says that reads it all."""

import json
import random
import re

import numpy as np
import pytest

from agq.blockwise.journal.reader import Journal, compact
from agq.blockwise.journal.records import BlockRecord, BlockState, WorkerInfo
from agq.blockwise.journal.snapshot import SNAPSHOT, SnapshotError, SnapshotTable
from agq.blockwise.journal.writer import JournalWriter
from agq.errors import InputError
from agq.pipeline.folder import RunFolder
from agq.pipeline.status.monitor import Monitor, load_status
from tests.helpers.runs import kill_after

WORKER = WorkerInfo("w", "node", 1)


def records(rng: random.Random, n: int, begin: float) -> list[BlockRecord]:
    found = []
    for i in range(n):
        state = rng.choice(["done", "done", "done", "failed", "skipped"])
        started = begin + rng.uniform(0, 50)
        found.append(
            BlockRecord(
                rng.randrange(200),
                state,
                attempt=rng.randrange(1, 4),
                started=started,
                finished=started + rng.uniform(0, 9),
                read_s=rng.uniform(0, 1),
                compute_s=rng.uniform(0, 1),
                voxels=rng.randrange(1000),
                labels=rng.randrange(100),
                dropped=i % 3,
                sums={"fragments": f"{i % 5:x}"},
                reason=f"why {i}" if state != "done" else None,
                error="Traceback" if state == "failed" else None,
                roi=((0, 0, i), (1, 2, 3)),
            )
        )
    return found


def same(lazy: Journal, whole: Journal) -> None:
    assert lazy.counts() == whole.counts()
    one, other = lazy.totals(), whole.totals()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value == pytest.approx(other[name], rel=1e-6), name
    for since in (0.0, 1000.0, *np.linspace(1001, 1060, 9), 2020.0, 3000.0):
        assert lazy.recent(since) == whole.recent(since), since
    blocks = np.random.default_rng(0).permutation(260).astype(np.int64)
    assert np.array_equal(lazy.ranks(blocks), whole.ranks(blocks))
    assert np.array_equal(lazy.digests(blocks), whole.digests(blocks))
    last = int(blocks[whole.ranks(blocks) >= BlockState.SKIPPED].max(initial=-1))
    for journal in (lazy, whole):
        journal.require_grid(last + 1)
        if last >= 0:
            with pytest.raises(InputError, match=f"has block {last}, but"):
                journal.require_grid(last)
    assert lazy.failed() == whole.failed()
    assert (lazy.duplicates, lazy.conflicts) == (whole.duplicates, whole.conflicts)
    assert lazy.running() == whole.running()
    assert [lazy.record(b) for b in range(210)] == [whole.record(b) for b in range(210)]


@pytest.mark.parametrize("seed", range(12))
def test_a_lazy_journal_says_the_same(tmp_path, seed):
    rng = random.Random(seed)
    # Before and after the snapshot; one of both may be empty, and blocks come again.
    before, after = rng.choice([(0, 80), (150, 0), (150, 3), (150, 150), (3, 150)])
    with JournalWriter(tmp_path, WORKER) as writer:
        writer.finish_many(records(rng, before, 1000.0))
        # Its next line is cut off where it was killed.
        with writer.path.open("ab") as file:
            file.write(b'{"event":"block","blo')
    compact(tmp_path)
    with JournalWriter(tmp_path, WORKER) as writer:
        late = records(rng, after, 2000.0)
        writer.finish_many(late[: after // 2])
        lazy = Journal(tmp_path, lazy=True)
        assert isinstance(lazy._table, SnapshotTable)
        same(lazy, Journal(tmp_path, use_snapshot=False))
        writer.finish_many(late[after // 2 :])
        writer.begin(7)
        lazy.catch_up()
        whole = Journal(tmp_path, use_snapshot=False)
        same(lazy, whole)
        # Reading all of it, at last, changes nothing, nor does what comes then.
        assert np.array_equal(lazy.done(200), whole.done(200))
        assert len(lazy.rows) == len(whole.rows)
        same(lazy, whole)
        writer.finish_many(records(rng, 20, 3000.0))
        lazy.catch_up()
        whole = Journal(tmp_path, use_snapshot=False)
        same(lazy, whole)
    lazy.save()
    same(Journal(tmp_path, lazy=True), Journal(tmp_path, use_snapshot=False))


def test_a_status_reads_no_column_of_a_journal_at_rest(tmp_path):
    with JournalWriter(tmp_path, WORKER) as writer:
        writer.finish_many(records(random.Random(1), 150, 1000.0))
    compact(tmp_path)
    lazy = Journal(tmp_path, lazy=True)
    lazy.counts(), lazy.totals(), lazy.recent(0.0), lazy.recent(9000.0), lazy.failed()
    assert set(lazy._table._snapshot._columns) == {"meta", "seconds"}


def test_a_status_of_a_run_reads_no_more_than_late_lines_change(tmp_path):
    done = [BlockRecord(b, "done", finished=1000.0 + b, voxels=b) for b in range(0, 800, 2)]
    with JournalWriter(tmp_path, WORKER) as writer:
        writer.finish_many(done)
    compact(tmp_path)
    late = [5, 7, 8, 799, 900]
    with JournalWriter(tmp_path, WORKER) as writer:
        writer.finish_many(BlockRecord(b, "done", finished=2000.0, voxels=1) for b in late)
        writer.begin(901)
    lazy, whole = Journal(tmp_path, lazy=True), Journal(tmp_path, use_snapshot=False)
    # Of the late blocks the snapshot has 8 alone.
    assert lazy._table._replaced.rows["block"].tolist() == [8]
    assert lazy.recent(1333.0) == whole.recent(1333.0)
    assert lazy.counts() == whole.counts()
    assert lazy.totals() == whole.totals()
    assert lazy.running() == whole.running()
    assert set(lazy._table._snapshot._columns) == {"meta", "seconds", "block", "rank"}


def test_a_snapshot_of_an_earlier_release_is_read_whole(tmp_path):
    with JournalWriter(tmp_path, WORKER) as writer:
        writer.finish_many(records(random.Random(1), 150, 1000.0))
    compact(tmp_path)
    with np.load(tmp_path / SNAPSHOT) as archive:
        members = {name: archive[name] for name in archive.files if name != "seconds"}
    meta = json.loads(members["meta"].tobytes())
    del meta["span"], meta["summary"]
    members["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez(tmp_path / SNAPSHOT, **members)
    lazy = Journal(tmp_path, lazy=True)
    assert not isinstance(lazy._table, SnapshotTable)
    same(lazy, Journal(tmp_path, use_snapshot=False))


def test_sums_stay_exact_when_the_writer_is_killed_while_snapshots_are_made(tmp_path):
    code = """
import sys
from pathlib import Path
from agq.blockwise.journal.reader import compact
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
folder = Path(sys.argv[1])
writer = JournalWriter(folder, WorkerInfo("w", "h", 1))
for first in range(0, 10**6, 100):
    writer.finish_many(
        BlockRecord(b * 7 % 5000, "failed" if b % 9 == 0 else "done", finished=b, voxels=b % 13)
        for b in range(first, first + 100)
    )
    compact(folder)
    print(first, flush=True)
"""
    kill_after(60, code, tmp_path)
    lazy, whole = Journal(tmp_path, lazy=True), Journal(tmp_path, use_snapshot=False)
    assert isinstance(lazy._table, SnapshotTable)
    assert lazy.counts() == whole.counts()
    assert lazy.totals() == whole.totals()
    assert sum(whole.counts().values()) >= 5000
    for since in (0.0, 1234.0, 5999.0, 6050.0, 1e9):
        assert lazy.recent(since) == whole.recent(since)


@pytest.mark.parametrize("column", ["seconds", "block", "rank"])
def test_a_damaged_column_is_found_and_the_lines_read_instead(tmp_path, column, monkeypatch):
    run = RunFolder(tmp_path / "run")
    with run.lock():
        run.create({}, {"grid": 1})
    folder = run.journal("predict")
    with JournalWriter(folder, WORKER) as writer:
        writer.finish_many(records(random.Random(1), 150, 1000.0))
    # Between the first end and the last.
    run.update_stage("predict", state="running", blocks_total=200, started=1030.0)
    compact(folder)
    with JournalWriter(folder, WORKER) as writer:
        # A status needs all three columns now.
        writer.finish_many(records(random.Random(2), 9, 2000.0))
        writer.begin(7)
        writer.path.with_suffix(".keep").write_bytes(writer.path.read_bytes())
    writer.path.with_suffix(".keep").rename(writer.path)
    with monkeypatch.context() as patch:
        patch.setattr("agq.blockwise.journal.reader.open_snapshot", lambda _: None)
        expected = load_status(run.path).stages
    file = folder / SNAPSHOT
    data = bytearray(file.read_bytes())
    data[data.index(f"{column}.npy".encode()) + 200] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(SnapshotError, match=re.escape(str(file))):
        Journal(folder, lazy=True).running()
    assert load_status(run.path).stages == expected
    # Callers that decide what is done read all of it at once, and pass a damaged one over.
    same(Journal(folder), Journal(folder, use_snapshot=False))


def test_a_snapshot_that_a_file_system_takes_away_is_opened_again(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.lock():
        run.create({}, {"grid": 1})
    with JournalWriter(run.journal("predict"), WORKER) as writer:
        writer.finish_many(records(random.Random(1), 150, 1000.0))
    run.update_stage("predict", state="running", blocks_total=200, started=1030.0)
    compact(run.journal("predict"))
    monitor = Monitor(run.path)
    journal = monitor.journal("predict")
    # As on NFS, where a file that another machine has replaced cannot be read any more.
    journal._table._snapshot.close()
    with JournalWriter(run.journal("predict"), WORKER) as writer:
        writer.finish_many(records(random.Random(2), 9, 2000.0))
    assert monitor.poll().stages == load_status(run.path).stages
    assert monitor.journal("predict") is not journal
    assert monitor._lazy
