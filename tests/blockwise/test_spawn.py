"""The import path of processes: folders that somebody has named, and no other."""

import os
import sys
from pathlib import Path

import pytest

from agq.blockwise.spawn import search_named_folders_only

STANDARD = str(Path(os.__file__).parent)


@pytest.mark.parametrize(
    ("named", "kept", "here_stays"),
    [
        ("", None, True),
        (":/a", "/a", False),
        ("/a::/b:", "/a:/b", False),
        (".:/a:", ".:/a", True),
        (".", ".", True),
        ("/a", "/a", True),
        (":", None, False),
    ],
)
def test_an_empty_entry_names_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, kept: str | None, here_stays: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH")
    if named:
        monkeypatch.setenv("PYTHONPATH", named)
    path = [str(tmp_path), "/a", STANDARD, f"{STANDARD}/site-packages"]
    monkeypatch.setattr(sys, "path", [*path])
    search_named_folders_only()
    assert os.environ.get("PYTHONPATH") == kept
    assert sys.path == path[not here_stays :]
