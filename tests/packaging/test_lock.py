"""Exact versions and checksums of all packages: whole, and really asked for."""

import re
import subprocess
import sys
import tomllib
from itertools import chain, pairwise

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ROOT

LOCKS = ("all", "image", "build")
TORCH = (ROOT / "requirements" / "torch.txt").read_text().split()[-1]


def entries(name: str) -> list[tuple[str, list[str]]]:
    """Return the requirements of a lock, each with its checksums."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    blocks = re.findall(r"^([^\s#][^\\\n]*?)\s*((?:\\\n\s+--hash=\S+\s*)*)$", text, re.MULTILINE)
    return [(what, re.findall(r"sha256:[0-9a-f]{64}", hashes)) for what, hashes in blocks]


def versions(name: str) -> dict[str, set[str]]:
    """Return the versions by name of a lock, which may differ between versions of Python."""
    found: dict[str, set[str]] = {}
    for requirement, _ in entries(name):
        pinned = Requirement(requirement)
        found.setdefault(canonicalize_name(pinned.name), set()).add(str(pinned.specifier)[2:])
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_one_version_and_checksums(name):
    assert len(entries(name)) > (0 if name == "build" else 100)
    for requirement, hashes in entries(name):
        assert re.match(r"[A-Za-z0-9._-]+==[\w.]+( ;|$)", requirement)
        assert hashes, requirement
    # CUDA libraries belong to a build of torch, which names them itself.
    assert not [n for n in versions(name) if re.match("torch$|triton|nvidia|cuda", n)]


def test_the_locks_hold_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    image = [*project["dependencies"], *extras["view"], *extras["slurm"]]
    everything = [*image, *chain(*extras.values())]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for name, wanted in (("build", build), ("image", image), ("all", everything)):
        locked = versions(name) | {"torch": {TORCH.removeprefix("torch==")}}
        for asked in map(Requirement, wanted):
            assert all(asked.specifier.contains(v) for v in locked[canonicalize_name(asked.name)])
    both = versions("all")
    assert {n: v for n, v in versions("image").items() if both.get(n) != v} == {}


@pytest.mark.parametrize("file", ["Makefile", "docker/Dockerfile", "docker/apptainer.def"])
def test_whatever_is_installed_is_held_to_its_checksum(file):
    """But for torch, of which each index has builds of its own, and for this project."""
    text = (ROOT / file).read_text().replace("\\\n", " ")
    calls = re.findall(r"pip install ([^\n&|]*)", text)
    kinds = [
        "hashes" if "--no-deps --require-hashes" in call
        else "torch" if call.split()[-1] == "requirements/torch.txt"
        else "own" if "--no-deps --no-build-isolation" in call and call.split()[-1] == "."
        else call
        for call in calls
    ]  # fmt: skip
    assert set(kinds) == {"hashes", "own", "torch"}
    # What torch asks for is there, with its checksum, before pip looks for the rest.
    assert ("hashes", "torch") in pairwise(k for k in kinds if k != "own")


def test_another_file_under_the_same_name_is_refused(tmp_path):
    """An index, or a mirror, that serves a package of its own."""
    requirement, hashes = next(e for e in entries("image") if e[0].startswith("toolz=="))
    version = requirement.partition(" ")[0].removeprefix("toolz==")
    (tmp_path / f"toolz-{version}-py3-none-any.whl").write_bytes(b"another file")
    lock = tmp_path / "lock.txt"
    lock.write_text(requirement + "".join(f" --hash={one}" for one in hashes) + "\n")
    pip = [sys.executable, "-m", "pip", "--isolated", "install", "--no-deps", "--no-index"]
    pip += ["--target", tmp_path / "target", "--find-links", tmp_path]
    command = [*pip, "--require-hashes", "-r", lock]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


@pytest.mark.parametrize(
    ("says", "status", "code", "words"),
    [
        ("No known vulnerabilities found", 0, 0, "No known"),
        ("Found 1 known vulnerability in 1 package", 1, 2, "Found 1"),
        ("ConnectionError: Failed to resolve 'api.osv.dev'", 1, 0, "nothing was checked"),
    ],
)
def test_an_audit_without_a_database_is_no_failure(tmp_path, says, status, code, words):
    """What the auditor prints last, and its exit status, decide."""
    auditor = tmp_path / "venv" / "bin" / "uv"
    auditor.parent.mkdir(parents=True)
    auditor.write_text(f'#!/bin/sh\necho "{says}" >&2\nexit {status}\n')
    auditor.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "requirements"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "venv" / ".installed").touch()
    command = ["make", "-C", tmp_path, "audit", "VENV=venv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert words in done.stdout
    versions = (tmp_path / "build" / "versions.txt").read_text().splitlines()
    assert TORCH in versions
    assert len(versions) == len(entries("all")) + 1
