"""Journals and snapshots that are damaged, or made to do harm."""

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agq.blockwise.journal.reader import Journal, compact
from agq.blockwise.journal.records import BadLineError, BlockRecord, WorkerInfo, decode, encode
from agq.blockwise.journal.snapshot import SNAPSHOT, SnapshotError
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.storage.arrays import save_arrays
from agq.errors import InputError
from tests.helpers.fuzz import (
    attack,
    odd_bytes,
    odd_document,
    odd_text,
    require_one_line,
)

WORKER = WorkerInfo("w", "host", 7, device="cuda:0", gpu="H200", gpu_bytes=1 << 37)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with JournalWriter(tmp_path, WORKER) as writer:
        writer.finish_many(
            BlockRecord(n, "done", started=1000.0 + n, finished=1001.0 + n, labels=3, voxels=9)
            for n in range(20)
        )
        writer.finish(BlockRecord(30, "failed", error="no", roi=((0, 0, 0), (1, 1, 1))))
        writer.finish(BlockRecord(31, "skipped", reason="mask"))
        writer.begin(40)
    return tmp_path


def everything(folder: Path, **how: Any) -> None:
    """Ask a journal for all that commands ask of it."""
    journal = Journal(folder, **how)
    journal.refresh()
    progress = journal.progress(None, 2000.0)
    json.dumps(progress, allow_nan=False)
    assert all(abs(n) < 2**63 for n in progress.values() if isinstance(n, int))
    list(journal.records())
    list(journal.reasons())
    for block in range(50):
        journal.record(block)
    journal.running(), journal.rows, journal.revision, journal.duplicates, journal.conflicts
    try:
        journal.done(100)
    except InputError as error:
        assert "another grid" in str(error)  # noqa: PT017
    assert all(math.isfinite(w.last) for w in journal.workers.values())


def lines_of(folder: Path) -> tuple[Path, bytes]:
    (file,) = folder.glob("*.jsonl")
    return file, file.read_bytes()


def checked(line: bytes, rng: random.Random) -> bytes:
    """Return a line with wrong values, whose checksum is right."""
    document = odd_document(rng, json.loads(line))
    fields = document if isinstance(document, dict) else {"event": document}
    fields.pop("crc", None)
    head = {key: fields.pop(key, 0) for key in ("event", "time", "token")}
    try:
        return encode(str(head["event"]), float(head["time"]), str(head["token"]), fields)
    except (TypeError, ValueError, OverflowError):
        return encode("block", 1.0, str(head["token"]), fields)


@pytest.mark.fuzz
def test_lines_with_wrong_values(folder):
    file, text = lines_of(folder)
    lines = text.splitlines()

    def look(line: bytes) -> None:
        file.write_bytes(text + line)
        everything(folder)

    attack(look, lambda rng: checked(rng.choice(lines), rng), 250)


@pytest.mark.fuzz
def test_damaged_journals(folder):
    file, text = lines_of(folder)

    def look(data: bytes) -> None:
        file.write_bytes(data)
        everything(folder)

    attack(look, lambda rng: odd_text(rng, text), 100)


@pytest.mark.fuzz
@pytest.mark.parametrize("lazy", [False, True], ids=["whole", "lazy"])
def test_damaged_snapshots(folder, lazy):
    compact(folder)
    file = folder / SNAPSHOT
    whole = file.read_bytes()
    with np.load(file) as archive:
        members = dict(archive)
    meta = json.loads(members["meta"].tobytes())

    def case(rng: random.Random) -> bytes | dict[str, Any]:
        kind = rng.random()
        if kind < 0.3:
            return odd_bytes(rng, whole)
        changed = dict(members)
        if kind < 0.7:
            text = json.dumps(odd_document(rng, meta)).encode()
            changed["meta"] = np.frombuffer(text, np.uint8)
            return changed
        name = rng.choice(sorted(members))
        column = members[name]
        some = np.zeros(rng.choice((0, 1, 3)), rng.choice((column.dtype, np.float32, "U3")))
        wrong = [some, column[::-1], column[:, None], column[:3]]
        if column.dtype.kind in "iuf":
            wrong += [np.full_like(column, n) for n in (0, 1, 200)]
            wrong += [column.astype(np.int16), np.full(column.shape, -1).astype(column.dtype)]
        changed[name] = rng.choice(wrong)
        return changed

    def look(case: bytes | dict[str, Any]) -> None:
        if isinstance(case, bytes):
            file.write_bytes(case)
        else:
            save_arrays(file, case)
        try:
            everything(folder, lazy=lazy)
        except SnapshotError:
            assert lazy
            everything(folder)

    attack(look, case, 150)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e18, 2**70, -(2**70), 10**400])
@pytest.mark.parametrize("name", ["started", "finished", "write_s", "labels", "voxels", "attempt"])
def test_numbers_that_nothing_has(folder, name, value):
    file, text = lines_of(folder)
    record = {"block": 5, "state": "done", name: value}
    if name in ("labels", "voxels", "attempt") and value == 1e18:
        record[name] = 2**63
    file.write_bytes(text + encode("block", 1.0, "t", record))
    before = Journal(folder).garbage
    assert before == 1
    everything(folder)


@pytest.mark.parametrize("value", [math.inf, math.nan, 2**70])
def test_times_and_blocks_of_lines_that_nothing_has(folder, value):
    with pytest.raises(BadLineError):
        decode(encode("begin", 1.0, "t", {"block": 5}).replace(b"1.0", json.dumps(value).encode()))
    file, text = lines_of(folder)
    file.write_bytes(text + encode("begin", 1.0, "t", {"block": value, "attempt": value}))
    assert Journal(folder).garbage == 1
    worker = {"name": "w", "host": "h", "pid": 2**70, "started": value, "gpu_bytes": 2**70}
    file.write_bytes(text + encode("worker", 1.0, "t", {"worker": worker}))
    everything(folder)


def test_a_line_without_end_is_refused_and_not_read(folder):
    file = folder / "long.jsonl"
    file.touch()
    os.truncate(file, 2**30)
    line = require_one_line(lambda: Journal(folder))
    assert f"{file}: a line of more than" in line


@pytest.mark.parametrize("name", ["a.jsonl", SNAPSHOT])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop"])
def test_what_is_no_file_among_the_files_of_a_journal(folder, name, kind):
    file = folder / name
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else name)
    if name == SNAPSHOT:  # passed over
        everything(folder)
    else:
        line = require_one_line(lambda: Journal(folder), OSError)
        assert name in line


def test_a_snapshot_cannot_name_files_elsewhere(folder, tmp_path_factory):
    compact(folder)
    with np.load(folder / SNAPSHOT) as archive:
        members = dict(archive)
    outside = tmp_path_factory.mktemp("outside") / "fifo"
    os.mkfifo(outside)
    meta = json.loads(members["meta"].tobytes())
    meta["sources"] = [[os.path.relpath(outside, folder), token] for _, token in meta["sources"]]
    members["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    save_arrays(folder / SNAPSHOT, members)
    everything(folder, lazy=True)


def test_a_snapshot_of_compressed_zeros_is_passed_over(folder):
    compact(folder)
    with np.load(folder / SNAPSHOT) as archive:
        members = dict(archive)
    members["block"] = np.zeros(2**22, np.int64)
    np.savez_compressed(folder / SNAPSHOT, **members)
    assert (folder / SNAPSHOT).stat().st_size < 2**17
    assert require_one_line(lambda: everything(folder)) == ""
