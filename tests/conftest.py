"""Fixtures shared by all tests."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT
from tests.helpers.services import mongo_server, mongo_uri

__all__ = ["mongo_server", "mongo_uri"]

# One process a core: with a thread a core each they would wait for one another, four times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# What tests start finds the predictors of tests/helpers, as users' own ones are found.
os.environ["PYTHONPATH"] = str(ROOT)

# A shell starts background jobs with Ctrl-C ignored, and what they start inherits that; tests that
# send it must find it as in a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with tests that are given most time: else one process ends long after the others."""

    def limit(item: pytest.Item) -> float:
        mark = item.get_closest_marker("timeout")
        return float(mark.args[0]) if mark else 0.0

    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=limit, reverse=True)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real EM data and golden outputs that only developers have."""
    folder = ROOT.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("developer data (../shared) is not on this machine")
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the small reference files that are part of the repository."""
    return Path(__file__).parent / "data"


@pytest.fixture
def open_ledger() -> Iterator[Callable[..., Any]]:
    """Like `ledger.database.connect`, and closed in the end even if the test fails."""
    from agq.blockwise.ledger.database import connect

    with contextlib.ExitStack() as stack:
        yield lambda settings: stack.enter_context(contextlib.closing(connect(settings)))


@pytest.fixture
def main(monkeypatch, capsys):
    """Run the command line in this process; return exit code, stdout and stderr."""
    from agq import terminal
    from agq.pipeline.cli.main import main

    monkeypatch.chdir(ROOT)
    # What a slow machine makes a command say is no part of its answer.
    monkeypatch.setattr(terminal, "SILENT_S", 3600.0)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["agq", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run
