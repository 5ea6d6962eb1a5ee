"""The container image: built from docker/Dockerfile, and used as docs/containers.md says."""

import json
import os
import stat
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from agq.pipeline.config.schema import Config, masked
from agq.pipeline.run.prepare import prepare
from agq.pipeline.slurm import jobs
from agq.pipeline.slurm.scripts import folder, log_folder
from tests.helpers.image_builder import (
    BASE,
    DOCKER,
    ROOT,
    Builder,
    Clock,
    call,
    missing_builder,
    post_script,
    section_of_definition,
)
from tests.helpers.services import free_port

# One process builds the image for all of them.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.xdist_group("image")]
LARGEST = 2.5e9


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    missing = missing_builder()
    if missing:
        pytest.skip(missing)
    builder = Builder(tmp_path_factory.mktemp("image"))
    try:
        clock = Clock()
        builder.make_base()
        clock("stand-in for the base image")
        builder.fetch_wheels()
        clock("wheels")
        yield builder
    finally:
        builder.close()


@pytest.fixture(scope="module")
def box(builder: Builder) -> str:
    """A container of the image."""
    clock = Clock()
    builder.build()
    clock("image")
    return builder.container()


@pytest.fixture(scope="module")
def runs(builder: Builder, box: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs, with the demo in it, made in a container."""
    clock = Clock()
    runs = tmp_path_factory.mktemp("runs")
    # The container's user is nobody here.
    runs.chmod(0o777)
    agq = [*builder.run_words(box, f"--volume={runs}:/runs"), "agq"]
    call([*agq, "synthetic", "/runs/in.zarr", "--shape", "16,120,120", "--seed", "7"])
    settings = ["run_dir=/runs/demo", "input.raw.path=/runs/in.zarr"]
    settings += ["evaluate.truth.path=/runs/in.zarr"]
    options = [word for setting in settings for word in ("--set", setting)]
    call([*agq, "run", "/opt/agq/configs/demo.yaml", *options])
    clock("demo")
    return runs


def test_image_is_small(builder: Builder, box: str) -> None:
    size = builder.size(box)
    print(f"image: {size / 1e9:.2f} GB, torch build {builder.torch_build or 'of PyPI'}")
    if builder.torch_build != "cpu":
        pytest.skip(f"{size / 1e9:.2f} GB, but pip here has no CPU build of torch: not compared")
    assert size < LARGEST


def test_image_starts_agq_as_a_user_and_has_no_build_tools(builder: Builder, box: str) -> None:
    settings = builder.settings()
    run = builder.run_words(box)
    assert call([*run, *settings["Entrypoint"], *settings["Cmd"]]).count("dashboard")
    kind, *check = settings["Healthcheck"]["Test"]
    assert kind == "CMD"
    assert call([*run, *check]).strip().endswith("ok")
    assert call([*run, "id", "-u"]).strip() == settings["User"].partition(":")[0] == "1000"
    tools = "gcc cc g++ c++ make cmake ld pip pip3 git"
    look = f"for t in {tools}; do command -v $t; done; find /opt/agq -writable; true"
    assert call([*run, "sh", "-c", look]) == ""


def test_demo_runs_in_the_image(runs: Path) -> None:
    assert (runs / "demo" / "data.zarr" / "segmentation" / "s0" / "zarr.json").is_file()
    assert (runs / "demo" / "evaluation.json").is_file()
    assert (runs / "demo" / "demo.png").stat().st_size > 10_000


def test_any_user_can_look_at_a_run(builder: Builder, runs: Path) -> None:
    """`docker run --user`: a number that the image does not know, without a home folder."""
    place = runs / "pictures"
    place.mkdir()
    os.chown(place, 4321, 4321)
    # A container of its own, as docker makes one: caches in /tmp belong to whoever began.
    box = builder.container()
    options = ["--user=4321:4321", f"--volume={runs}:/runs", "--env=HOME=/"]
    call([*builder.run_words(box, *options), "agq", "report", "/runs/demo", "--out",
          "/runs/pictures/report.html"])  # fmt: skip
    assert (place / "report.html").stat().st_uid == 4321


def test_web_page_starts_as_in_the_compose_file(builder: Builder, box: str, runs: Path) -> None:
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["dashboard"]
    ports = {"8765": str(free_port()), "8766": str(free_port())}
    words = [word for word in service["command"] if "ledger" not in word]
    check = service["healthcheck"]["test"][1:]
    for old, new in ports.items():
        words = [word.replace(old, new) for word in words]
        check = [word.replace(old, new) for word in check]
    run = builder.run_words(box, f"--volume={runs}:/runs:ro")
    page = subprocess.Popen([*run, "agq", *words], stdout=subprocess.PIPE, text=True)
    stop = threading.Timer(120, page.kill)
    stop.start()
    try:
        assert page.stdout is not None
        address = page.stdout.readline().strip()
        assert "token=" in address
        call([*run, *check])
        local = f"http://127.0.0.1:{ports['8765']}/"
        with pytest.raises(urllib.error.HTTPError, match=r"HTTP Error 40[13]"):
            urllib.request.urlopen(local)
        with urllib.request.urlopen(local + "api/runs?" + address.partition("?")[2]) as answer:
            (run_line,) = json.loads(answer.read())
        assert (run_line["name"], run_line["state"]) == ("demo", "done")
    finally:
        stop.cancel()
        page.terminate()
        page.wait(30)
        page.stdout.close()


def test_batch_scripts_run_in_the_image(
    builder: Builder, box: str, tmp_path: Path, runs: Path
) -> None:
    """What `agq submit` writes with slurm.container; only apptainer itself is stood in for.

    SLURM's commands are not in the image, as they are in no image.
    """
    tmp_path.chmod(0o777)
    tools = tmp_path / "tools"
    tools.mkdir()
    said = tmp_path / "said"
    words = builder.run_words(box, f"--volume={tmp_path}:{tmp_path}", f"--volume={runs}:{runs}")
    apptainer = tools / "apptainer"
    apptainer.write_text(f'#!/bin/sh\necho "$@" >> {said}\nshift 3\nexec {" ".join(words)} "$@"\n')
    apptainer.chmod(apptainer.stat().st_mode | stat.S_IXUSR)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_dir.chmod(0o777)
    config = Config.model_validate(
        {
            "run_dir": str(run_dir),
            "input": {"raw": {"path": str(runs / "in.zarr"), "dataset": "raw"}},
            "model": {"checkpoint": "demo"},
            "workers": {"count": 1},
            "slurm": {
                "container": "apptainer:///images/agq.sif",
                "container_options": ["--bind=/scratch"],
                "gpus": 0,
                "address": "127.0.0.1",
                "coordinator": {"cpus": 1},
                "stitch": {"cpus": 1},
            },
        }
    )
    prepared = prepare(config, workers_here=False)
    prepared.run.create(masked(config), prepared.identity, recommended=prepared.recommended)
    scripts = jobs.scripts(config, ["predict", "stitch"], tmp_path)
    folder(run_dir).mkdir()
    log_folder(run_dir).mkdir(parents=True)
    for script in scripts:
        script.path(run_dir).write_text(script.text)
    jobs.save_config(config)
    submitted = [
        jobs.Job(id=n, role=r, submitted=0) for n, r in ((1, "coordinator"), (2, "workers"))
    ]
    record = jobs.Jobs(here=str(tmp_path), grace_s=30, workers=1, jobs=submitted)
    jobs.record_path(run_dir).write_text(record.model_dump_json())
    call(["chown", "-R", "1000:1000", run_dir])

    def start(name: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "1"}
        script = folder(run_dir) / f"{name}.sh"
        return subprocess.Popen(
            ["bash", str(script)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    both = [start("coordinator"), start("workers")]
    for process in both:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    stitch = start("stitch")
    output = stitch.communicate(timeout=300)[0]
    assert stitch.returncode == 0, output
    segmentation = run_dir / "data.zarr" / "segmentation" / "s0"
    assert (segmentation / "zarr.json").stat().st_uid == 1000
    lines = said.read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith(
            "exec --bind=/scratch /images/agq.sif python -P -m agq.pipeline.slurm."
        )


def test_steps_of_the_apptainer_definition_run(builder: Builder) -> None:
    box = builder.container(BASE)
    for line in section_of_definition("files"):
        source, target = line.split()
        builder.buildah("copy", "--quiet", box, str(ROOT / source), target)
    builder.leave_modules_uncompiled()
    clock = Clock()
    script = post_script("unused")
    call([*builder.run_words(box, *builder.mounts), "sh", "-c", script], 900)
    clock("apptainer's steps")
    (test,) = section_of_definition("test")
    assert call([*builder.run_words(box), *test.split()]).strip().endswith("ok")
    path = "\n".join(section_of_definition("environment"))
    start = "\n".join([path, *section_of_definition("runscript")])
    shown = call([*builder.run_words(box), "sh", "-c", start, "agq", "--help"])
    assert "dashboard" in shown
    builder.buildah("rm", box)
