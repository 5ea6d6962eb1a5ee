import errno
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agq.blockwise.journal.reader import Journal, compact
from agq.blockwise.journal.records import BlockRecord, WorkerInfo, encode
from agq.blockwise.journal.writer import JournalWriter, end_journal, run_journalled, take_back
from agq.blockwise.storage import files
from agq.blockwise.storage.files import Unsynced
from agq.errors import InputError


def test_journal_line_comes_after_the_work(tmp_path):
    seen = []

    def work(number: int, _unsynced: Unsynced) -> tuple[int, dict[str, str]]:
        seen.append((number, int(Journal(tmp_path).done(5)[number])))
        return 10, {"a": "b"}

    assert run_journalled(tmp_path, range(5), work) == 0
    assert seen == [(n, 0) for n in range(5)]
    assert Journal(tmp_path).done(5).all()
    record = Journal(tmp_path).record(3)
    assert (record.voxels, record.sums) == (10, {"a": "b"})


def test_a_process_writes_one_file_for_all_its_tasks(tmp_path):
    folder = tmp_path / "journal"
    for first in (0, 3):
        run_journalled(folder, range(first, first + 3), lambda _, __: (1, {}))
    (file,) = folder.iterdir()
    run_journalled(folder, [6], lambda _, __: (1, {}), revision=1)
    assert len(list(folder.iterdir())) == 2, "records are signed with a revision"
    end_journal(folder)
    workers = Journal(folder).workers.values()
    assert [w.exit for w in workers] == ["end"] * 2
    assert sorted(w.done for w in workers) == [1, 6]
    # Again, and in a folder that was emptied meanwhile.
    run_journalled(folder, [7], lambda _, __: (1, {}))
    shutil.rmtree(folder)
    folder.mkdir()
    run_journalled(folder, [8], lambda _, __: (1, {}))
    (record,) = Journal(folder).records()
    assert record.block == 8
    end_journal(folder)
    assert not file.exists()


def test_files_are_durable_before_their_journal_line(tmp_path, monkeypatch):
    """Every file and folder of a block is synced before its line; each folder once a batch."""
    events = []
    sync, finish = files.fsync_path, JournalWriter.finish_many

    def record_sync(path):
        events.append(path)
        sync(path)

    def record_finish(self, records):
        records = list(records)
        events.append([record.block for record in records])
        finish(self, records)

    monkeypatch.setattr(files, "fsync_path", record_sync)
    monkeypatch.setattr(JournalWriter, "finish_many", record_finish)
    top = tmp_path / "array"

    def work(number: int, unsynced: Unsynced) -> tuple[int, dict[str, str]]:
        file = top / "c" / str(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
        unsynced.add(file, top)
        return 1, {}

    assert run_journalled(tmp_path / "journal", range(3), work) == 0
    at = events.index([0, 1, 2])
    synced = [path for path in events[:at] if top in (path, *path.parents)]
    assert synced == [*(top / "c" / str(n) for n in range(3)), top / "c", top]


def test_blocks_that_cannot_be_made_durable_are_failed(tmp_path, monkeypatch):
    def broken(path):
        raise OSError(errno.EIO, "Input/output error")

    def work(number: int, unsynced: Unsynced) -> tuple[int, dict[str, str]]:
        if number == 1:
            raise InputError("odd")
        unsynced.add(tmp_path / "file", tmp_path)
        return 1, {}

    (tmp_path / "journal").mkdir()
    monkeypatch.setattr(files, "fsync_path", broken)
    assert run_journalled(tmp_path / "journal", range(3), work) == 3
    failed = {record.block: record.reason for record in Journal(tmp_path / "journal").failed()}
    assert failed[1] == "odd"
    assert failed[0] == failed[2] == "[Errno 5] Input/output error"


@pytest.mark.parametrize("where", ["work", "sync"])
def test_a_full_disk_fails_no_block_but_stops(tmp_path, monkeypatch, where):
    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def work(number: int, unsynced: Unsynced) -> tuple[int, dict[str, str]]:
        unsynced.add(tmp_path / "file", tmp_path)
        return no_room() if where == "work" else (1, {})

    (tmp_path / "journal").mkdir()
    if where == "sync":
        monkeypatch.setattr(files, "fsync_path", no_room)
    with pytest.raises(OSError, match="No space left"):
        run_journalled(tmp_path / "journal", range(3), work)
    assert not Journal(tmp_path / "journal").failed()


def finish(folder: Path, revision: int, *records: BlockRecord) -> None:
    with JournalWriter(folder, WorkerInfo("w", "node", 1)) as writer:
        writer.revision = revision
        writer.finish_many(records)


@pytest.mark.parametrize("snapshot", [False, True])
def test_taken_back_blocks_are_open_until_a_later_record(tmp_path, snapshot):
    done = BlockRecord(2, "done", finished=9e9, voxels=10, sums={"fragments": "aa"})
    finish(tmp_path, 0, done, BlockRecord(3, "skipped"), BlockRecord(4, "failed"))
    if snapshot:
        compact(tmp_path)
    assert take_back(tmp_path, [2, 3, 4, 5], "differs") == 3
    lazy = Journal(tmp_path, lazy=True)
    assert lazy.ranks(np.arange(2, 6)).tolist() == [0, 0, 0, 0]
    assert lazy.counts() == {"done": 0, "skipped": 0, "failed": 0}
    assert lazy.totals()["voxels"] == 0
    assert not lazy.done(6).any()
    assert (lazy.record(2), lazy.failed(), lazy.revision) == (None, [], 1)
    assert take_back(tmp_path, [2], "again") == 0, "it is open already"
    # A worker that began before says nothing of the block any more; one that began after does.
    finish(tmp_path, 0, replace(done, finished=9.5e9))
    assert not Journal(tmp_path).done(6).any()
    finish(tmp_path, 1, replace(done, finished=1.0, sums={"fragments": "bb"}))
    for journal in (Journal(tmp_path), Journal(tmp_path, use_snapshot=False)):
        assert journal.done(6).nonzero()[0].tolist() == [2]
        assert journal.record(2).sums == {"fragments": "bb"}
        # It was meant to be done twice.
        assert journal.duplicates == journal.conflicts == []
    compact(tmp_path)
    assert Journal(tmp_path).revision == 1
    assert take_back(tmp_path, [2], "again") == 1
    assert Journal(tmp_path).revision == 2


def test_the_order_of_files_does_not_matter_for_what_is_taken_back(tmp_path):
    records = [(0, "done"), (1, "open"), (1, "failed"), (2, "open"), (2, "skipped")]
    seen = set()
    for i, order in enumerate(itertools.permutations(records)):
        folder = tmp_path / str(i)
        folder.mkdir()
        for place, (revision, state) in enumerate(order):
            line = BlockRecord(1, state, finished=1.0, token="t", revision=revision).to_dict()
            (folder / f"h-{place}-t.jsonl").write_bytes(encode("block", 1.0, "t", line))
        journal = Journal(folder)
        seen.add((tuple(journal.counts().items()), journal.revision, journal.record(1).state))
    assert len(seen) == 1
    assert seen.pop()[1:] == (2, "skipped")


def test_a_snapshot_of_an_earlier_release_goes_on(tmp_path):
    finish(tmp_path, 0, BlockRecord(1, "done", voxels=7), BlockRecord(2, "done"))
    file = compact(tmp_path)
    columns = {n: a for n, a in np.load(file).items() if n != "revision"}
    np.savez(file, **columns)
    for lazy in (True, False):
        journal = Journal(tmp_path, lazy=lazy)
        assert journal.totals()["voxels"] == 7
        assert journal.record(1).voxels == 7
    take_back(tmp_path, [1], "differs")
    assert Journal(tmp_path, lazy=True).counts()["done"] == 1
    assert Journal(tmp_path).done(3).tolist() == [False, False, True]
