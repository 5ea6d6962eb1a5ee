"""The package built from a copy of the repository, and installed into environments of its own."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.helpers import ROOT

BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # setuptools puts its own arguments there
build_meta.build_wheel(folder)
build_meta.build_sdist(folder)
"""


def call(arguments: list[object], folder: Path, **variables: str) -> str:
    # Nothing of the repository is on the path.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in arguments],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def one(folder: Path, pattern: str) -> Path:
    """Return the only file of a pattern."""
    (file,) = folder.glob(pattern)
    return file


def copy_source(folder: Path) -> None:
    """Copy what git knows of the repository: a build leaves files beside its sources."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    present = [n for n in listed.split(b"\0") if n and os.path.lexists(ROOT / os.fsdecode(n))]
    packed = subprocess.run(
        ["tar", "--null", "-T", "-", "-cf", "-"],
        cwd=ROOT,
        input=b"\0".join(present),
        capture_output=True,
        check=True,
    ).stdout
    subprocess.run(["tar", "-xf", "-", "-C", folder], input=packed, check=True)


def install(env: Path, *what: object) -> Path:
    """Make an environment with the package, and what it needs from this one; return its bin."""
    call([sys.executable, "-m", "venv", "--without-pip", env], env)
    python = env / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(call([python, "-P", "-c", where], env).strip())
    # As a plain path: what is installed there by links, this repository itself, is not followed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    call([*pip, "--no-index", "--no-build-isolation", "--force-reinstall", *what], env)
    return env / "bin"
