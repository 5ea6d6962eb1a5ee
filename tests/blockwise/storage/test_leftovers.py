"""Temporary files of killed writers are removed, and nothing else."""

import os
import signal
import subprocess
import sys

import pytest

from agq.blockwise.storage.leftovers import remove_all_temporaries, remove_temporaries
from agq.blockwise.volumes.create import chunk_file, open_array
from tests.helpers.runs import ROOT

HEX = "0123456789abcdef" * 2


WRITERS = """
import os, signal, sys
from pathlib import Path
import numpy as np
from agq.blockwise.volumes.create import create_array, write_chunk
from agq.blockwise.storage.files import write_atomic

folder = Path(sys.argv[2])
array = create_array(
    folder / "a.zarr", "x", shape=(4,) * 3, chunks=(2,) * 3, dtype="uint8", voxel_size=(1,) * 3
)
Path.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "chunk":
    write_chunk(array, (0, 1, 1), np.ones((2, 2, 2), np.uint8))
write_atomic(folder / "f.json", b"{}")
"""


@pytest.mark.parametrize("what", ["chunk", "file"])
def test_real_writers_killed_before_the_rename(tmp_path, what):
    ended = subprocess.run(
        [sys.executable, "-c", WRITERS, what, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    left = [path for path in files if path.suffix in (".partial", ".tmp")]
    assert len(left) == 1
    target = tmp_path / "f.json"
    if what == "chunk":
        target = chunk_file(open_array(tmp_path / "a.zarr", "x"), (0, 1, 1))
    assert remove_temporaries([target]) == 1
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(files) - set(left)


def test_only_the_named_files_and_only_temporary_names(tmp_path):
    names = [
        f"3.{HEX}.partial",
        f"33.{HEX}.partial",
        f".3.npz.{HEX[:16]}.tmp",
        f".33.npz.{HEX[:16]}.tmp",
        "3",
        "3.npz",
        "3.partial",
        f"3.{HEX}",
        "notes.tmp",
    ]
    for name in names:
        (tmp_path / name).write_text("")
    assert remove_temporaries([tmp_path / "3", tmp_path / "3.npz", tmp_path / "no" / "such"]) == 2
    left = {path.name for path in tmp_path.iterdir()}
    assert left == set(names) - {names[0], names[2]}


def test_everywhere_below(tmp_path):
    deep = tmp_path / "c" / "0" / "1"
    deep.mkdir(parents=True)
    for folder in (tmp_path, deep):
        (folder / f"7.{HEX}.partial").write_text("")
        (folder / "7").write_text("kept")
    assert remove_all_temporaries(tmp_path) == 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["7", "7"]
    assert remove_all_temporaries(tmp_path / "nowhere") == 0
