"""The package as it is published: what is in it, and that it works without the repository."""

import os
import re
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import tifffile
import yaml

from tests.helpers import ROOT
from tests.helpers.installs import BUILD, call, one
from tests.helpers.pages import commands, fences
from tests.helpers.runs import blobs

TEMPLATES = {f"agq/configs/{name}.yaml" for name in ("demo", "local", "slurm")}
DATA = {
    *(
        "agq/py.typed",
        "agq/README.md",
        "agq/model/weights/demo.safetensors",
        "agq/model/weights/em.safetensors",
        "agq/model/weights/README.md",
        "agq/model/weights/registry.yaml",
    ),
    *(f"agq/pipeline/dashboard/{name}" for name in ("page.css", "page.html", "page.js")),
    "agq/pipeline/dashboard/report.html",
    *TEMPLATES,
}


def modules() -> set[str]:
    """Return every module of the repository by its place in the package."""
    found = {f"agq/{file.name}" for file in (ROOT / "agq").glob("*.py")}
    for package in ("blockwise", "model", "pipeline"):
        found |= {f"agq/{f.relative_to(ROOT).as_posix()}" for f in (ROOT / package).rglob("*.py")}
    return found


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(one(dist, "*.whl")) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names))
    assert set(names) == modules() | DATA


@pytest.mark.slow
def test_the_sdist_makes_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    with tarfile.open(one(dist, "*.tar.gz")) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert not (source / "tests").exists()
    call([sys.executable, "-P", "-c", BUILD, tmp_path], source)
    with (
        zipfile.ZipFile(one(dist, "*.whl")) as first,
        zipfile.ZipFile(one(tmp_path, "*.whl")) as second,
    ):
        for name in (*modules(), *DATA):
            assert first.read(name) == second.read(name), name


def test_the_page_of_a_package_index_links_to_nothing_in_the_repository() -> None:
    text = (ROOT / "agq" / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    assert all(target.startswith("https://") for target in targets), targets


@pytest.mark.slow
def test_the_wheel_shows_that_page(dist: Path) -> None:
    with zipfile.ZipFile(one(dist, "*.whl")) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith("/METADATA"))
        metadata = message_from_bytes(wheel.read(name))
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "agq" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_runs_as_written_without_the_repository(installed: Path, tmp_path: Path) -> None:
    where = "import agq, agq.pipeline.cli.main as m; print(agq.__file__, m.__file__)"
    places = call([installed / "python", "-P", "-c", where], tmp_path).split()
    assert all(place.startswith(str(installed.parent)) for place in places)
    (tmp_path / "my_stack").mkdir()
    for number, section in enumerate(blobs((18, 110, 110))):
        tifffile.imwrite(tmp_path / "my_stack" / f"{number:02}.tif", section)
    (body,) = (text for _, kind, text in fences(ROOT / "agq" / "README.md") if kind == "sh")
    path = f"{installed}:{os.environ['PATH']}"
    for line in commands("sh", body):
        if line.startswith("agq view"):
            line += " --print-state --base-url https://example.org/run"
        said = call(["bash", "-euc", line], tmp_path, PATH=path)
        if " init " in line:
            config = yaml.safe_load((tmp_path / "my.yaml").read_text())
            assert config["run_dir"] == "runs/my-volume"
    assert "layers" in said
    assert (tmp_path / "runs" / "my-volume" / "data.zarr" / "segmentation").is_dir()
