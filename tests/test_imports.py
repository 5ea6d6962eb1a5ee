"""The import direction: pipeline -> blockwise, pipeline -> model, and no other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {"model": {"blockwise", "pipeline"}, "blockwise": {"model", "pipeline"}}


def imported_packages(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_packages_do_not_import_what_is_above_or_beside_them(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        str(file.relative_to(ROOT)): sorted(imported_packages(file) & FORBIDDEN[package])
        for file in files
        if imported_packages(file) & FORBIDDEN[package]
    }
    assert not wrong


def test_no_module_grows_beyond_reading_size():
    long = {
        str(file.relative_to(ROOT)): n
        for package in ("model", "blockwise", "pipeline")
        for file in (ROOT / package).rglob("*.py")
        if (n := len(file.read_text(encoding="utf-8").splitlines())) > 420
    }
    assert not long
