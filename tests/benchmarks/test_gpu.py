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
    speed = re.search(r"one worker, fp32: \d+\.\d\d blocks/s, (\S+) Mvoxel/s", out)[1]
    each = re.search(r"^(\S+) ms a block among others", out, re.MULTILINE)[1]
    bars = dict(re.findall(r"^  (\S.*?)  +(\S+)  [<>]= \S+ +(?:not )?met$", out, re.MULTILINE))
    assert bars["Mvoxel/s of one worker"] == speed
    assert abs(float(bars["ms a block among others, bf16"]) - float(each)) < 0.06
    assert 200 < float(bars["operators a block"]) < 2000
    assert float(bars["waits of the host a block"]) == 2
    assert len(bars) == 5


def test_time_that_several_streams_cover(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from gpu import covered

    assert covered([]) == 0
    assert covered([(5, 7), (0, 2), (1, 3), (1, 2), (3, 4)]) == 6
