"""The documentation: its commands exist and run, its quoted messages are those of the code."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from typer.main import get_command

from pipeline.cli import app
from pipeline.config import Config
from tests.runs import blobs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "docker" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages whose shell lines are run, in this order, in one folder.
RUN_IN_ORDER = ("first-run", "your-data", "watching", "stitching")
# Pages whose lines need their own data or a cluster, and the test that runs such lines.
RUN_ELSEWHERE = {
    "cluster": "test_slurm.py",
    "evaluation": "test_evaluate.py",
    "training": "test_train_cli.py",
}


def fences(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (line before, language, text) of every fenced block."""
    text = file.read_text(encoding="utf-8")
    for found in re.finditer(r"([^\n]*)\n```(\w+)\n(.*?)```", text, re.S):
        yield found[1], found[2], found[3]


def mentioned() -> Iterator[tuple[str, list[str]]]:
    """Yield (page, words) of every `agq ...` command line in a fence or between backticks."""
    for file in PAGES:
        text = file.read_text(encoding="utf-8")
        lines = [
            line.strip()
            for _, kind, body in fences(file)
            if kind in ("sh", "console")
            for line in body.replace("\\\n", " ").splitlines()
        ]
        lines += re.findall(r"`(agq [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        for line in lines:
            words = shlex.split(line.removeprefix("$ ").partition(" #")[0].partition(" > ")[0])
            for k, word in enumerate(words):
                if word.endswith("agq") and k + 1 < len(words):
                    yield file.name, words[k + 1 :]
                    break


def test_every_command_and_option_exists() -> None:
    command = get_command(app)
    count = 0
    for page, words in mentioned():
        if words[0].startswith(("-", "COMMAND", "...")):
            continue
        place = command
        for word in words:
            if not hasattr(place, "commands"):
                break
            assert word in place.commands, f"{page}: agq {' '.join(words)}"
            place = place.commands[word]
        options = {name for parameter in place.params for name in parameter.opts} | {"--help"}
        options |= {name for parameter in place.params for name in parameter.secondary_opts}
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in options, f"{page}: agq {' '.join(words)}"
        count += 1
    assert count > 30


def test_commands_that_are_only_shown_name_the_test_that_runs_them() -> None:
    for file in PAGES:
        for before, kind, body in fences(file):
            if kind == "console":
                named = re.match(r"<!-- runs in: (tests/\w+\.py)", before)
                assert named, f"{file.name}: {body}"
                assert (ROOT / named[1]).is_file(), before
        if file.parent.name == "docs" and any(kind == "sh" for _, kind, _ in fences(file)):
            assert file.stem in {*RUN_IN_ORDER, *RUN_ELSEWHERE}, file.name
    assert all((ROOT / "tests" / name).is_file() for name in RUN_ELSEWHERE.values())


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^`([^`]+)`\n: ", text, re.M)
    assert len(messages) > 12
    sources = "".join(
        file.read_text(encoding="utf-8")
        for package in ("pipeline", "blockwise", "model")
        for file in (ROOT / package).rglob("*.py")
    )
    for message in messages:
        if message != os.strerror(28):
            assert message in sources, message


@pytest.fixture
def conf() -> ModuleType:
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_has_every_field(conf: ModuleType) -> None:
    text = conf.configuration_reference(Config)
    for field in ("| `run_dir` | string | required |", "### stitch.dask", "| `min_size` |"):
        assert field in text
    assert "| `retries` | integer | `2` | How often a failed block" in text
    assert not re.search(r"\|  \|", text), "a field without type or meaning"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_run_as_written(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "sections.npy", blobs((18, 110, 110)))
    tools = tmp_path / "bin"
    tools.mkdir()
    shim = tools / "agq"
    # Guarded, as a console script is: worker processes import it.
    guarded = "from pipeline.cli import main\n\nif __name__ == '__main__':\n    main()\n"
    shim.write_text(f"#!{sys.executable}\n{guarded}")
    shim.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    for page in RUN_IN_ORDER:
        for _, kind, body in fences(ROOT / "docs" / f"{page}.md"):
            if kind == "sh":
                run(["bash", "-euo", "pipefail", "-c", body], tmp_path, environment)
    for _, kind, body in fences(ROOT / "docs" / "api.md"):
        if kind == "python":
            (tmp_path / "script.py").write_text(body)
            run([sys.executable, "script.py"], tmp_path, environment)
    assert (tmp_path / "small.html").stat().st_size > 10_000


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    begun = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    print(f"{time.perf_counter() - begun:.0f} s: {command[-1].strip()}")
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
