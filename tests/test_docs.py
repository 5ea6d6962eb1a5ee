"""The documentation: its commands exist and run, its quoted messages are those of the code."""

import os
import re
from pathlib import Path
from typing import Any

from typer.main import get_command

import agq
from agq.pipeline.cli.main import app
from agq.pipeline.config.explain import reference
from tests.helpers.pages import PAGES, ROOT, mentioned

PLACEHOLDERS = {"N": "1"}


def refusal(command: Any, words: list[str]) -> str:
    """Return what the command line parser has against words: the kind of error, and the message."""
    try:
        command.make_context("agq", words)
    except Exception as error:  # of click, or of the copy inside typer
        return f"{type(error).__name__}: {error}"
    return ""


def test_every_command_line_is_one_that_agq_takes() -> None:
    """Commands, options, their values, and the number of arguments."""
    count = 0
    for page, words, whole in mentioned():
        if words[0].startswith(("-", "COMMAND", "...")):
            continue
        command: Any = get_command(app)
        rest = [PLACEHOLDERS.get(word, word) for word in words]
        while rest and hasattr(command, "commands"):
            assert rest[0] in command.commands, f"{page}: agq {' '.join(words)}"
            command = command.get_command(None, rest.pop(0))
        refused = refusal(command, rest)
        assert not refused or (
            not whole and refused.startswith(("MissingParameter", "BadOptionUsage", "NoArgsIsHelp"))
        ), f"{page}: agq {' '.join(words)}: {refused}"
        count += 1
    assert count > 200


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


def test_every_link_leads_somewhere() -> None:
    """To a file, and to a heading in it: a code host draws what sphinx does not check."""
    wrong = []
    for file in (*PAGES, ROOT / "CHANGELOG.md", ROOT / "model" / "weights" / "README.md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            target = file.parent / path if path else file
            if path.startswith("https:"):
                continue
            if not target.exists() or (anchor and anchor not in anchors(target)):
                wrong.append(f"{file.name}: {link}")
    assert not wrong


def anchors(page: Path) -> set[str]:
    """Return the names of the headings of a page as code hosts and myst make them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    heads = re.findall(r"^- (`.+?`): ", text, re.M)
    messages = [message for head in heads for message in re.findall(r"`([^`]+)`", head)]
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


def test_page_of_settings_is_up_to_date() -> None:
    text = reference()
    for field in ("| `run_dir` | text | required |", "### stitch.dask", "| `min_size` |"):
        assert field in text
    assert "| `retries` | whole number at least 0 | 2 | How often a failed block" in text
    assert not re.search(r"\|  \||\| any", text), "a setting without type or meaning"
    page = ROOT / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == text, "`make docs` writes docs/configuration.md anew"


def test_python_page_has_every_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `agq\.(\w+)` \|", text, re.M)
    assert sorted(named) == sorted(set(agq.__all__) - {"__version__"})


def test_index_links_every_page() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"^- .*?\]\((\S+?\.md)\)", text, re.M))
    assert linked == {file.name for file in (ROOT / "docs").glob("*.md")} - {"index.md"}


def test_pages_are_plain_markdown() -> None:
    """What only the site needs is in docs/conf.py: a code host would show directives raw."""
    for file in PAGES:
        found = re.search(r"^(```|:::)\{|^\.\. \w+::", file.read_text("utf-8"), re.M)
        assert found is None, f"{file.name}: {found}"
