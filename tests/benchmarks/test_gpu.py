"""The benchmark of a card, tried on the CPU with a small network and small blocks."""

import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.helpers.networks import write_checkpoint


@pytest.mark.slow
def test_what_it_prints(tmp_path):
    weights = write_checkpoint(tmp_path / "small.safetensors")
    options = ["--device", "cpu", "--checkpoint", weights, "--rounds", "1", "--blocks", "3"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", *options, "--shape", "9", "33", "33"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    equal = re.search(r"small_65_lite: (\S+)% of .* logits \(float16\) within (\S+)", out)
    assert float(equal[1]) > 99.99
    assert float(equal[2]) < 0.01
    assert re.search(r"bf16 against fp32: VOI \d\.\d{4} \+ \d\.\d{4}", out)
    for stage in ("convolutions", "seeds", "decoder", "masks to labels", "affinities", "all"):
        assert re.search(rf"^{stage} +\d+\.\d\d +\d+\.\d\d$", out, re.MULTILINE), stage
    assert re.search(r"the published arithmetic, plainly: \d+\.\d\d; ratio \d\.\d+", out)
    assert re.search(r"one worker, fp32: \d+\.\d\d blocks/s", out)
