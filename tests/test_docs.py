"""The documentation: its commands exist and run, its quoted messages are those of the code."""

import importlib.util
import os
import re
import shlex
from collections.abc import Iterator
from types import ModuleType

import pytest
from typer.main import get_command

from agq.pipeline.cli.main import app
from agq.pipeline.config.schema import Config
from tests.helpers.pages import PAGES, ROOT, fences


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
            place = place.get_command(None, word)
        options = {name for parameter in place.params for name in parameter.opts} | {"--help"}
        options |= {name for parameter in place.params for name in parameter.secondary_opts}
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in options, f"{page}: agq {' '.join(words)}"
        count += 1
    assert count > 30


def test_every_path_exists() -> None:
    """Paths are given from the root of the repository, those of tests also from `tests/`."""
    tops = "agq|benchmarks|blockwise|configs|docker|docs|model|pipeline|tests"
    missing = []
    count = 0
    for file in PAGES:
        for path in re.findall(rf"`((?:{tops})/[\w./-]+)`", file.read_text(encoding="utf-8")):
            count += 1
            if not (ROOT / path).exists() and not (ROOT / "tests" / path).exists():
                missing.append(f"{file.name}: {path}")
    assert not missing
    assert count > 20


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^`([^`]+)`\n: ", text, re.M)
    assert len(messages) > 12
    sources = "".join(
        file.read_text(encoding="utf-8")
        for package, files in (
            ("agq", "*.py"),
            ("pipeline", "**/*.py"),
            ("blockwise", "**/*.py"),
            ("model", "**/*.py"),
        )
        for file in (ROOT / package).glob(files)
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
