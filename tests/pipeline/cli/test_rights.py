"""A colleague's folder that is closed to this user is one line, whichever command meets it."""

import json
import os

import pytest

from agq.pipeline.folder import RunFolder
from tests.helpers import ROOT
from tests.helpers.rights import run_as_user
from tests.helpers.runs import make_config

RUN_ALL = """
import contextlib, io, json, sys
from agq.pipeline.cli.main import main

said = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["agq", *words]
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException as other:
            code = repr(other)
    said[" ".join(words[:2])] = [code, error.getvalue()]
print(json.dumps(said))
"""


def commands(folder) -> list[list[str]]:
    run, config = str(folder / "run"), str(folder / "config.yaml")
    return [
        *([name, run] for name in ("status", "watch", "metrics", "logs", "report", "snapshot")),
        *([name, run] for name in ("attach", "cancel", "resume", "stitch", "dashboard")),
        ["scale", run, "3"],
        ["view", run, "--print-state", "--base-url", "http://x"],
        ["ledger", "sync", run],
        ["export", "precomputed", run, str(folder / "out")],
        ["evaluate", run, run],
        *([name, config] for name in ("plan", "predict", "run")),
    ]


@pytest.mark.parametrize("closed", ["", "run", "run/run.json", "config.yaml"])
def test_one_line_for_every_command(tmp_path, closed):
    make_config(tmp_path)
    run = RunFolder(tmp_path / "run")
    with run.lock():
        run.create({"run_dir": str(run.path), "input": {"raw": {"path": "x.zarr"}}}, {"grid": 1})
    path = tmp_path / closed
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        given = {**os.environ, "PYTHONPATH": str(ROOT), "AGQ_MONGO_URI": ""}
        wanted = json.dumps(
            [words for words in commands(tmp_path) if closed != "config.yaml" or closed in words[1]]
        )
        done = run_as_user("-c", RUN_ALL, wanted, env=given, cwd="/")
    finally:
        path.chmod(mode)
    assert done.returncode == 0, done.stderr
    for command, (code, text) in json.loads(done.stdout).items():
        of_config = command.split()[1].endswith("config.yaml")
        assert code == 2, (command, code, text)
        assert text.startswith("agq: "), command
        assert text.count("\n") == 1, (command, text)
        assert str(tmp_path) in text or of_config, (command, text)
