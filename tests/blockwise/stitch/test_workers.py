"""Small stitches are done by the process that asks for them, without a trace in it."""

import gc
import inspect
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from pathlib import Path
from unittest.mock import patch

import numba
import numpy as np
import pytest
from distributed import Client

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.reader import Journal
from agq.blockwise.stitch.output.boxes import Relabel
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.stitch.settings import DaskSettings
from agq.blockwise.stitch.workers import (
    LazyClient,
    StitchError,
    is_small,
    lazy_client,
    stitch_processes,
    workers_of,
)
from agq.errors import DamagedError, InputError
from tests.helpers import ROOT
from tests.helpers.fragments import GRID, make_run, write_run
from tests.helpers.stitch_runs import STEPS, open_cluster, results


@pytest.mark.parametrize("options", [{}, {"superblock": (1, 2, 1), "batch_blocks": 2}])
def test_this_process_gives_the_same_bytes(run, run_dir, undisturbed, options):
    seen: list[tuple[str, int, int]] = []
    run_stitch(run.spec(run_dir, **options), None, lambda *told: seen.append(told))
    assert results(run_dir) == undisturbed
    assert {step.split()[0] for step, _, _ in seen} == set(STEPS)
    for name in {step for step, _, _ in seen}:
        done = [(n, total) for step, n, total in seen if step == name]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1]
    assert run_stitch(run.spec(run_dir, **options), None).reused == STEPS
    for stage in ("relabel", "pyramid"):
        (worker,) = Journal(run_dir / "journal" / stage).workers.values()
        assert (worker.info.pid, worker.exit) == (os.getpid(), "end")


def state() -> dict[str, object]:
    """What a process has that a task might change."""
    gc.collect()
    files = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    root = logging.getLogger()
    return {
        "open files": sorted(str(file.readlink()) for file in files if file.is_symlink()),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "threads": {thread.name for thread in threading.enumerate()},
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "logging": (root.level, [*root.handlers], logging.root.manager.disable),
        "numba": numba.get_num_threads(),
        "path": [*sys.path],
        "warnings": [*warnings.filters],
        "errors of numpy": np.geterr(),
    }


def require_same(before: dict[str, object]) -> None:
    """Fail with what differs in this process; a thread may take a moment to end."""
    end = time.monotonic() + 20
    while (now := state()) != before and time.monotonic() < end:
        time.sleep(0.1)
    assert now == before, [(now[name], before[name]) for name in now if now[name] != before[name]]


def test_a_stitch_leaves_its_process_as_it_was(tmp_path):
    # In a process of its own: clusters of other tests open files and threads at any time.
    code = f"""
import sys
from pathlib import Path
from {__name__} import stitch_and_compare

stitch_and_compare(Path(sys.argv[1]))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, tmp_path], cwd=ROOT, check=True)


def stitch_and_compare(tmp_path: Path) -> None:
    """Stitch, also with a failure and an interrupt, and compare this process before and after."""
    run = make_run(GRID, seed=5)
    folders = [tmp_path / name for name in ("first", "second", "failed")]
    for folder in folders:
        write_run(run, folder)
    run_stitch(run.spec(folders[0]), None)  # what is loaded and compiled once
    before = state()
    tracemalloc.start()
    try:
        kept = tracemalloc.get_traced_memory()[0]
        run_stitch(run.spec(folders[1]), None)
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0] - kept
    finally:
        tracemalloc.stop()
    require_same(before)
    assert kept < 1 << 20
    lut = folders[2] / "lut"

    def damage(step: str, done: int, _total: int) -> None:
        if step == "relabel" and not done:
            for file in (lut / "map").iterdir():
                file.write_bytes(b"damaged")

    with pytest.raises(StitchError, match=r"relabel: \d+ blocks failed"):
        run_stitch(run.spec(folders[2]), None, damage)
    require_same(before)

    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with patch.object(Relabel, "_record", interrupt), pytest.raises(KeyboardInterrupt):
        run_stitch(run.spec(folders[2]), None)
    require_same(before)


def test_errors_of_a_task_are_as_those_of_a_worker(run, run_dir, client):
    run_stitch(run.spec(run_dir), None)
    # One file: of several, the first that a worker meets is named.
    min((run_dir / "contacts" / "0").iterdir()).write_bytes(b"damaged")
    said = []
    for which in (None, client):
        with pytest.raises(InputError) as caught:
            run_stitch(run.spec(run_dir, across=0.9), which)
        assert not isinstance(caught.value, DamagedError)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "--repair" in said[0]


def test_a_stitch_here_loads_no_dask_and_no_pandas(run, run_dir):
    """They take longer to load than a small stitch takes."""
    code = """
import sys
from pathlib import Path
from agq.blockwise.stitch.run import StitchSpec, run_stitch
from agq.blockwise.stitch.settings import DaskSettings
from agq.blockwise.stitch.workers import lazy_client

spec = StitchSpec.model_validate_json(sys.stdin.read())
with lazy_client(DaskSettings(), small=True) as client:
    run_stitch(spec, client)
# Nothing is left to do: a large one starts nothing either.
with lazy_client(DaskSettings()) as client:
    assert run_stitch(spec, client).reused
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=run.spec(run_dir).model_dump_json(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "numba" in loaded
    assert not loaded & {"dask", "distributed", "tornado", "torch", "pandas"}


@pytest.mark.parametrize(
    ("workers", "small", "cores", "processes"),
    [
        (None, True, None, 0),
        (None, True, 8, 0),
        (None, False, 8, 8),
        (None, False, None, len(os.sched_getaffinity(0))),
        (3, True, 8, 3),
        (3, False, None, 3),
        (0, False, 8, 0),
    ],
)
def test_a_named_number_of_workers_is_what_is_started(workers, small, cores, processes):
    settings = DaskSettings(workers=workers)
    assert stitch_processes(settings, small=small, cores=cores) == processes
    with lazy_client(settings, small=small, cores=cores) as client:
        if processes:
            assert isinstance(client, LazyClient)
            assert client.cores == processes
        else:
            assert client is None


def test_a_small_stitch_with_a_named_worker_has_that_worker(run, run_dir, undisturbed):
    with lazy_client(DaskSettings(workers=1), small=True) as client:
        run_stitch(run.spec(run_dir), client)
        (pid,) = client.client().run(os.getpid).values()
    (worker,) = Journal(run_dir / "journal" / "relabel").workers.values()
    assert worker.info.pid == pid != os.getpid()
    assert results(run_dir) == undisturbed


def test_a_small_stitch_takes_the_scheduler_that_is_named(tmp_path):
    with (
        open_cluster(1) as cluster,
        lazy_client(DaskSettings(address=cluster.scheduler_address), small=True) as client,
    ):
        assert isinstance(client, Client)
        assert workers_of(client, tmp_path).addresses() == {cluster.workers[0].address}


def test_what_is_small_is_what_the_documentation_says():
    text = inspect.getsource(DaskSettings)
    assert "at most 512 blocks of 16 million voxels in all" in " ".join(text.split())

    def grid(*write: int) -> BlockGrid:
        shape = (8 * write[0], 8 * write[1], 9 * write[2])
        return BlockGrid(
            volume_shape=shape, voxel_size=(30, 6, 6), write_shape=write, after=(0, 0, 0)
        )

    assert is_small(GRID, GRID.n_blocks)
    assert is_small(grid(8, 8, 8), 512)
    assert not is_small(grid(8, 8, 8), 513)
    assert is_small(grid(16, 256, 256), 16)
    assert not is_small(grid(16, 256, 256), 17)
