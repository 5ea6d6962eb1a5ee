"""A process does not live on without a thread that it is of no use without."""

import subprocess
import sys

import pytest

from agq.blockwise.threads import EXIT_DISK

CODE = """
import time
from agq.blockwise.threads import start_vital

def work():
    {what}

start_vital("worker", work).join()
time.sleep(0.2)
print("lives")
"""


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ("pass", 0),
        ("1 / 0", 1),
        ("raise SystemExit(0)", 1),
        ("raise OSError(28, 'full')", EXIT_DISK),
        ("raise OSError(5, 'broken')", 1),
    ],
)
def test_an_error_ends_the_process(what, status):
    command = [sys.executable, "-c", CODE.format(what=what)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status
    assert (done.stdout == "lives\n") == (status == 0)
    assert ("Traceback" in done.stderr) == (status != 0)
