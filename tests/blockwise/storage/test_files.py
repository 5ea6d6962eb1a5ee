"""Durable files."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from agq.blockwise.storage import files
from agq.errors import InputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_atomic_writes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "file.bin"
    files.write_atomic(target, b"one")
    files.write_atomic(target, memoryview(b"second"))
    assert target.read_bytes() == b"second"
    assert names(target.parent) == ["file.bin"]


def test_write_atomic_leaves_the_old_file_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    files.write_atomic(target, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_write_atomic_by_many_threads_is_always_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    contents = {bytes([i]) * (1000 + i) for i in range(8)}
    threads = [
        threading.Thread(target=lambda d=data: [files.write_atomic(target, d) for _ in range(20)])
        for data in contents
    ]
    files.write_atomic(target, next(iter(contents)))
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert target.read_bytes() in contents
    assert names(tmp_path) == ["file"]


def test_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    code = (
        "import sys; from agq.blockwise.storage.files import write_atomic\n"
        "n = 0\n"
        "while True:\n"
        "    n = (n + 1) % 250; write_atomic(sys.argv[1], bytes([n]) * 3_000_000)\n"
    )
    for attempt in range(4):
        writer = subprocess.Popen([sys.executable, "-c", code, str(target)])
        until = time.monotonic() + 60
        while not target.exists():
            assert writer.poll() is None
            assert time.monotonic() < until
            time.sleep(0.005)
        time.sleep(0.1 + 0.037 * attempt + 0.4 * (attempt > 0))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        data = target.read_bytes()
        assert len(data) == 3_000_000
        assert len(set(data)) == 1


def test_make_folder(tmp_path: Path) -> None:
    assert files.make_folder(tmp_path / "x" / "y").is_dir()
    files.make_folder(tmp_path / "x" / "y")


def test_fsync_path_takes_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1")
    files.fsync_path(tmp_path / "f")
    files.fsync_path(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.fsync_path(tmp_path / "missing")


def test_checksum_is_blake2b_of_the_c_order_bytes() -> None:
    expected = hashlib.blake2b(b"abc", digest_size=8).hexdigest()
    assert files.checksum(b"abc") == expected == files.checksum(np.frombuffer(b"abc", np.uint8))
    array = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    assert files.checksum(array) == files.checksum(array.tobytes())
    assert files.checksum(np.asfortranarray(array)) == files.checksum(array)
    assert files.checksum(array[:, ::2]) == files.checksum(array[:, ::2].tobytes())
    assert files.checksum(np.zeros((0, 3))) == files.checksum(b"")
    assert files.checksum(np.array(7, np.uint8)) == files.checksum(b"\x07")


def test_free_space_of_a_path_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert files.free_space(tmp_path / "not" / "yet") > 0
    files.require_free_space(tmp_path / "not", 1)
    with pytest.raises(InputError, match=r"^output\.run: .* needs about .*TiB, but its disk"):
        files.require_free_space(tmp_path, 2**63, "output.run")


def test_require_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="No such file"):
        files.require_writable(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    files.require_writable(tmp_path / "new", create=True)
    assert names(tmp_path / "new") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"output: .*file exists and is not a folder"):
        files.require_writable(tmp_path / "file", create=True)
    with pytest.raises(InputError, match=r"a parent of .* is a file"):
        files.require_writable(tmp_path / "file" / "below", create=True)
    with pytest.raises(InputError, match=r"cannot write in /proc/agq"):
        files.require_writable("/proc/agq", create=True)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match="disk is full"):
        files.require_writable(tmp_path)
    assert names(tmp_path) == ["file", "new"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(5, "5 B"), (2048, "2.0 KiB"), (3 * 2**30, "3.0 GiB"), (2**42, "4.0 TiB")],
)
def test_format_bytes(count: int, text: str) -> None:
    assert files.format_bytes(count) == text


@pytest.mark.parametrize("kind", ["link", "link to nothing", "FIFO", "folder"])
def test_a_file_that_is_written_on_is_no_link(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(other)
        if kind == "link":
            other.write_text("precious")
    for flags in (os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_TRUNC, os.O_RDWR):
        with pytest.raises((InputError, OSError)):
            os.close(files.descriptor_of(path, flags))
    assert (other.read_text() if other.exists() else None) == (
        "precious" if kind == "link" else None
    )
    with os.fdopen(files.descriptor_of(tmp_path / "new", os.O_WRONLY), "wb") as file:
        file.write(b"x")
