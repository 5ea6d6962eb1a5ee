"""A new user's own volume, by the README as written, with no setting but the three lines."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tifffile

from agq.blockwise.volumes.create import open_array
from tests.helpers import ROOT
from tests.helpers.pages import commands, fences
from tests.helpers.runs import write_volume

PAGES = ("README.md", "docs/first-run.md", "docs/your-data.md")
NOT_OF_THE_PATH = ("agq view", "agq dashboard", ". ", "source ", "make ", "pip ", "git ", "python")
"""Beginnings of lines that set things up, or open a browser."""


def path_of_a_new_user() -> list[str]:
    """Return the first block of commands that imports, makes a configuration and runs it."""
    for page in PAGES:
        for _, kind, body in fences(ROOT / page):
            lines = commands(kind, body) if kind in ("sh", "console", "bash", "shell") else []
            text = "\n".join(lines)
            if all(re.search(rf"agq {word}\b", text) for word in ("import", "config init", "run")):
                return [line for line in lines if not line.startswith(NOT_OF_THE_PATH)]
    raise AssertionError("no page shows import, config init and run in one block")


def call(line: str, folder: Path) -> str:
    code = f"{sys.executable} -c 'from agq.pipeline.cli.main import main; main()'"
    script = f'agq() {{ {code} "$@"; }}\n{line}'
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


def set_three_lines(config: Path, container: str) -> str:
    """Fill in the template as its comments ask; return the folder of the run."""
    lines = config.read_text().splitlines()
    wanted = {"run_dir": "runs/my-volume", "path": container, "dataset": "raw"}
    for key, value in wanted.items():
        n = next(n for n, line in enumerate(lines) if re.match(rf"\s*{key}:", line))
        lines[n] = re.sub(rf"({key}:\s*)\S+", rf"\g<1>{value}", lines[n])
    config.write_text("\n".join(lines) + "\n")
    return wanted["run_dir"]


def test_the_template_marks_the_three_lines():
    text = (ROOT / "configs" / "local.yaml").read_text()
    marked = [line.split(":")[0].strip() for line in text.splitlines() if "# <-" in line]
    assert marked == ["run_dir", "path", "dataset"]
    assert path_of_a_new_user()


@pytest.mark.slow
@pytest.mark.timeout(1400)
def test_tif_sections_of_real_em_give_a_good_segmentation(shared_dir: Path, tmp_path: Path):
    file = shared_dir / "data" / "ac4_z80-99.npz"
    if not file.is_file():
        pytest.skip("AC4 z 80-99 (../shared/data) is not on this machine")
    lines = path_of_a_new_user()
    source, container = next(line.split()[2:4] for line in lines if line.startswith("agq import "))
    crop = {}
    for name in ("raw", "labels"):
        options = f"--key {name} --dataset {name} --voxel-size 30,6,6"
        call(f"agq import {shlex.quote(str(file))} all.zarr {options}", tmp_path)
        crop[name] = open_array(tmp_path / "all.zarr", name, "r")[:, :420, :420]
    (tmp_path / source).mkdir(parents=True)
    for number, section in enumerate(crop["raw"]):
        tifffile.imwrite(tmp_path / source / f"section_{number:02}.tif", section)
    run_dir = ""
    for line in lines:
        call(line, tmp_path)
        if line.startswith("agq config init"):
            (config,) = tmp_path.glob("*.yaml")
            run_dir = set_three_lines(config, container)
    write_volume(tmp_path / "truth.zarr", "labels", crop["labels"])
    said = json.loads(call(f"agq evaluate {run_dir} truth.zarr::labels --json", tmp_path))
    scores = said["scores"]["background_filled"]
    record = json.loads((tmp_path / run_dir / "run.json").read_text())
    print(record["settings"], scores)
    assert record["settings"]["stitch.across"]["from"] == "checkpoint"
    assert scores["voi_sum"] < 1.0, scores
