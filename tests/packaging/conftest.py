"""The package as users install it."""

import sys
from pathlib import Path

import pytest

from tests.helpers.installs import BUILD, call, copy_source, install, one


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository."""
    folder = tmp_path_factory.mktemp("source")
    copy_source(folder)
    return folder


@pytest.fixture(scope="session")
def dist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    call([sys.executable, "-P", "-c", BUILD, folder], source)
    return folder


@pytest.fixture(scope="session")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel."""
    return install(tmp_path_factory.mktemp("env"), one(dist, "*.whl"))


@pytest.fixture(scope="session")
def linked(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with an editable install."""
    return install(tmp_path_factory.mktemp("env"), "--editable", source)
