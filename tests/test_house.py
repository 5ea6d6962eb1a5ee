"""The house: which room knows which, how full a room may be, and one name for each module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGES = ("blockwise", "model", "pipeline")

FORBIDDEN = [
    ("model", "agq.blockwise"),
    ("model", "agq.pipeline"),
    ("blockwise", "agq.model"),
    ("blockwise", "agq.pipeline"),
    ("blockwise/predict", "agq.blockwise.stitch"),
    ("blockwise/stitch", "agq.blockwise.predict"),
    ("blockwise/stitch", "agq.blockwise.export"),
]
"""A folder, and what no file in it may import."""

ROOM = 13
"""Most modules of a folder, `__init__` not counted."""


def imported(file: Path) -> set[str]:
    """Return the dotted names that a file imports, of `from a import b` both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module is not None
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize(("room", "other"), FORBIDDEN)
def test_rooms_do_not_import_what_is_above_or_beside_them(room, other):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    wrong = {
        str(file.relative_to(ROOT)): name
        for file in files
        for name in imported(file)
        if name == other or name.startswith(f"{other}.")
    }
    assert not wrong


def rooms(depth: int) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """Return which folders of this depth import which others of the same parent.

    A module `settings` counts for nobody: the configuration embeds those of the rooms that read it.
    """
    edges: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            here = file.parent.relative_to(ROOT).parts[:depth]
            for name in imported(file):
                path = ROOT / "/".join(name.split(".")[1:])
                if not name.startswith("agq.") or not path.with_suffix(".py").is_file():
                    continue
                there = path.parent.relative_to(ROOT).parts[:depth]
                if path.name in ("settings", "folder"):
                    continue
                if there != here and len(here) == len(there) == depth and there[:-1] == here[:-1]:
                    edges.setdefault(here, set()).add(there)
    return edges


@pytest.mark.parametrize("depth", [2, 3])
def test_rooms_import_each_other_in_one_direction(depth):
    edges = rooms(depth)
    assert edges

    def follow(room: tuple[str, ...], above: tuple[tuple[str, ...], ...] = ()) -> None:
        circle = " -> ".join("/".join(r) for r in (*above, room))
        assert room not in above, f"a circle: {circle}"
        for other in sorted(edges.get(room, ())):
            follow(other, (*above, room))

    for room in sorted(edges):
        follow(room)


def test_rooms_are_not_overfull():
    full = {
        str(folder.relative_to(ROOT)): n
        for package in PACKAGES
        for folder in [ROOT / package, *(ROOT / package).rglob("*")]
        if (n := sum(f.name != "__init__.py" for f in folder.glob("*.py"))) > ROOM
    }
    assert not full


def test_every_test_has_the_room_of_what_it_tests():
    strange = [
        str(folder.relative_to(ROOT))
        for package in PACKAGES
        for folder in (ROOT / "tests" / package).rglob("*")
        if folder.is_dir()
        and folder.name != "__pycache__"
        and not (ROOT / folder.relative_to(ROOT / "tests")).is_dir()
    ]
    assert not strange


def test_tests_import_only_helpers():
    wrong = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in (ROOT / "tests").rglob("*.py")
        for name in imported(file)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split("."))
    }
    assert not wrong


def test_daisy_is_imported_by_its_adapter_alone():
    importers = {
        str(file.relative_to(ROOT))
        for folder in (*PACKAGES, "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
        if any(name.split(".")[0] == "daisy" for name in imported(file))
    }
    assert importers == {"blockwise/predict/daisy.py"}


def test_daemon_threads_say_what_their_death_means():
    """One module starts them all, by `start_vital` or `start_aside`."""
    starts = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Thread"
    }
    assert starts == {"blockwise/threads.py"}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_module_has_one_name(package):
    """The repository's root is on the path of tests: there the folders themselves are found too."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert f"import agq.{package}, not {package}" in done.stderr
