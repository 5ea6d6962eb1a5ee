"""Commands that look at a run of somebody else: its record is data, whatever it says."""

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.volumes.create import create_array
from agq.errors import InputError
from agq.pipeline.cli.score import truth_of
from agq.pipeline.config.recorded import read_target
from agq.pipeline.dashboard.runs import Runs
from agq.pipeline.folder import RunFolder
from agq.pipeline.run.prepare import prepare_stitch
from agq.pipeline.view.layers import config_layers

Main = Callable[..., tuple[int, str, str]]

SHAPE = (4, 20, 20)
GRID = BlockGrid(SHAPE, (30, 6, 6), (2, 10, 10))
SECRET = "AGQ_TEST_SECRET"
VALUE = "wJalrXUtnFEMI"


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
