"""What a process prints is kept within bounds, whoever opened its file and whoever prints."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agq.blockwise.storage import logs
from agq.errors import InputError

PRINT = """
import ctypes, os, sys, time
from agq.blockwise.storage import logs
logs._LOOK_S = 0.01
logs.cap_output(10_000)
for i in range(3000):
    print("line", i, flush=True)
    os.write(2, b"of C code\\n")
    if i % 100 == 0:
        time.sleep(0.02)
time.sleep(0.1)
print("the end", flush=True)
"""


@pytest.mark.parametrize("mode", ["ab", "wb"])
def test_a_log_starts_anew_and_its_end_is_kept(tmp_path, mode):
    log = tmp_path / "worker-0.log"
    with log.open(mode) as output:
        command = [sys.executable, "-c", PRINT]
        subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["worker-0.log", "worker-0.log.1"]
    text = log.read_bytes()
    assert text.endswith(b"the end\n")
    assert b"\0" not in text
    older = (tmp_path / "worker-0.log.1").read_bytes()
    assert 5_000 < len(older) <= 10_000
    assert len(text) < 20_000
    assert b"of C code" in older


def test_the_older_part_of_a_log_leads_to_no_other_file(tmp_path):
    other = tmp_path / "other"
    other.write_text("precious")
    (tmp_path / "worker-0.log.1").symlink_to(other)
    log = tmp_path / "worker-0.log"
    log.write_bytes(bytes(100))
    with log.open("ab") as output:
        logs._start_anew(output.fileno(), 50)
    assert (log.stat().st_size, other.read_text()) == (0, "precious")


def test_what_is_no_file_is_left_alone():
    command = [sys.executable, "-c", PRINT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("line") == 3000


def _trap(run, kind, secret):
    """Put something under the name of a log that is no file of the run folder."""
    logs = run / "logs" / "predict"
    log = logs / "worker-0.log"
    if kind in ("link of the folder", "link of the stage"):
        outside = secret.parent / "outside"
        (outside / "predict").mkdir(parents=True)
        (outside / "predict" / log.name).write_text("secret")
        (outside / log.name).write_text("secret")
        if kind == "link of the folder":
            (run / "logs").symlink_to(outside)
        else:
            (run / "logs").mkdir()
            logs.symlink_to(outside)
        return
    logs.mkdir(parents=True)
    if kind == "link":
        log.symlink_to(secret)
    elif kind == "link to a device":
        log.symlink_to("/dev/zero")
    elif kind == "link to nothing":
        log.symlink_to(run / "nothing")
    elif kind == "FIFO":
        os.mkfifo(log)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(str(log))
    else:
        log.mkdir()


@pytest.mark.parametrize(
    "kind",
    [
        *("link", "link of the folder", "link of the stage", "link to a device"),
        *("link to nothing", "FIFO", "socket", "folder"),
    ],
)
def test_what_only_has_the_name_of_a_log_is_not_read(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path may have 107 bytes
    run, secret = Path("run"), tmp_path / "secret"
    secret.write_text("secret")
    run.mkdir()
    _trap(run, kind, secret)
    other = run / "logs" / "worker-1.log"
    other.write_text("mine")
    with pytest.raises((InputError, FileNotFoundError)):
        logs.log_end(run, run / "logs" / "predict" / "worker-0.log", 100)
    if kind == "link of the folder":
        # All logs of it are listed, and refused with a line that names the link.
        with pytest.raises(InputError, match="run/logs is a symbolic link"):
            logs.log_end(run, other, 100)
    else:
        assert logs.log_files(run) == [other]
        assert logs.log_end(run, other, 2) == "ne"
    with pytest.raises(InputError, match="does not lie in"):
        logs.log_end(run, run / "logs" / ".." / ".." / "secret", 100)
