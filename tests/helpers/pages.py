"""The pages of the documentation and the commands on them."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def mentioned() -> Iterator[tuple[str, list[str], bool]]:
    """Yield (page, words, whole) of every `agq ...` command line on a page.

    Whole lines stand in fences, indented blocks and manifests; between backticks a command may be
    named without what it needs.
    """
    for file in (*PAGES, ROOT / "agq" / "README.md", ROOT / "model" / "weights" / "README.md"):
        text = file.read_text(encoding="utf-8")
        prose = re.sub(r"```.*?```", "", text, flags=re.S)
        blocks = [body for _, kind, body in fences(file) if kind in ("sh", "console", "text")]
        blocks += re.findall(r"^(?: {4}\S.*\n(?:      .*\n)*)+", prose, re.M)
        for body in blocks:
            for line in re.sub(r"\$\([^)]*\)", "X", body.replace("\\\n", " ")).splitlines():
                for words in called(shlex.split(line, comments=True)):
                    yield file.name, words, True
        for body in (body for _, kind, body in fences(file) if kind == "yaml"):
            for words in re.findall(r"command: \[agq, ([^\]]+)\]", body):
                yield file.name, [word.strip().strip('"') for word in words.split(",")], True
        for line in re.findall(r"`(agq [^`]+)`", prose):
            for words in called(shlex.split(line)):
                yield file.name, words, False


def called(words: list[str]) -> Iterator[list[str]]:
    """Yield the arguments of each `agq` of a command line, also inside a quoted one."""
    for k, word in enumerate(words):
        if " " in word:
            yield from called(shlex.split(word))
        elif word.rpartition("/")[2] == "agq" and k + 1 < len(words):
            rest = itertools.takewhile(lambda w: w not in (">", "&&", ";"), words[k + 1 :])
            yield [w.rstrip(";") for w in rest if not re.fullmatch(r"\$[A-Z]+", w)]
            break
