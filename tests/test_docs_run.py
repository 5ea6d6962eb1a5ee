"""Every command of every page is run: here as written, or by the test that is named here.

Folders of a cluster or a web server become folders of the test, and large numbers small ones; the
replacements are listed.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml

from agq.blockwise.volumes.create import open_array
from agq.model.network.agq import AGQ
from tests.helpers.pages import (
    CLUSTER_PAGES,
    ROOT,
    commands,
    fences,
    mentioned,
    page_commands,
    section_commands,
)
from tests.helpers.runs import blobs, make_config, write_volume
from tests.helpers.training import NETWORK, config_of, volume  # noqa: F401

# Pages whose shell blocks are run here, in this order, in one folder.
IN_ORDER = (
    "docs/first-run.md",
    "docs/your-data.md",
    "docs/watching.md",
    "docs/stitching.md",
    "docs/shapes.md",
    "docs/graph.md",
    "docs/open-in.md",
)
AFTER_THE_README = "docs/runs.md"  # goes on with its run
ON_THEIR_OWN = (AFTER_THE_README, "docs/evaluation.md", "docs/training.md")
SUBSTITUTES = {
    "/data/www": "www",
    "/var/lib/node_exporter": "node_exporter",
    "/scratch/me/my-volume": "runs/small",
    " RUN": " runs/small",
    "--block 17": "--block 1",
    "--blocks 12,40-44": "--blocks 0-1",
    "--roi 0:64,512:1024,512:1024": "--roi 0:8,0:64,0:64",
    "--worker 77_3": "--worker worker-0",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "/path/to/folder": "em",
    "agq train configs/train-fib25.yaml": "agq train configs/train-fib25.yaml --max-steps 2",
}
# Pages with Python, and what stands before their blocks.
PYTHON = {
    "docs/api.md": "",
    "docs/open-in.md": "",
    "agq/README.md": (
        "import shutil\nimport numpy\n\nraw = numpy.load('data/sections.npy')[:16]\n"
        "shutil.rmtree('runs/my-volume')\n"  # of docs/api.md
    ),
}
CI = ".ci/run"
IMAGE = "tests/packaging/test_image.py::"
COMPOSE = "tests/packaging/test_containers.py::test_a_real_parser_accepts_the_compose_file"
README = "tests/test_docs_run.py::test_the_readme_runs_as_written"
CLUSTER = "tests/cluster/test_submit.py::test_pages_line_by_line"
TIMED = (
    "tests/cluster/test_submit.py"
    "::test_a_plan_times_a_block_in_a_job_and_the_run_is_compared_with_it"
)
JOIN = "tests/pipeline/slurm/test_join.py::"
PAGE = "tests/pipeline/dashboard/test_dashboard.py::test_the_command_serves_until_interrupted"
NAPARI = "tests/pipeline/view/test_napari.py::test_layers_have_their_place"
VIEW = "tests/pipeline/view/test_view.py::test_command_serves_until_interrupted"
NOTIFY = "tests/pipeline/notify/test_notifier.py::test_the_command_tells_what_nobody_lived_to_tell"
NO_DAEMON = "needs a docker daemon: "
NO_APPTAINER = "needs apptainer: "
# What is not run here. A reason before the test says what of the line is stood in for.
ELSEWHERE = {
    ("README.md", "make demo"): "tests/test_docs_run.py::test_make_demo",
    ("README.md", "make test"): CI,
    ("README.md", "make install"): CI,
    ("README.md", "agq view runs/demo"): VIEW,
    ("README.md", "agq dashboard runs/my-volume"): PAGE,
    ("README.md", "agq view runs/my-volume"): VIEW,
    ("docs/first-run.md", "make demo"): "tests/test_docs_run.py::test_make_demo",
    ("docs/open-in.md", "agq view runs/small --napari"): NAPARI,
    (
        "docs/cluster.md",
        "agq plan my.yaml --submit",
    ): TIMED,
    ("docs/watching.md", "agq dashboard runs/small"): PAGE,
    ("docs/watching.md", "agq view runs/small --at 9,90,90"): VIEW,
    ("docs/watching.md", "agq notify my.yaml --test"): NOTIFY,
    ("docs/watching.md", "agq notify RUN"): NOTIFY,
    (
        "docs/watching.md",
        "agq dashboard --all /scratch/me/runs --port 8765 --viewer-port 8766",
    ): PAGE,
    ("docs/watching.md", "ssh -L 8765:localhost:8765 -L 8766:localhost:8766 login.cluster"): (
        "ssh's own"
    ),
}


def elsewhere(page: str, line: str) -> str | None:
    """Name the test that runs a command which is not run here."""
    if (page, line) in ELSEWHERE:
        return ELSEWHERE[page, line]
    if page == "docs/other-schedulers.md":
        return JOIN + "test_workers_that_join_make_the_same_bytes_though_one_is_killed"
    if line == "python benchmarks/scale.py":
        return (
            "tests/pipeline/forecast/test_scale.py::test_the_page_has_the_table_as_it_is_computed"
        )
    if page == "docs/suspects.md" and line.startswith("agq calibrate"):
        return "tests/pipeline/evaluate/test_calibrate.py::test_settings_are_chosen_and_written"
    if page == "docs/suspects.md":
        return "tests/pipeline/suspects/test_suspects.py::test_suspects_are_listed_where_they_are"
    if page == "docs/containers.md":
        if line.startswith("docker compose"):
            return NO_DAEMON + COMPOSE
        if line.startswith("docker build"):
            return NO_DAEMON + IMAGE + "test_image_is_small"
        if line.startswith("docker run"):
            return NO_DAEMON + IMAGE + "test_demo_runs_in_the_image"
        if line.startswith("apptainer build"):
            return NO_APPTAINER + IMAGE + "test_steps_of_the_apptainer_definition_run"
        if line.startswith("srun"):
            return NO_APPTAINER + IMAGE + "test_batch_scripts_run_in_the_image"
        return "tests/test_docs_run.py::test_secrets_of_the_compose_file"
    if page in CLUSTER_PAGES and line in section_commands(page, CLUSTER_PAGES[page]):
        return CLUSTER
    return None


README_SECTIONS = (
    "## Install",
    "## Your data",
    "## Looks wrong?",
    "## Look and share",
    "## Only the stitch",
)


def test_every_command_of_every_page_is_run_somewhere() -> None:
    seen = set()
    for page, line in page_commands():
        named = elsewhere(page, line)
        if named is None:
            here = page in (*IN_ORDER, *ON_THEIR_OWN) or (
                page == "README.md"
                and any(line in section_commands(page, h) for h in README_SECTIONS)
            )
            assert here, f"{page}: nothing runs `{line}`"
            continue
        seen.add((page, line))
        file, _, name = named.rpartition(": ")[2].partition("::")
        if name:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), named
    assert set(ELSEWHERE) <= seen, "no page has these any more"
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for target in ("test", "test-slow", "lint", "docs"):
        assert f"\nmake {target}\n" in ci
    assert "\nmake -j 2 install " in ci


def test_every_option_of_every_page_is_tried_somewhere() -> None:
    """Also of commands that pages only mention: by a command that is run, or in a test."""
    tests = [f for f in (ROOT / "tests").rglob("*.py") if not f.name.startswith("test_docs")]
    tried = {
        word for file in tests for word in re.findall(r"--[a-z][\w-]*", file.read_text("utf-8"))
    }
    for page, line in page_commands():
        if elsewhere(page, line) is None:
            tried.update(re.findall(r"--[a-z][\w-]*", line))
    for page, words, _ in mentioned():
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        untried = options - tried - {"--install-completion"}  # typer's own
        assert not untried, f"{page}: no test gives {untried} to agq"


def test_every_page_with_python_is_run() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md")]
    found = {str(page.relative_to(ROOT)) for page in pages if python_blocks(page)}
    # That page cuts data, which are not ours, into parts; the test of its commands makes such.
    assert found == {*PYTHON, "docs/evaluation.md"}


def python_blocks(page: Path) -> list[str]:
    return [body for _, kind, body in fences(page) if kind == "python"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the pages see it: templates, a bin with agq."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "activate").write_text("")
    install_agq(tools)
    for name in ("data", "www", "node_exporter"):
        (tmp_path / name).mkdir()
    return tmp_path


def install_agq(tools: Path) -> None:
    """Write the console script."""
    shim = tools / "agq"
    # Guarded, as a console script is: worker processes import it.
    guarded = "from agq.pipeline.cli.main import main\n\nif __name__ == '__main__':\n    main()\n"
    shim.write_text(f"#!{sys.executable}\n{guarded}")
    shim.chmod(0o755)


def environment(folder: Path, **more: str) -> dict[str, str]:
    own = f"{folder / '.venv' / 'bin'}:{Path(sys.executable).parent}"
    path = {"PATH": f"{own}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **path, **more}


def run(line: str, folder: Path, variables: dict[str, str]) -> str:
    for old, new in SUBSTITUTES.items():
        line = line.replace(old, new)
    begun = time.perf_counter()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(f"{time.perf_counter() - begun:.0f} s: {line}")
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pages_run_as_written(folder: Path, mongo_uri: str) -> None:
    np.save(folder / "data" / "sections.npy", blobs((18, 110, 110)))
    another_model(folder)
    variables = environment(folder, AGQ_MONGO_URI=mongo_uri)
    for page in IN_ORDER:
        if page == "docs/stitching.md":
            write_edits(folder)
        for _, kind, body in fences(ROOT / page):
            for line in commands(kind, body) if kind in ("sh", "console") else ():
                if elsewhere(page, line) is None:
                    run(line, folder, variables)
    for page, given in PYTHON.items():
        for body in python_blocks(ROOT / page):
            (folder / "script.py").write_text(given + body)
            run(f"{sys.executable} script.py", folder, variables)
    assert (folder / "small.html").stat().st_size > 10_000
    assert (folder / "www" / "small" / "info").is_file()
    assert "agq_blocks" in (folder / "node_exporter" / "agq.prom").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_readme_runs_as_written(folder: Path) -> None:
    (folder / "my_stack").mkdir()
    for number, section in enumerate(blobs((18, 110, 110))):
        tifffile.imwrite(folder / "my_stack" / f"{number:02}.tif", section)
    another_model(folder)
    variables = environment(folder)
    for heading in README_SECTIONS:
        for line in section_commands("README.md", heading):
            if elsewhere("README.md", line) is None:
                run(line, folder, variables)
    for _, kind, body in fences(ROOT / AFTER_THE_README):
        for line in commands(kind, body) if kind == "sh" else ():
            run(line, folder, variables)
    assert (folder / "runs" / "my-volume" / "report.html").is_file()
    assert (folder / "runs" / "my-volume" / "precomputed" / "info").is_file()
    assert (folder / "runs" / "joined" / "lut" / "segments.parquet").is_file()


def run_of_fake(folder: Path, name: str, seed: int) -> None:
    """A finished run with affinities and truth, by the predictor of the tests."""
    place = folder / f"{name}-input"
    place.mkdir()
    data = blobs((20, 50, 70), seed)
    write_volume(place / "in.zarr", "labels", (data > 120).astype(np.uint32))
    file = make_config(
        place,
        data,
        run_dir=str(folder / "runs" / name),
        output={"affinities": True},
        evaluate={"truth": {"path": str(place / "in.zarr"), "dataset": "labels"}},
    )
    run(f"agq run {file}", folder, environment(folder))


def write_edits(folder: Path) -> None:
    """Write ``edits.csv``: a merge of the smallest and the largest fragment of the run."""
    fragments = open_array(folder / "runs" / "small" / "data.zarr", "fragments", "r")[:]
    ends = fragments[fragments > 0].min(), fragments.max()
    (folder / "edits.csv").write_text(f"kind,a,b,comment\nmerge,{ends[0]},{ends[1]},far apart\n")


def another_model(folder: Path) -> None:
    """Arrays of another model in ``data.zarr``: here, those of a run."""
    run_of_fake(folder, "other", 0)
    shutil.copytree(folder / "runs" / "other" / "data.zarr", folder / "data.zarr")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_on_evaluation_runs_as_written(folder: Path) -> None:
    for seed, name in enumerate(("ac4", "ac3")):
        run_of_fake(folder, name, seed)
    truth = open_array(folder / "ac4-input" / "in.zarr", "labels", "r")[:]
    write_volume(folder / "truth.zarr", "labels", truth)
    write_volume(folder / "seg.zarr", "labels", truth)
    for body in evaluation_blocks(measured=False):
        run(body, folder, environment(folder))
    for name in ("ac4.png", "ac4.json", "runs/ac3/baseline.json"):
        assert (folder / name).is_file(), name


def evaluation_blocks(*, measured: bool) -> list[str]:
    """Return the shell blocks of the page on evaluation: of its figures, or the others."""
    blocks = [body for _, kind, body in fences(ROOT / "docs" / "evaluation.md") if kind == "sh"]
    return [body for body in blocks if ("configs/" in body) == measured]


# What each block leaves, in the order of the page.
MEASURED = (
    "ac3",
    "ac3-masks",
    "fib25",
)


def test_every_measured_figure_has_its_commands_run() -> None:
    assert len(evaluation_blocks(measured=True)) == len(MEASURED)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MEASURED)
def test_what_was_measured_runs_as_written(folder: Path, name: str) -> None:
    """With small volumes in the place of the data, which are not ours."""
    (folder / "em").mkdir()
    for part in ("ac4_z80-99", "ac3_z0-39"):
        small_npz(folder / "em" / f"{part}.npz", (16, 96, 96))
    for part in ("train", "tune", "report"):
        small_npz(folder / "runs" / "fib" / f"{part}.npz", (50, 50, 50))
    block = evaluation_blocks(measured=True)[MEASURED.index(name)]
    run(block, folder, environment(folder, EM_DATA=str(folder / "em")))
    assert (folder / "runs" / name / "evaluation.json").is_file()


def small_npz(path: Path, shape: tuple[int, int, int]) -> None:
    """Write raw, labels and a segmentation as the data files name them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = blobs(shape)
    labels = (raw > 120).astype(np.uint32)
    np.savez(path, raw=raw, labels=labels, ffn=labels)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_on_training_runs_as_written(folder: Path, volume: Path) -> None:
    torch.manual_seed(0)
    state = {f"module.{key}": value for key, value in AGQ(NETWORK).state_dict().items()}
    torch.save({"state_dict": state}, folder / "published.pth.tar")
    config = config_of(volume, folder / "runs" / "train-mine", steps=3)
    (folder / "my-train.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    for _, kind, body in fences(ROOT / "docs" / "training.md"):
        if kind != "sh":
            continue
        for line in commands(kind, body):
            if "agq train my-train.yaml" in line and "--resume" not in line:
                # Alternatives: each starts a training of its own.
                shutil.rmtree(folder / "runs" / "train-mine", ignore_errors=True)
            run(line, folder, environment(folder))
            assert (folder / "runs" / "train-mine" / "model.safetensors").is_file(), line


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_make_demo(tmp_path: Path) -> None:
    """`make demo` itself, on an installed environment and a smaller volume."""
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.partition("\ndemo:")[2].partition("\n\n")[0]
    lines = [line.strip() for line in recipe.splitlines()[1:] if "$(BIN)/agq" in line[:12]]
    assert [line.split()[1] for line in lines] == ["synthetic", "run", "export", "suspects"]
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools.parent / ".installed").write_text("")
    install_agq(tools)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    smaller = makefile.replace("--shape 40,768,768", "--shape 16,130,130")
    assert smaller != makefile
    # What the environment depends on is older than its mark.
    smaller = re.sub(r"^(\$\(VENV\)/\.installed:).*", r"\1", smaller, flags=re.MULTILINE)
    (tmp_path / "Makefile").write_text(smaller)
    said = run("make demo", tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)})
    assert "Picture: runs/demo/demo.png" in said
    assert (tmp_path / "runs" / "demo" / "demo.png").is_file()
    assert (tmp_path / "runs" / "demo" / "evaluation.json").is_file()
    assert (tmp_path / "runs" / "demo" / "precomputed" / "mesh" / "info").is_file()
    assert (tmp_path / "runs" / "demo" / "suspects" / "suspects.csv").is_file()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_secrets_of_the_compose_file(tmp_path: Path) -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    (tmp_path / "docker").mkdir()
    for _, kind, body in fences(ROOT / "docs" / "containers.md"):
        if "docker/secrets" in body:
            for line in commands(kind, body):
                if not line.startswith("docker compose"):
                    run(line, tmp_path, dict(os.environ))
    made = {p.name: p.read_text() for p in (tmp_path / "docker" / "secrets").iterdir()}
    assert set(made) == set(compose["secrets"])
    passwords = [made["mongo-root-password"]]
    for name, user in (("mongo-uri", "agq"), ("mongo-read-uri", "agq-page")):
        uri = re.fullmatch(
            r"mongodb://([\w-]+):(\w{48})@mongo:27017/\?authSource=admin", made[name]
        )
        assert uri is not None
        assert uri[1] == user
        passwords.append(uri[2])
    assert len(set(passwords)) == 3
    assert (tmp_path / "docker" / "secrets").stat().st_mode & 0o077 == 0
