"""Every command from a folder that holds a user's ``model.py``, ``yaml.py`` and ``numpy.py``."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.helpers import ROOT
from tests.helpers.installs import call
from tests.helpers.runs import agq, blobs, make_config, results, write_volume

NAMES = ("model", "pipeline", "blockwise", "yaml", "numpy", "zarr", "typer", "tests")
MODULE = """
import pathlib
pathlib.Path({marks!r}, __name__).touch()
raise ImportError("a user's module, which nobody of us may import")
"""
OWN = {"factory": "own_predictor:threshold"}
COMMANDS = """
agq --version
agq config check config.yaml
agq config schema
agq plan config.yaml
agq run config.yaml
agq predict config.yaml
agq stitch run --margin 0.1
agq stitch run --margin 0
agq status run
agq metrics run
agq logs run
agq view run --print-state --base-url https://example.org/run
agq snapshot run
agq report run
agq evaluate run
agq sweep run --across 0.7 --within 1.0
agq export precomputed run out
agq stitch --fragments run/data.zarr::fragments --affinities run/data.zarr::affinities --output o
agq import sections.npy sections.zarr --voxel-size 30,6,6
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the run makes from a folder without such files."""
    folder = tmp_path_factory.mktemp("clean")
    done = agq("run", make_config(folder, output={"affinities": True}))
    assert done.returncode == 0, done.stderr
    return results(folder / "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder, with a run to do; predictor and marks are beside it."""
    (tmp_path / "marks").mkdir()
    (tmp_path / "packages").mkdir()
    shutil.copy(ROOT / "tests" / "helpers" / "fakes.py", tmp_path / "packages" / "own_predictor.py")
    folder = tmp_path / "work"
    folder.mkdir()
    data = blobs((20, 50, 70))
    write_volume(folder / "in.zarr", "labels", (data > 120).astype(np.uint32))
    truth = {"path": str(folder / "in.zarr"), "dataset": "labels"}
    config = make_config(folder, data, output={"affinities": True}, evaluate={"truth": truth})
    values = yaml.safe_load(config.read_text())
    values["model"] = OWN
    config.write_text(yaml.safe_dump(values))
    np.save(folder / "sections.npy", data)
    for name in NAMES:
        (folder / f"{name}.py").write_text(MODULE.format(marks=str(tmp_path / "marks")))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("how", "start"), [("installed", "agq"), ("linked", "python -m agq")])
def test_no_command_imports_what_lies_there(
    request: pytest.FixtureRequest,
    folder: Path,
    expected: dict[str, bytes],
    how: str,
    start: str,
) -> None:
    tools = request.getfixturevalue(how)
    if start == "agq":  # Python itself looks for the argument of -m in the current folder
        (folder / "agq.py").write_text((folder / "model.py").read_text())
    for line in COMMANDS.strip().splitlines():
        first, *rest = start.split()
        words = [tools / first, *rest, *line.split()[1:]]
        call(words, folder, PYTHONPATH=str(folder.parent / "packages"))
        marks = [mark.name for mark in (folder.parent / "marks").iterdir()]
        assert not marks, (line, marks)
    assert results(folder / "run") == expected
    assert (folder / "run" / "evaluation.json").is_file()


def test_a_predictor_that_only_lies_there_is_refused(folder: Path) -> None:
    """It is found through PYTHONPATH or an installed package, and the message says so."""
    shutil.copy(folder.parent / "packages" / "own_predictor.py", folder)
    for name in NAMES:
        (folder / f"{name}.py").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "agq", "predict", "config.yaml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot import own_predictor" in done.stderr
    assert "installed packages and in PYTHONPATH, not in the current folder" in done.stderr
    assert not (folder / "run" / "journal").exists()


@pytest.mark.parametrize("before", [True, False])
def test_an_empty_entry_of_pythonpath_does_not_name_the_current_folder(
    folder: Path, before: bool
) -> None:
    """``PYTHONPATH=$PYTHONPATH:/mine`` has one where the variable was not set."""
    entries = [str(ROOT), str(folder.parent / "packages")]
    entries.insert(0 if before else 2, "")
    python = [sys.executable, "-P", "-m", "agq"]
    for words in (["predict", "config.yaml"], ["status", "run"]):
        call([*python, *words], folder, PYTHONPATH=os.pathsep.join(entries))
        assert not [mark.name for mark in (folder.parent / "marks").iterdir()], words
    assert (folder / "run" / "journal" / "predict").is_dir()
