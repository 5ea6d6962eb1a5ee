"""Libraries that compile find a folder, however little of the machine can be written."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.rights import run_as_user

SHOW = """
import os, warnings
warnings.simplefilter("error")
import agq
import agq.blockwise.blocks.label_pairs
import matplotlib.font_manager
print(os.environ.get("NUMBA_CACHE_DIR", "-"), os.environ.get("MPLCONFIGDIR", "-"))
"""


@pytest.fixture
def installed(tmp_path):
    """Return a copy of the package that cannot be written, and a home that cannot."""
    package, home, temporary = (tmp_path / name for name in ("site", "home", "tmp"))
    skip = shutil.ignore_patterns("__pycache__", "weights")
    shutil.copytree(ROOT / "agq", package / "agq", ignore=skip)
    for folder in (home, temporary):
        folder.mkdir()
    closed = [home, package, *(p for p in package.rglob("*") if p.is_dir())]
    for folder in closed:
        folder.chmod(0o555)
    yield package, home, temporary
    for folder in closed:
        folder.chmod(0o755)


def start(installed, code=SHOW, **variables) -> subprocess.CompletedProcess:
    package, home, temporary = installed
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    given = {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": str(package)} | variables
    return run_as_user("-B", "-c", code, env=kept | given, cwd="/")


def test_a_read_only_installation_without_a_home(installed):
    _, _, temporary = installed
    done = start(installed)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    numba, matplotlib = map(Path, done.stdout.split())
    own = temporary / f"agq-{os.getuid()}"
    assert numba.parent == matplotlib.parent == own
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert numba.is_dir()
    # What a user has named is kept.
    named = start(installed, NUMBA_CACHE_DIR=str(temporary / "n"), MPLCONFIGDIR=str(temporary))
    assert named.stdout.split() == [str(temporary / "n"), str(temporary)]


@pytest.mark.parametrize("others", ["file", "open", "link"])
def test_a_folder_that_others_may_have_made_is_not_used(installed, others):
    """They could put code there that this user runs."""
    _, home, temporary = installed
    taken = temporary / f"agq-{os.getuid()}"
    if others == "file":
        taken.mkdir()
        taken.chmod(0o777)
    elif others == "open":
        taken.mkdir(mode=0o700)
        taken.chmod(0o720)
    else:
        taken.symlink_to(home)
    code = "import agq, os; print(os.environ['NUMBA_CACHE_DIR'])"
    folder = Path(start(installed, code).stdout.strip()).parent
    assert folder.parent == temporary
    assert folder != taken


def test_nothing_is_named_where_a_cache_can_be_written(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR")}
    code = "import agq, os; print(os.environ.get('NUMBA_CACHE_DIR'))"
    command = [sys.executable, "-c", code]
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output(command, env=env, text=True) == "None\n"
