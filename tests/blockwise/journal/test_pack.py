"""A packed journal says what its files said, wherever the packing was cut off."""

import json
from pathlib import Path

import numpy as np
import pytest

from agq.blockwise.journal import pack
from agq.blockwise.journal.pack import pack_journal
from agq.blockwise.journal.reader import Journal, compact
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.tail import PACKED, JournalTail
from agq.blockwise.journal.writer import JournalWriter
from agq.errors import RunGoneError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the journal of three processes, one of which was killed in the middle of a line."""
    folder = tmp_path / "run/journal/predict"
    folder.parents[1].mkdir(parents=True)
    for i in range(3):
        writer = JournalWriter(folder, WorkerInfo(f"w{i}", "node", 1 + i))
        for block in range(10 * i, 10 * i + 12):
            writer.begin(block)
            state = "failed" if block % 5 == 4 else "done"
            record = BlockRecord(block, state, finished=float(block), sums={"f": f"{block:x}"})
            writer.finish(record)
        if i == 1:
            with writer.path.open("ab") as file:
                file.write(b'{"event":"block","blo')
        else:
            writer.close()
    return folder


def said(journal: Journal) -> tuple:
    """What a journal says, but for where it is written."""
    rows = np.sort(journal.rows, order="block")
    names = [name for name in rows.dtype.names or () if name not in ("source", "offset")]
    workers = {token: (w.info, w.done, w.failed, w.exit) for token, w in journal.workers.items()}
    records = [record.to_dict() for record in journal.records()]
    return rows[names].tolist(), workers, json.dumps(records), journal.duplicates, journal.garbage


@pytest.mark.parametrize("compacted", [False, True])
def test_it_says_the_same_in_one_file(folder, compacted):
    if compacted:
        compact(folder)
    before = said(Journal(folder))
    assert pack_journal(folder) == 3
    assert {p.name for p in folder.iterdir()} == {PACKED, "compact.npz"}
    for use_snapshot in (True, False):
        assert said(Journal(folder, use_snapshot=use_snapshot)) == before
    assert pack_journal(folder) == 0
    # In small pieces too: an exit does not end the file for a reader.
    tail, events = JournalTail(folder), 0
    while new := tail.poll(100):
        events += len(new)
    assert events == (folder / PACKED).read_bytes().count(b"\n")


def test_a_resumed_stage_is_packed_again(folder):
    pack_journal(folder)
    with JournalWriter(folder, WorkerInfo("late", "node", 9)) as writer:
        writer.finish(BlockRecord(4, "done", finished=99.0, sums={"f": "4"}))
        writer.finish(BlockRecord(50, "done", finished=99.0))
    before = said(Journal(folder))
    assert pack_journal(folder) == 1
    assert said(Journal(folder)) == before
    assert before == said(Journal(folder, use_snapshot=False))


@pytest.mark.parametrize("at", ["unlink", "fsync_path", "compact"])
def test_cut_off_anywhere_it_is_whole(folder, monkeypatch, at):
    before = said(Journal(folder))

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    if at == "unlink":
        real, gone = Path.unlink, []

        def unlink_one(path: Path, **options) -> None:
            if path.suffix == ".jsonl" and gone:
                stop()
            gone.extend([path] if path.suffix == ".jsonl" else [])
            real(path, **options)

        monkeypatch.setattr(Path, "unlink", unlink_one)
    else:
        monkeypatch.setattr(pack, at, stop)
    with pytest.raises(KeyboardInterrupt):
        pack_journal(folder)
    monkeypatch.undo()
    assert said(Journal(folder))[0] == before[0]
    pack_journal(folder)
    assert said(Journal(folder)) == before


def test_what_only_a_snapshot_knows_is_not_lost(folder):
    compact(folder)
    next(folder.glob("*.jsonl")).unlink()
    before = said(Journal(folder))
    assert pack_journal(folder) == 0
    assert said(Journal(folder)) == before


def test_a_process_that_writes_nevertheless_ends(folder):
    writer = JournalWriter(folder, WorkerInfo("late", "node", 9))
    pack_journal(folder)
    with pytest.raises(RunGoneError):
        writer.finish(BlockRecord(60, "done"))
    assert 60 not in Journal(folder).rows["block"]
