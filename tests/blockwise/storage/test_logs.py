"""What a process prints is kept within bounds, whoever opened its file and whoever prints."""

import subprocess
import sys

import pytest

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


def test_what_is_no_file_is_left_alone():
    command = [sys.executable, "-c", PRINT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("line") == 3000
