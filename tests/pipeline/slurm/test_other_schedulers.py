"""What docs/other-schedulers.md gives to LSF, PBS and Kubernetes: its syntax, and its commands."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from agq.pipeline.folder import RunFolder
from tests.helpers.pages import ROOT, fences
from tests.helpers.runs import command, environment, make_config

PAGE = ROOT / "docs" / "other-schedulers.md"
# Takes what LSF takes for itself, and writes down the line that it gives to a shell on a node.
BSUB = """#!/bin/bash
while [[ "$1" == -* ]]; do [ "$1" = -r ] || shift; shift; done
echo "$*" >> "$SAID"
"""


def snippet(kind: str, start: str) -> str:
    (found,) = [b for _, k, b in fences(PAGE) if k == kind and b.startswith(start)]
    return found


def pods() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(snippet("yaml", "apiVersion")))


@pytest.mark.parametrize("start", ["bsub", "#!/bin/bash\n#PBS"])
def test_shells_can_read_them(start):
    done = subprocess.run(
        ["bash", "-n"], input=snippet("text", start), text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_jobs_of_kubernetes_are_whole():
    """As far as can be told without its schema: names, types, and what refers to something else."""
    jobs = pods()
    assert [job["metadata"]["name"] for job in jobs] == ["agq-coordinator", "agq-workers"]
    for job in jobs:
        assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", job["metadata"]["name"])
        pod = job["spec"]["template"]["spec"]
        assert pod["restartPolicy"] in ("OnFailure", "Never")
        (container,) = pod["containers"]
        assert all(isinstance(word, str) for word in container["command"])
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        variables = {entry["name"] for entry in container.get("env", [])}
        used = set(re.findall(r"\$\((\w+)\)", " ".join(container["command"])))
        assert used == variables
    # A worker has less time than the pod.
    words = jobs[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    seconds = float(words[words.index("--grace-s") + 1])
    assert seconds < jobs[1]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


@pytest.fixture
def node(tmp_path) -> Iterator[dict[str, str]]:
    """The environment of a node: agq, and a name by which it is reached."""
    for name, text in (
        ("agq", f'#!/bin/sh\nexec {shlex.join(command())} "$@"\n'),
        ("hostname", "#!/bin/sh\necho 127.0.0.1\n"),
        ("bsub", BSUB),
    ):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(text)
        tool.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return environment() | {"PATH": path, "SAID": str(tmp_path / "said"), "POD_IP": "127.0.0.1"}


@pytest.mark.timeout(400)
def test_their_commands_do_a_prediction(tmp_path, node):
    """One coordinator, of LSF, with a worker of each."""
    make_config(tmp_path).rename(tmp_path / "my.yaml")

    def here(text: str) -> str:
        for name in ("/scratch/me/my-volume", "/data/run"):
            text = text.replace(name, str(tmp_path / "run"))
        return text.replace("/data/my.yaml", "my.yaml")

    subprocess.run(["bash", "-c", here(snippet("text", "bsub"))], env=node, check=True)
    coordinator, of_lsf = Path(node["SAID"]).read_text().splitlines()
    of_pbs = here(snippet("text", "#!/bin/bash\n#PBS"))
    containers = [pod["spec"]["template"]["spec"]["containers"][0] for pod in pods()]
    # Kubernetes replaces $(NAME) itself, and starts no shell.
    of_pods = [
        shlex.join(here(word).replace("$(POD_IP)", node["POD_IP"]) for word in c["command"])
        for c in containers
    ]
    lines = [coordinator, of_lsf, of_pbs, of_pods[1]]
    started: list[subprocess.Popen[str]] = []
    until = time.monotonic() + 100
    try:
        for line in lines:
            started.append(
                subprocess.Popen(
                    ["bash", "-c", line],
                    cwd=tmp_path,
                    env=node | {"PBS_O_WORKDIR": str(tmp_path)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            # Workers that come before the run folder fail, and are started again.
            while not (tmp_path / "run" / "run.json").exists():
                assert time.monotonic() < until
                time.sleep(0.2)
        said = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert started[0].returncode == 0, said[0]
    run = RunFolder(tmp_path / "run")
    assert run.record()["stages"]["predict"]["state"] == "done"
    for line, process, text in zip(lines[1:], started[1:], said[1:], strict=True):
        assert process.returncode == 0, f"{line}\n{text}"
    # The coordinator of Kubernetes finds nothing left to do.
    again = subprocess.run(
        ["bash", "-c", of_pods[0]], cwd=tmp_path, env=node, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
