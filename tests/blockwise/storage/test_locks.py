"""Locks: one holder, with and without flock, on one machine and on several; none left for ever."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from agq.blockwise.storage import locks
from agq.errors import InputError

HOLDER = """
import errno, fcntl, os, sys
from pathlib import Path
from agq.blockwise.storage import locks
def refuse(*_):
    raise OSError(int(sys.argv[2]), os.strerror(int(sys.argv[2])))
if sys.argv[2] != "0":
    fcntl.flock = refuse
locks._RENEW_S = 0.05
with locks.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(lock, refusal=0):
    """Hold a lock in another process, whose flock fails with this error."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock), str(refusal)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n", process.stderr.read()
        yield process
        process.kill()


@pytest.fixture
def no_flock(monkeypatch):
    """Let flock fail as file systems without it do."""

    def fail_with(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    fail_with(errno.ENOLCK)
    return fail_with


def owner_of_another_machine(lock, host="far"):
    lock.touch()
    file = lock.with_name(lock.name + ".owner")
    file.write_text(f"host {host}, pid 7\nboot\npids\n7 1.00\nFalse\nword")
    return file


@pytest.mark.parametrize("refusals", [(0, 0), (0, errno.ENOLCK), (errno.ENOSYS, 0), (95, 37)])
def test_one_process_holds_it_and_its_death_frees_it(tmp_path, no_flock, monkeypatch, refusals):
    """Also if only one of two mounts of a file system has flock."""
    lock = tmp_path / ".lock"
    there, here = refusals
    if here:
        no_flock(here)
    else:
        monkeypatch.undo()
    with holder(lock, there) as process:
        with pytest.raises(locks.LockedError, match=f"pid {process.pid}"), locks.hold(lock):
            pass
        assert locks.is_held(lock) is True or (there and not here)
        process.kill()
        process.wait()
        start = time.monotonic()
        with locks.hold(lock):
            assert time.monotonic() - start < 3
            assert (tmp_path / ".lock.owner").exists()
    assert locks.is_held(lock) is False
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_a_living_owner_on_another_machine_keeps_it(tmp_path, no_flock):
    lock = tmp_path / ".lock"
    file = owner_of_another_machine(lock)
    over = threading.Event()

    def renew():
        while not over.wait(0.05):
            os.utime(file)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(locks.LockedError, match="host far, pid 7"), locks.hold(lock):
            pass
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("content", [None, "", "host far, pid 7\nbo"])
def test_what_another_machine_left_is_free_after_a_while(tmp_path, no_flock, monkeypatch, content):
    monkeypatch.setattr(locks, "_STALE_S", 0.2)
    monkeypatch.setattr(locks, "_SETTLE_S", 0.0)
    lock = tmp_path / ".lock"
    file = owner_of_another_machine(lock)
    if content is not None:
        file.write_text(content)
    with locks.hold(lock):
        assert file.read_text().startswith("host ")
    assert not file.exists()


def test_a_reused_process_id_is_no_owner(tmp_path, no_flock, monkeypatch):
    monkeypatch.setattr(locks, "_SETTLE_S", 0.0)
    lock = tmp_path / ".lock"
    kernel, pids = locks._kernel()
    file = owner_of_another_machine(lock)
    file.write_text(f"host here, pid 1\n{kernel}\n{pids}\n1 17.00\nFalse\nword")
    with locks.hold(lock):
        pass


def test_a_waiting_process_gets_it(tmp_path, no_flock):
    lock = tmp_path / ".lock"
    with holder(lock, errno.ENOLCK) as process:
        threading.Timer(0.5, process.kill).start()
        with locks.hold(lock, wait=True):
            assert process.wait() < 0


def test_a_process_that_lost_it_ends(tmp_path):
    lock = tmp_path / ".lock"
    with holder(lock, errno.ENOLCK) as process:
        owner_of_another_machine(lock)
        assert process.wait(timeout=10) == 1
        assert "no longer of this process" in process.stderr.read()
    assert locks._owner_path(lock).read_text().startswith("host far")


def test_other_errors_are_passed_on(tmp_path, no_flock):
    no_flock(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), locks.hold(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize("name", ["lock", "lock.owner"])
@pytest.mark.parametrize("kind", ["link", "link to nothing", "FIFO", "folder"])
def test_no_lock_leads_to_another_file(tmp_path, name, kind):
    """Whoever may write to the folder could let a lock empty a file of its holder."""
    other = tmp_path / "other"
    if kind == "FIFO":
        os.mkfifo(tmp_path / name)
    elif kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to(other)
        if kind == "link":
            other.write_text("precious")
    with pytest.raises((InputError, OSError)), locks.hold(tmp_path / "lock"):
        pass
    assert locks.is_held(tmp_path / "lock") in (None, False)
    assert other.exists() == (kind == "link")
    if kind == "link":
        assert other.read_text() == "precious"
