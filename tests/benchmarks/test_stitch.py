"""The benchmark of the stitch runs and prints its tables (on the smallest inputs)."""

import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT

SCRIPT = ROOT / "benchmarks" / "stitch" / "tables.py"
OPTIONS = ["--edges", "3000", "--leaf", "1", "1", "1", "--blocks", "1", "1", "2", "--workers", "1"]
OPTIONS += ["--client", "27"]


@pytest.mark.slow
def test_tables(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, *OPTIONS, "--folder", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +1 +1 .* 0 +0$", done.stdout, re.MULTILINE), "root hands nothing up"
    assert re.search(r"^ +all .* \d+ merges, peak RSS 0\.\d+ GiB$", done.stdout, re.MULTILINE)
    steps = re.findall(r"^ +([a-z ]+?)(?: +[\d.]+){5}$", done.stdout, re.MULTILINE)
    assert steps == ["contacts", "agglomerate", "lut", "relabel", "plain copy", "stitch"]
    assert re.search(r"^with pyramid(?: +[\d.]+){5}$", done.stdout, re.MULTILINE)
    assert re.search(r"^\d+ files, [\d.]+ a block$", done.stdout, re.MULTILINE)
    assert re.search(r"^27 blocks in 27 leaves; \d+ MiB before$", done.stdout, re.MULTILINE)
    assert re.search(r"^ +all .* bytes a block, \d+ a leaf$", done.stdout, re.MULTILINE)
    assert not any(tmp_path.iterdir())
