"""The benchmark of thresholds by size runs, and what it scores first is what a stitch scores."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from agq.pipeline.folder import RunFolder
from tests.helpers import ROOT
from tests.helpers.runs import agq, blobs, make_config, write_volume


def test_it_scores_as_the_stitch_does_and_then_tries_every_rule(tmp_path: Path) -> None:
    data = blobs((16, 40, 40))
    write_volume(tmp_path / "in.zarr", "labels", (data > 120).astype(np.uint32))
    truth = {"truth": {"path": str(tmp_path / "in.zarr"), "dataset": "labels"}}
    config = make_config(tmp_path, data, stitch={"across": 0.6, "within": 0.575}, evaluate=truth)
    done = agq("run", config)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, str(ROOT / "benchmarks" / "contact_sizes.py"), str(tmp_path / "run")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    lines = told.splitlines()
    assert len(lines) == 1 + 5 + 4 + 16 + 16 + 5
    best = [float(re.findall(r"= ([\d.]+),", line)[0]) for line in lines]
    report = RunFolder(tmp_path / "run").record()["stages"]["evaluate"]["report"]
    stitched = report["scores"]["background_filled"]["voi_sum"]
    assert best[0] <= round(stitched, 3) + 0.001, "the best of thresholds, this run's among them"
    assert len(set(best)) > 1, "rules change something"
