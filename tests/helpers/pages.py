"""The pages of the documentation and the commands on them."""

import re
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "docker" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def heading(page: str, word: str) -> str:
    """Return the first heading of a page's sections that has a word in it."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return next(n for n in lines if n.startswith("## ") and word.lower() in n.lower())


CLUSTER_PAGES = {"README.md": heading("README.md", "cluster"), "docs/cluster.md": "## A first run"}
"""The sections whose commands need a SLURM cluster."""


def fences(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (line before, language, text) of every fenced block."""
    text = file.read_text(encoding="utf-8")
    for found in re.finditer(r"([^\n]*)\n```(\w+)\n(.*?)```", text, re.S):
        yield found[1], found[2], found[3]


def commands(kind: str, body: str) -> list[str]:
    """Return the command lines of a block: joined where continued, without comments.

    Of a ``console`` block, what follows the prompt; the rest is what the commands print.
    """
    found = []
    for line in body.replace("\\\n", " ").splitlines():
        if kind == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        line = re.sub(r"\s+", " ", re.sub(r"(^|\s)#.*", "", line)).strip()
        if line:
            found.append(line)
    return found


def page_commands() -> Iterator[tuple[str, str]]:
    """Yield (page, command line) of every shell block of every page."""
    for file in PAGES:
        for _, kind, body in fences(file):
            if kind in ("sh", "console", "bash", "shell"):
                for line in commands(kind, body):
                    yield str(file.relative_to(ROOT)), line


def section_commands(page: str, section: str) -> list[str]:
    """Return the command lines of the first block of commands in one section of a page."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(f"{section}\n")[2]
    block = re.search(r"```(sh|console|bash)\n(.*?)```", text.partition("\n## ")[0], re.DOTALL)
    assert block is not None, (page, section)
    return commands(*block.groups())
