import errno

import pytest

from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.writer import JournalWriter, run_journalled
from agq.blockwise.storage import files
from agq.blockwise.storage.files import Unsynced
from agq.errors import InputError


def test_journal_line_comes_after_the_work(tmp_path):
    seen = []

    def work(number: int, _unsynced: Unsynced) -> int:
        seen.append((number, int(Journal(tmp_path).done(5)[number])))
        return 10

    assert run_journalled(tmp_path, range(5), work) == 0
    assert seen == [(n, 0) for n in range(5)]
    assert Journal(tmp_path).done(5).all()
    assert Journal(tmp_path).record(3).voxels == 10


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

    def work(number: int, unsynced: Unsynced) -> int:
        file = top / "c" / str(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
        unsynced.add(file, top)
        return 1

    assert run_journalled(tmp_path / "journal", range(3), work) == 0
    at = events.index([0, 1, 2])
    synced = [path for path in events[:at] if top in (path, *path.parents)]
    assert synced == [*(top / "c" / str(n) for n in range(3)), top / "c", top]


def test_blocks_that_cannot_be_made_durable_are_failed(tmp_path, monkeypatch):
    def broken(path):
        raise OSError(errno.EIO, "Input/output error")

    def work(number: int, unsynced: Unsynced) -> int:
        if number == 1:
            raise InputError("odd")
        unsynced.add(tmp_path / "file", tmp_path)
        return 1

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

    def work(number: int, unsynced: Unsynced) -> int:
        unsynced.add(tmp_path / "file", tmp_path)
        return no_room() if where == "work" else 1

    (tmp_path / "journal").mkdir()
    if where == "sync":
        monkeypatch.setattr(files, "fsync_path", no_room)
    with pytest.raises(OSError, match="No space left"):
        run_journalled(tmp_path / "journal", range(3), work)
    assert not Journal(tmp_path / "journal").failed()
