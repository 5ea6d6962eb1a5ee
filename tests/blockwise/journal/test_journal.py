import json
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.journal.reader import Journal, compact
from agq.blockwise.journal.records import (
    MAX_TEXT,
    BadLineError,
    BlockRecord,
    WorkerInfo,
    decode,
    encode,
)
from agq.blockwise.journal.snapshot import SNAPSHOT
from agq.blockwise.journal.tail import JournalTail
from agq.blockwise.journal.writer import JournalWriter
from agq.errors import InputError
from tests.helpers.runs import kill_after

WORKER = WorkerInfo(name="w0", host="node 1/ä", pid=12, device="cuda:1", job="77", started=1.5)
RECORD = BlockRecord(
    block=5,
    state="done",
    attempt=2,
    started=10.0,
    finished=12.5,
    read_s=0.5,
    compute_s=1.5,
    write_s=0.25,
    labels=7,
    components=9,
    dropped=2,
    voxels=1000,
    sums={"fragments": "ab12", "sidecar": "cd34"},
    roi=((0, 60, 120), (30, 6, 6)),
)


def meaning(journal: Journal) -> dict:
    """Everything a journal says that must not depend on how it was read."""
    rows = np.sort(journal.rows, order="block")
    names = ("block", "rank", "attempt", "finished", "labels", "digest")
    return {
        "rows": [tuple(row) for row in rows[list(names)].tolist()],
        "failed": journal.failed(),
        "duplicates": journal.duplicates,
        "conflicts": journal.conflicts,
        "garbage": journal.garbage,
        "torn": journal.tail.torn,
        "running": journal.running(),
        "workers": journal.workers,
        "records": list(journal.records()),
    }


def test_record_round_trip(tmp_path):
    with JournalWriter(tmp_path, WORKER) as writer:
        writer.begin(5, 2)
        assert Journal(tmp_path).running()[5][:2] == (writer.token, 2)
        writer.finish(RECORD)
    journal = Journal(tmp_path)
    expected = replace(RECORD, token=writer.token, worker="w0")
    assert journal.record(5) == expected
    assert list(journal.records()) == [expected]
    assert journal.running() == {}
    assert journal.record(5).state == "done"
    assert journal.record(6) is None
    state = journal.workers[writer.token]
    assert state.info == WORKER
    assert (state.done, state.failed, state.voxels, state.exit) == (1, 0, 1000, "end")
    assert journal.counts() == {"done": 1, "skipped": 0, "failed": 0}


def test_file_name_is_safe_and_one_per_process(tmp_path):
    names = {JournalWriter(tmp_path, WORKER).path.name for _ in range(3)}
    assert len(names) == 3
    assert all(name.startswith("node_1_-12-") for name in names)


def test_missing_folder_is_empty(tmp_path):
    journal = Journal(tmp_path / "none")
    assert journal.refresh() == []
    assert not journal.done(4).any()
    assert compact(tmp_path / "none") is None


def test_refresh_returns_only_what_is_new(tmp_path):
    writer = JournalWriter(tmp_path, WORKER)
    journal = Journal(tmp_path)
    writer.begin(1)
    writer.finish(BlockRecord(1, "done"))
    assert [e.kind for e in journal.refresh()] == ["begin", "block"]
    assert journal.refresh() == []
    other = JournalWriter(tmp_path, WORKER)
    other.finish(BlockRecord(2, "skipped", reason="mask"))
    assert [e.kind for e in journal.refresh()] == ["worker", "block"]
    assert journal.done(3).tolist() == [False, True, True]
    assert journal.record(2).reason == "mask"


@pytest.mark.parametrize("order", [("done", "failed"), ("failed", "done")])
def test_done_beats_skipped_beats_failed(tmp_path, order):
    writer = JournalWriter(tmp_path, WORKER)
    for time, state in enumerate(order):
        writer.finish(BlockRecord(1, state, finished=float(time), error="boom"))
        other = "skipped" if state == "done" else state
        writer.finish(BlockRecord(2, other, finished=float(time)))
    journal = Journal(tmp_path)
    assert journal.record(1).state == "done"
    assert journal.record(2).state == "skipped"
    assert journal.failed() == []


def test_failure_keeps_its_text_and_a_later_done_drops_it(tmp_path):
    writer = JournalWriter(tmp_path, WORKER)
    text = "line 1\nline 2 \udcff é " + "x" * (2 * MAX_TEXT) + "end"
    writer.finish(BlockRecord(3, "failed", error=text, reason="NaN", roi=((0, 0, 0), (1, 2, 3))))
    journal = Journal(tmp_path)
    (failed,) = journal.failed()
    assert failed.error.endswith("xend")
    assert len(failed.error) < MAX_TEXT + 20
    assert failed.roi == ((0, 0, 0), (1, 2, 3))
    assert not journal.done(4)[3]
    writer.finish(BlockRecord(3, "done", attempt=2))
    journal.refresh()
    assert journal.failed() == []
    assert journal.done(4)[3]


def test_duplicates_and_conflicts(tmp_path):
    a, b = (JournalWriter(tmp_path, WORKER) for _ in range(2))
    a.finish(BlockRecord(1, "done", sums={"f": "x"}, finished=1.0))
    a.finish(BlockRecord(1, "done", sums={"f": "x"}, finished=1.0))
    assert Journal(tmp_path).duplicates == []
    b.finish(BlockRecord(1, "done", sums={"f": "x"}, finished=2.0))
    a.finish(BlockRecord(2, "done", sums={"f": "x"}, finished=3.0))
    b.finish(BlockRecord(2, "done", sums={"f": "y"}, finished=1.0))
    a.finish(BlockRecord(3, "done", finished=3.0))
    journal = Journal(tmp_path)
    assert journal.duplicates == [1, 2]
    assert journal.conflicts == [2]
    assert journal.record(1).token == b.token, "the later writer is on disk"
    assert journal.record(2).token == a.token


def test_torn_tail_at_every_byte(tmp_path):
    with JournalWriter(tmp_path / "whole", WORKER) as writer:
        for block in range(3):
            writer.begin(block)
            writer.finish(replace(RECORD, block=block))
    data = writer.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    lines = [decode(line) for line in data.splitlines()]
    for cut in range(len(data) + 1):
        folder = tmp_path / "cut"
        folder.mkdir(exist_ok=True)
        (folder / writer.path.name).write_bytes(data[:cut])
        journal = Journal(folder)
        whole = [e for e, end in zip(lines, ends, strict=True) if end <= cut]
        done = [e.data["block"] for e in whole if e.kind == "block"]
        assert np.flatnonzero(journal.done(3)).tolist() == done
        assert journal.tail.torn == (cut not in (0, *ends))
        assert journal.garbage == 0
    # A new file of the same worker follows a torn one: both count.
    (folder / writer.path.name).write_bytes(data[: ends[-2] - 1])
    journal = Journal(folder)
    JournalWriter(folder, WORKER).finish(BlockRecord(2, "done"))
    journal.refresh()
    assert journal.done(3).all()
    assert journal.tail.torn == 1


def test_half_a_line_is_read_when_its_rest_arrives(tmp_path):
    line = encode("block", 1.0, "aa", BlockRecord(1, "done").to_dict())
    path = tmp_path / "h-1-aa.jsonl"
    path.write_bytes(line[:20])
    journal = Journal(tmp_path)
    assert journal.tail.torn == 1
    with path.open("ab") as file:
        file.write(line[20:])
    assert len(journal.refresh()) == 1
    assert (journal.tail.torn, journal.garbage) == (0, 0)
    assert journal.done(2)[1]


def test_damaged_lines_are_counted_and_passed_over(tmp_path):
    good = [encode("block", 1.0, "aa", BlockRecord(b, "done").to_dict()) for b in range(3)]
    flipped = good[1].replace(b'"block":1', b'"block":2')
    future = encode("block", 1.0, "aa", BlockRecord(7, "done").to_dict() | {"colour": [1]})
    unknown = encode("lease", 1.0, "aa", {"block": 9})
    wrong = [
        encode("block", 1.0, "aa", {"block": 8, "state": "gone"}),
        encode("block", 1.0, "aa", {"block": -1, "state": "done"}),
        encode("block", 1.0, "aa", {"block": 2**70, "state": "done"}),
        encode("block", 1.0, "aa", {"block": [1], "state": "done"}),
        encode("block", 1.0, "aa", {"state": "done"}),
        b"\0" * 50 + b"\n",
        b'{"event":"block","block":4,"state":"done"}\n',
        b"\xff\xfe\r garbage \n",
        flipped,
    ]
    data = b"".join([good[0], *wrong, b"\n", future, unknown, good[2]])
    (tmp_path / "h-1-aa.jsonl").write_bytes(data)
    journal = Journal(tmp_path)
    assert np.flatnonzero(journal.done(10)).tolist() == [0, 2, 7]
    assert journal.garbage == len(wrong)
    assert journal.workers["aa"].info.host == "h", "the worker line may be missing"


def test_numbers_beyond_their_column_are_clipped_not_lost(tmp_path):
    record = BlockRecord(1, "done", attempt=10**6, labels=2**40, dropped=-1)
    JournalWriter(tmp_path, WORKER).finish(record)
    journal = Journal(tmp_path)
    assert journal.record(1).state == "done"
    assert journal.rows["labels"][0] == 2**32 - 1
    assert journal.record(1).labels == 2**40


def test_bad_records_are_refused_when_made():
    with pytest.raises(BadLineError, match="state"):
        BlockRecord(1, "running")  # type: ignore[arg-type]
    with pytest.raises(BadLineError, match="range"):
        BlockRecord(-1, "done")


def test_other_grid_is_refused(tmp_path):
    JournalWriter(tmp_path, WORKER).finish(BlockRecord(10, "done"))
    with pytest.raises(InputError, match="another grid"):
        Journal(tmp_path).done(10)


def test_ranks_of_sparse_blocks(tmp_path):
    blocks = [0, 1023, 1024, 5_000_000_000, 2**62]
    JournalWriter(tmp_path, WORKER).finish_many(BlockRecord(b, "skipped") for b in blocks)
    journal = Journal(tmp_path)
    asked = np.array([2**62, 7, 1024, 5_000_000_001, 0, 5_000_000_000, 2**40])
    assert journal.ranks(asked).tolist() == [2, 0, 2, 0, 2, 2, 0]
    assert journal.ranks(np.array([], np.int64)).tolist() == []


def test_threads_share_a_writer(tmp_path):
    writer = JournalWriter(tmp_path, WORKER)

    def work(start: int) -> None:
        for block in range(start, 400, 4):
            writer.begin(block)
            writer.finish(BlockRecord(block, "done"))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal = Journal(tmp_path)
    assert journal.done(400).all()
    assert (journal.garbage, journal.tail.torn) == (0, 0)


def test_write_cut_short_does_not_spoil_the_next_line(tmp_path):
    """A full disk is a file size limit here: the write ends in the middle, then room is made."""
    code = """
import resource, signal, sys
from pathlib import Path
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = JournalWriter(Path(sys.argv[1]), WorkerInfo("w", "h", 1))
writer.finish(BlockRecord(0, "done"))
size = writer.path.stat().st_size
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, unlimited[1]))
writer.begin(1)
try:
    writer.finish(BlockRecord(1, "done"))
except OSError as error:
    print("refused", error.filename == str(writer.path))
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
writer.finish(BlockRecord(2, "done"))
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert out.stdout == "refused True\n"
    journal = Journal(tmp_path)
    assert journal.done(3).tolist() == [True, False, True]
    assert (journal.garbage, journal.tail.torn) == (1, 0)


def test_sigkill_loses_no_finished_block(tmp_path):
    code = """
import sys
from pathlib import Path
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
writer = JournalWriter(Path(sys.argv[1]), WorkerInfo("w", "h", 1))
for block in range(10**6):
    writer.begin(block)
    writer.finish(BlockRecord(block, "done", error="x" * 3000))
    sys.stdout.write(f"{block}\\n")
    sys.stdout.flush()
"""
    rest = kill_after(300, code, tmp_path).split("\n")
    last = max([299, *(int(n) for n in rest[:-1])])
    journal = Journal(tmp_path)
    done = journal.done(10**6)
    assert done[: last + 1].all()
    assert done.sum() <= last + 2
    (worker,) = journal.workers.values()
    assert worker.exit is None


def test_poll_is_bounded(tmp_path):
    writer = JournalWriter(tmp_path, WORKER)
    writer.finish_many(BlockRecord(b, "done", error="x" * 500) for b in range(2000))
    tail = JournalTail(tmp_path)
    sizes = []
    while events := tail.poll(limit=100_000):
        sizes.append(len(events))
    assert sum(sizes) == 2001
    assert max(sizes) < 300
    # A line longer than the limit still comes through.
    tail = JournalTail(tmp_path)
    assert sum(len(events) for events in iter(lambda: tail.poll(limit=10), [])) == 2001
    # From saved positions, nothing is read twice.
    assert JournalTail(tmp_path, tail.positions).poll() == []


def test_snapshot_equals_lines_and_is_only_a_cache(tmp_path):
    a, b = (JournalWriter(tmp_path, WORKER) for _ in range(2))
    for block in range(50):
        a.begin(block)
        a.finish(replace(RECORD, block=block, state="failed" if block % 7 == 0 else "done"))
    b.finish(replace(RECORD, block=8, sums={"fragments": "other"}))
    b.begin(60)
    with b.path.open("ab") as file:
        file.write(b"garbage\n")
    a.close()
    lines = meaning(Journal(tmp_path, use_snapshot=False))
    snapshot = compact(tmp_path)
    assert snapshot == tmp_path / SNAPSHOT
    assert meaning(Journal(tmp_path)) == lines
    assert lines["conflicts"] == [8]
    # Going on after a snapshot, and a snapshot of a snapshot.
    journal = Journal(tmp_path)
    b.finish(BlockRecord(0, "done", sums={"fragments": "late"}))
    journal.refresh()
    lines = meaning(Journal(tmp_path, use_snapshot=False))
    assert meaning(journal) == lines
    compact(tmp_path)
    assert meaning(Journal(tmp_path)) == lines
    # A damaged, foreign or newer snapshot is passed over.
    good = snapshot.read_bytes()
    middle = len(good) // 2
    bad = [b"", good[:middle], b"nonsense", good[:middle] + bytes(64) + good[middle + 64 :]]
    for data in bad:
        snapshot.write_bytes(data)
        assert meaning(Journal(tmp_path)) == lines
    with np.load(compact(tmp_path)) as archive:
        arrays = dict(archive)
    meta = json.loads(arrays["meta"].tobytes())
    arrays["meta"] = np.frombuffer(json.dumps(meta | {"version": 99}).encode(), np.uint8)
    np.savez(snapshot, **arrays)
    assert meaning(Journal(tmp_path)) == lines


def test_a_stage_that_was_started_over_is_noticed(tmp_path):
    """Also when the new one has a snapshot of its own, as it has after some thousand blocks."""

    def begin(blocks: range) -> Journal:
        with JournalWriter(tmp_path, WORKER) as writer:
            writer.finish_many(BlockRecord(n, "done") for n in blocks)
        return Journal(tmp_path)

    reader = begin(range(9))
    reader.save()
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    assert not reader.replaced(), "the snapshot stands for the lines"
    for file in tmp_path.iterdir():
        file.unlink()
    assert reader.replaced()
    begin(range(2)).save()
    assert reader.replaced()


def test_snapshot_outlives_the_lines(tmp_path):
    with JournalWriter(tmp_path, WORKER) as writer:
        writer.finish(RECORD)
        writer.finish(BlockRecord(6, "failed", error="boom", roi=((0, 0, 0), (1, 1, 1))))
        writer.finish(BlockRecord(7, "skipped", reason="mask"))
    compact(tmp_path)
    writer.path.unlink()
    journal = Journal(tmp_path)
    assert journal.counts() == {"done": 1, "skipped": 1, "failed": 1}
    assert journal.failed()[0].error == "boom"
    assert journal.record(7).reason == "mask"
    lost = journal.record(5)
    assert lost == replace(RECORD, token=writer.token, worker="w0", sums={}, roi=None)


STATES = st.sampled_from(["done", "skipped", "failed"])
LINES = st.lists(
    st.tuples(
        st.integers(0, 2),  # writer
        st.sampled_from(["begin", "block", "block", "block", "exit", "garbage"]),
        st.integers(0, 4),  # block
        STATES,
        st.integers(1, 3),  # attempt
        st.integers(0, 3),  # finished
        st.sampled_from(["x", "y"]),  # checksum
    ),
    max_size=30,
)


def line_of(item, time: float) -> bytes:
    writer, kind, block, state, attempt, finished, checksum = item
    token = f"t{writer}"
    if kind == "garbage":
        return b'{"event":"block"\n'
    if kind == "block":
        record = BlockRecord(
            block, state, attempt, token, finished=float(finished), sums={"f": checksum}
        )
        return encode("block", time, token, record.to_dict())
    return encode(kind, time, token, {"block": block, "attempt": attempt})


@settings(max_examples=80, deadline=None)
@given(items=LINES, data=st.data())
def test_any_interleaving_means_the_same(tmp_path_factory, items, data):
    """Cut the writes anywhere, read and compact at any time: the end is what a plain model says."""
    folder = tmp_path_factory.mktemp("journal")
    # After its exit a writer writes nothing more.
    ended: set[int] = set()
    kept = []
    for item in items:
        if item[0] not in ended:
            kept.append(item)
        if item[1] == "exit":
            ended.add(item[0])
    streams = dict.fromkeys(range(3), b"")
    for time, item in enumerate(kept):
        streams[item[0]] += line_of(item, float(time))
    repeat = data.draw(st.booleans())
    journal = Journal(folder)
    sent = dict.fromkeys(streams, 0)
    for _ in range(data.draw(st.integers(0, 8))):
        writer = data.draw(st.integers(0, 2))
        size = data.draw(st.integers(0, 400))
        piece = streams[writer][sent[writer] : sent[writer] + size]
        with (folder / f"h-{writer}-t{writer}.jsonl").open("ab") as file:
            file.write(piece)
        sent[writer] += len(piece)
        action = data.draw(st.sampled_from(["refresh", "compact", "reopen", "nothing"]))
        if action == "refresh":
            journal.refresh()
        elif action == "compact":
            compact(folder)
        elif action == "reopen":
            journal = Journal(folder)
    for writer, stream in streams.items():
        with (folder / f"h-{writer}-t{writer}.jsonl").open("ab") as file:
            file.write(stream[sent[writer] :])
    journal.refresh()

    records = [decode(line_of(i, 0.0)).record for i in kept if i[1] == "block"]
    best: dict[int, BlockRecord] = {}
    for record in records:
        if record.block not in best or record.order > best[record.block].order:
            best[record.block] = record
    done = {
        b: {(r.token, r.sums["f"]) for r in records if (r.block, r.state) == (b, "done")}
        for b in best
    }
    for reader in (journal, Journal(folder), Journal(folder, use_snapshot=False)):
        assert {r.block: r.order for r in reader.records()} == {b: r.order for b, r in best.items()}
        assert [r.block for r in reader.failed()] == sorted(
            b for b, r in best.items() if r.state == "failed"
        )
        assert reader.duplicates == sorted(
            b for b, keys in done.items() if len({k[0] for k in keys}) > 1
        )
        assert reader.conflicts == sorted(
            b for b, keys in done.items() if len({k[1] for k in keys}) > 1
        )
        assert reader.garbage == sum(i[1] == "garbage" for i in kept)
        assert reader.tail.torn == 0
    if repeat:
        # The same lines again under another file name, as a copied folder would have them.
        before = [r.order for r in journal.records()], journal.duplicates, journal.conflicts
        for writer, stream in streams.items():
            (folder / f"copy-{writer}-t{writer}.jsonl").write_bytes(stream)
        journal.refresh()
        assert ([r.order for r in journal.records()], journal.duplicates, journal.conflicts) == (
            before
        )
