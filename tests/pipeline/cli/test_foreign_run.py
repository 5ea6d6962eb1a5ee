"""Commands that look at a run of somebody else: its record is data, whatever it says."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

import agq
from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.ledger.settings import URI_VARIABLE
from agq.blockwise.predict.local_processes import EXIT_START_FAILED
from agq.blockwise.predict.spec import PredictSpec
from agq.blockwise.volumes.create import create_array
from agq.errors import InputError
from agq.owners import TRUSTED_VARIABLE, stranger
from agq.pipeline.cli.score.score import truth_of
from agq.pipeline.config.recorded import read_target
from agq.pipeline.config.schema import DEFAULT_FACTORY, load_config, masked, parse_config
from agq.pipeline.dashboard.runs import Runs
from agq.pipeline.folder import RunFolder
from agq.pipeline.run.prepare import prepare_stitch
from agq.pipeline.slurm import jobs
from agq.pipeline.view.layers import config_layers
from tests.helpers.runs import make_config

Main = Callable[..., tuple[int, str, str]]

SHAPE = (4, 20, 20)
GRID = BlockGrid(SHAPE, (30, 6, 6), (2, 10, 10))
SECRET = "AGQ_TEST_SECRET"
VALUE = "wJalrXUtnFEMI"
OTHER = 54321

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


class _Recorder(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[tuple[str, list[str]]]:
    """A web server without anything: its address, and the paths that it was asked for."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Recorder) as server:
        server.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", server.asked  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


def make_run(folder: Path, path: str) -> RunFolder:
    """Make a run folder that names one path for every input, with labels to look at."""
    run = RunFolder(folder)
    volume = {"path": path, "dataset": "raw", "voxel_size": [30, 6, 6]}
    config = {
        "run_dir": str(run.path),
        "input": {"raw": volume, "mask": volume, "classes": volume},
        "evaluate": {"truth": volume},
        "notify": {"command": ["touch", str(folder.parent / "told")], "stall_minutes": 0.001},
    }
    raw = {"unit": "nm", "shape": SHAPE}
    with run.lock():
        identity = {"grid": GRID.to_dict(), "raw": raw, "mask": None, "model": {}}
        identity["affinities"] = True
        run.create(config, identity)
    for name in ("fragments", "affinities", "segmentation/s0"):
        channels = (3,) if name == "affinities" else ()
        create_array(
            run.container,
            name,
            dtype=np.uint8 if channels else np.uint64,
            shape=(*channels, *SHAPE),
            chunks=(*channels, *GRID.write_shape),
            voxel_size=(30, 6, 6),
        )[:] = 1
    run.update_stage("predict", state="done", started=1.0, finished=2.0, blocks_total=8)
    return run


def look(main: Main, run: Path, out: Path) -> Iterator[tuple[str, str]]:
    """Run every command that looks at a run; yield its name and all that it printed."""
    commands: dict[str, list[object]] = {
        "status": [],
        "metrics": [],
        "logs": [],
        "verify": [],
        "attach": [],
        "report": ["--out", out / "report.html"],
        "snapshot": ["--out", out / "snapshot.png"],
        "view": ["--print-state", "--base-url", "https://example.org/run"],
        "evaluate": [],
        "resume": [],
        "ledger": ["sync"],
        "export": ["precomputed"],
    }
    for name, rest in commands.items():
        words = [*rest, run] if name in ("ledger", "export") else [run, *rest]
        _, said, error = main(name, *words, *([out / "precomputed"] if name == "export" else []))
        yield name, said + error


def test_variables_in_a_record_stay_as_they_are(
    main: Main, tmp_path: Path, web: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET, VALUE)
    address, asked = web
    run = make_run(tmp_path / "run", f"{address}/x/${{{SECRET}}}/${{NOT_SET}}/${{X:-y}}.zarr")
    opened = {}
    for name, said in look(main, run.path, tmp_path):
        assert VALUE not in said, name
        opened[name] = len(asked) - sum(opened.values())
    assert all(opened[name] for name in ("report", "snapshot", "view", "evaluate"))
    for layer in config_layers(read_target(run.path)):
        assert layer.name not in ("raw", "truth")
    prepared = prepare_stitch(read_target(run.path))
    for opening in (prepared.opened_classes, prepared.opened_raw, lambda: truth_of(run, None)):
        with pytest.raises(InputError, match=SECRET):
            opening()
    view = Runs([run.path], tmp_path).view(run.record()["id"])
    assert VALUE not in str(view.overview(patience_s=None))
    # What the user writes now is another matter.
    with pytest.raises(InputError, match="NOT_SET_EITHER"):
        read_target(run.path, ["stitch.margin=${NOT_SET_EITHER}"])
    config = read_target(run.path, [f"run_dir=${{{SECRET}}}"])
    assert config.run_dir == VALUE
    assert config.input.raw.path.endswith("${X:-y}.zarr")
    wanted = f"/${{{SECRET}}}/${{NOT_SET}}/${{X:-y}}.zarr"
    assert asked
    assert all(wanted in unquote(path) for path in asked)


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], bool]]:
    """Put a module `evil_predictor` where workers look; tells whether it was imported."""
    (tmp_path / "packages").mkdir()
    mark = tmp_path / "imported"
    code = f"import pathlib; pathlib.Path({str(mark)!r}).touch(); from tests.helpers.fakes import *"
    (tmp_path / "packages" / "evil_predictor.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delenv(TRUSTED_VARIABLE, raising=False)

    def imported() -> bool:
        was = mark.exists()
        mark.unlink(missing_ok=True)
        sys.modules.pop("evil_predictor", None)
        return was

    yield imported
    imported()


def give_away(*paths: Path) -> None:
    for path in paths:
        os.chown(path, OTHER, OTHER)


@as_root
@pytest.mark.parametrize("given", [".", "run.json", "predict.json", "slurm/config.json"])
def test_code_for_the_folder_of_a_stranger_is_refused_unless_trusted(
    main: Main, tmp_path: Path, factory: Callable[[], bool], given: str, caplog: Any
) -> None:
    config = make_config(tmp_path, model={"factory": "evil_predictor:threshold"})
    run = RunFolder(tmp_path / "run")
    values = load_config(config)
    with run.lock():
        run.create(masked(values), {"grid": GRID.to_dict(), "raw": {}, "mask": None, "model": {}})
    jobs.save_config(values)
    (run.path / "predict.json").write_text("{}")
    give_away(run.path / given)
    commands = (
        ("plan", config, "--no-time"),
        ("predict", config, "--dry-run", "--blocks", "0"),
        ("run", config),
        ("stitch", run.path, "--set", "blocks.before=[2,1,1]"),
        ("submit", config),
        ("resume", run.path),
        ("scale", run.path, "3"),
        ("cancel", run.path),
    )
    for name, *rest in commands:
        if name == "submit" and not shutil.which("sbatch"):
            continue  # says first that there is no SLURM
        code, _, error = main(name, *rest)
        assert code == 2, name
        assert f"belongs to uid {OTHER}" in error, (name, error)
        assert "--trust" in error, (name, error)
        assert not factory(), name
    with pytest.raises(InputError, match="--trust"):
        agq.Run(run.path, blocks={"before": (2, 1, 1)}).stitch()
    assert not factory()
    # Named before it is imported, and run when the user says so.
    caplog.clear()
    main("plan", config, "--no-time", "--trust")
    assert factory()
    assert "model.factory evil_predictor:threshold" in caplog.text
    _, _, error = main("resume", run.path, "--trust")
    assert "belongs to" not in error
    assert stranger(jobs.config_path(run.path)) is None


@as_root
def test_jobs_take_no_configuration_of_a_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that a group may write: its config.json decides what a job runs."""
    monkeypatch.delenv(TRUSTED_VARIABLE, raising=False)
    values = load_config(make_config(tmp_path))
    (tmp_path / "run").mkdir()
    jobs.save_config(values)
    give_away(jobs.config_path(tmp_path / "run"))
    with pytest.raises(InputError, match=f"belongs to uid {OTHER}, and decides what jobs run"):
        jobs.load_config(tmp_path / "run")
    jobs.adopt_config(tmp_path / "run")
    assert jobs.load_config(tmp_path / "run") == values


@as_root
def test_a_hook_of_a_stranger_is_not_run_unless_trusted(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their folder, or a record in a folder that a group may write."""
    monkeypatch.delenv(TRUSTED_VARIABLE, raising=False)
    run, told = make_run(tmp_path / "run", str(tmp_path / "none.zarr")), tmp_path / "told"
    for given in (run.path, run.record_path):
        give_away(given)
        for words in (("notify", run.path), ("notify", run.path, "--test"), ("stitch", run.path)):
            code, _, error = main(*words)
            assert code == 2, words
            assert f"belongs to uid {OTHER}" in error
        for _ in look(main, run.path, tmp_path):
            pass
        assert not told.exists()
        os.chown(given, 0, 0)
    give_away(run.path)
    assert main("notify", run.path, "--test", "--trust")[0] == 0
    assert told.exists()


@as_root
def test_a_recorded_scheduler_of_a_stranger_is_not_called(main: Main, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", str(tmp_path / "none.zarr"))
    record = run.record()
    config = {**record["config"], "stitch": {"dask": {"address": "tcp://127.0.0.1:1"}}}
    run.update(config=config)
    give_away(run.path)
    code, _, error = main("stitch", run.path)
    assert code == 2
    assert "stitch.dask.address tcp://127.0.0.1:1" in error
    assert f"belongs to uid {OTHER}" in error


@as_root
def test_nothing_is_written_into_the_folder_of_a_stranger(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in it may be a link to one of the user's, where a stitch would delete files."""
    monkeypatch.delenv(TRUSTED_VARIABLE, raising=False)
    config = make_config(tmp_path, model={"factory": DEFAULT_FACTORY, "checkpoint": "none"})
    values = load_config(config)
    run = RunFolder(tmp_path / "run")
    identity = {"grid": GRID.to_dict(), "raw": {}, "mask": None, "model": {}, "affinities": False}
    with run.lock():
        run.create(masked(values), identity)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "kept").touch()
    for name in ("lut", "stitch", "baselines"):
        (run.path / name).symlink_to(mine)
    imported, earlier = tmp_path / "imported", tmp_path / "earlier"
    arrays = {"fragments": {"path": "f"}, "affinities": {"path": "a"}}
    with RunFolder(imported).lock():
        joined = parse_config({"run_dir": str(imported), "input": arrays})
        RunFolder(imported).create(masked(joined), identity)
    earlier.mkdir()
    (earlier / "settings.json").write_text('{"source": {}, "settings": {"stitch": {}}}')
    give_away(run.path, run.record_path, imported, earlier)
    for name, *rest in (
        ("predict", config),
        ("run", config),
        ("stitch", run.path),
        ("stitch", imported),
        ("stitch", earlier),
        ("baseline", "watershed", run.path),
        ("verify", run.path, "--repair"),
    ):
        code, _, error = main(name, *rest)
        assert code == 2, (name, error)
        assert f"belongs to uid {OTHER}" in error, (name, error)
        assert "work on a copy" in error, (name, error)
    assert [path.name for path in mine.iterdir()] == ["kept"]
    monkeypatch.setenv(TRUSTED_VARIABLE, str(OTHER))
    assert "belongs to" not in main("stitch", run.path)[2]


@as_root
def test_looking_copies_nothing_into_the_folder_of_a_stranger(main: Main, tmp_path: Path) -> None:
    np.save(tmp_path / "private.npy", np.ones(SHAPE, np.uint8))
    run = make_run(tmp_path / "run", str(tmp_path / "private.npy"))
    give_away(run.path, run.record_path)
    assert "--out" in main("report", run.path)[2]
    for name, said in look(main, run.path, tmp_path):
        assert not (run.path / "imported").exists(), (name, said)
        assert not (run.path / "report.html").exists(), name


@as_root
def test_a_uri_of_a_stranger_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    run = make_run(tmp_path / "run", "x.zarr")
    files = [tmp_path / "uri", run.path / "slurm" / "ledger-uri"]
    run.update(config={**run.record()["config"], "ledger": {"uri_file": str(files[0])}})
    files[1].parent.mkdir()
    for file in files:
        file.write_text("mongodb://evil.example/?authMechanism=MONGODB-AWS")
    # The user's own record names a file of a colleague.
    give_away(*files)
    assert read_target(run.path).ledger.uri_file == files[0]  # type: ignore[union-attr]
    give_away(run.path, run.record_path)
    assert read_target(run.path).ledger.resolve() is None  # type: ignore[union-attr]


EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08\x7f\u202egnp\u2066\u2028\x0bend\n\x1b[3Arun other"
# What bars and live tables write: colours, cursor off and on, up a line and clear it.
OUR_OWN = re.compile(r"\x1b\[(?:[0-9;]*m|\?25[lh]|2K|1A)|\r")


@pytest.fixture
def evil(tmp_path: Path) -> RunFolder:
    """A run whose texts are what a terminal would obey, in every place that others write."""
    run = make_run(tmp_path / "runs\x1b[2J\u202e", str(tmp_path / f"none{EVIL[:40]}.zarr"))
    record = run.record()
    command = {"argv": [EVIL], "host": EVIL, "user": EVIL, "time": 1.0, "versions": {EVIL: EVIL}}
    record["commands"] = [command]
    record["name"] = EVIL
    record["stages"][EVIL] = {"state": "failed", "error": EVIL}
    record["stages"]["predict"] |= {"state": "failed", "error": EVIL}
    run.update(**record)
    info = WorkerInfo(EVIL, EVIL, 1, device=EVIL, job=EVIL, started=1.0, gpu=EVIL)
    with JournalWriter(run.journal("predict"), info) as journal:
        journal.begin(1)
        journal.finish(BlockRecord(2, "failed", reason=EVIL, error=f"Error\n{EVIL}", finished=2.0))
        journal.finish(BlockRecord(3, "failed", error=f"Error\nValueError: {EVIL}", finished=2.0))
    (run.path / "logs").mkdir()
    (run.path / "logs" / "worker-x\x1b[2J.log").write_text(f"last words {EVIL}\n")
    return run


def assert_plain(said: str, name: str) -> None:
    found = [c for c in said if c != "\n" and (ord(c) < 32 or ord(c) in range(127, 160))]
    found += [c for c in said if c in "\u202e\u2066\u2028"]
    assert not found, (name, found, said[-500:])


@pytest.mark.parametrize("terminal", [False, True])
def test_no_text_of_a_run_is_obeyed_by_the_terminal(
    main: Main, evil: RunFolder, tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    seen = ""
    for name, said in look(main, evil.path, tmp_path):
        assert_plain(OUR_OWN.sub("", said), name)
        seen += said
    for words in (
        ("watch", evil.path),
        ("logs", evil.path, "--block", "2"),
        ("logs", evil.path, "--worker", "x\x1b[2J"),
        ("logs", evil.path, "--worker", "none\x1b[2J"),
        ("status", evil.path, "--json"),
        ("dashboard", tmp_path / "no\x1b[2Jrun"),
        ("plan", tmp_path / "no\x1b[2J.yaml"),
        ("config", "check", tmp_path / "odd.yaml"),
    ):
        (tmp_path / "odd.yaml").write_text('"a\\e[2Jb": 1\nrun_dir: "\\u202e"\ninput: "\\x9b"')
        _, out, error = main(*words)
        assert_plain(OUR_OWN.sub("", out + error), words[0])
        seen += out + error
    assert seen.count("\\u001b") > 20
    assert "\\u202e" in seen
    # No line of its own, which could pass for one of ours.
    assert "\nrun other" not in OUR_OWN.sub("", main("status", evil.path)[1])
    status = json.loads(main("status", evil.path, "--json")[1])
    assert status["name"] == EVIL


def test_unexpected_errors_and_warnings_are_plain(evil: RunFolder) -> None:
    code = (
        "import logging, sys; from agq.credentials import log_to_stderr as log; log('%(message)s')"
        "; logging.getLogger('x').warning('%s', sys.argv[1]); raise RuntimeError(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, EVIL], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("owned") == 2
    assert_plain(done.stderr, "errors")


@as_root
def test_a_worker_takes_no_specification_of_a_stranger(
    tmp_path: Path, factory: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"run_dir": str(tmp_path), "grid": GRID.to_dict(), "raw": {"path": "x.zarr"}}
    PredictSpec(factory="evil_predictor:threshold", **values).save()
    give_away(tmp_path / "predict.json")
    arguments = [sys.executable, "-m", "agq.blockwise.predict.worker", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == EXIT_START_FAILED
    assert f"predict.json belongs to uid {OTHER}, and decides what this worker runs" in done.stderr
    assert not factory()
    assert PredictSpec.load(tmp_path).factory == "evil_predictor:threshold"
    monkeypatch.setenv(TRUSTED_VARIABLE, str(OTHER))
    assert PredictSpec.load(tmp_path, to_run=True).factory == "evil_predictor:threshold"
