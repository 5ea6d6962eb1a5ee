"""Faults of a stitch: killed processes, workers, schedulers, a full disk; the same bytes."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from agq.blockwise.journal.reader import Journal
from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.run import StitchSpec, run_stitch
from agq.blockwise.stitch.settings import DaskSettings
from agq.blockwise.stitch.workers import StitchError
from agq.blockwise.volumes.create import create_array
from agq.errors import RunGoneError
from tests.helpers import ROOT
from tests.helpers.fragments import GRID, write_run
from tests.helpers.runs import agq
from tests.helpers.stitch_runs import results

SEEDS = range(5)


def in_a_process(spec: StitchSpec, workers: int, *when: str) -> int:
    """Run `stitch_process.py`; return its exit code."""
    file = spec.run_dir.parent / "spec.json"
    file.write_text(spec.model_dump_json())
    script = ROOT / "tests/helpers/stitch_process.py"
    command = [sys.executable, str(script), str(file), str(workers), *when]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=env
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.parametrize("workers", [0, -1])
def test_killed_while_relabelling(run, run_dir, client, undisturbed, workers):
    assert in_a_process(run.spec(run_dir), workers, "relabel", "9") == -signal.SIGKILL
    done = Journal(run_dir / "journal" / "relabel").counts()["done"]
    assert 0 < done < GRID.n_blocks
    run_stitch(run.spec(run_dir), client if workers == 0 else None)
    assert results(run_dir) == undisturbed


INTERRUPTED = """
import sys
from contextlib import nullcontext
from pathlib import Path
from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.run import StitchSpec, run_stitch
from agq.blockwise.stitch.settings import DaskSettings

def say(*words):
    print(*words, flush=True)

spec = StitchSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
try:
    say("starting")
    workers = int(sys.argv[2])
    with dask_client(DaskSettings(workers=workers)) if workers else nullcontext() as client:
        run_stitch(spec, client, say)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("moment", "workers"), [("starting", 2), ("contacts", 2), ("contacts", 0)])
def test_ctrl_c_prints_no_traceback(run, run_dir, moment, workers):
    """It reaches all processes of the terminal, while dask starts too."""
    file = run_dir.parent / "spec.json"
    file.write_text(run.spec(run_dir).model_dump_json())
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, file, str(workers)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith(moment):
            assert process.poll() is None
        if workers:
            time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_killed_at_random_again_and_again(run, run_dir, undisturbed, seed):
    rng = np.random.default_rng(seed)
    kills = 0
    for _ in range(4):
        workers = int(rng.integers(-1, 3))
        code = in_a_process(run.spec(run_dir), workers, "after", str(rng.uniform(0.05, 2.5)))
        kills += code != 0
    assert in_a_process(run.spec(run_dir), 2, "never") == 0
    assert kills > 0
    assert results(run_dir) == undisturbed


@pytest.fixture(scope="module")
def moments(run, tmp_path_factory) -> list[tuple[str, int]]:
    """Return every call of the progress of a stitch: a step, and how much of it is done."""
    folder, seen = tmp_path_factory.mktemp("moments"), []
    write_run(run, folder)
    with dask_client(DaskSettings(workers=2), processes=False) as client:
        run_stitch(
            run.spec(folder, superblock=(1, 1, 1), batch_blocks=2),
            client,
            lambda step, done, total: seen.append((step, done)) if done < total else None,
        )
    return seen


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_killed_worker_changes_nothing(run, run_dir, undisturbed, seed, moments):
    step, done = moments[np.random.default_rng(seed).integers(len(moments))]
    with dask_client(DaskSettings(workers=2)) as cluster:
        pids = list(cluster.run(lambda: __import__("os").getpid()).values())
        killed = []

        def kill(name: str, count: int, total: int) -> None:
            if not killed and name == step and count >= done:
                killed.append(psutil.Process(pids[seed % 2]))
                killed[0].kill()

        run_stitch(run.spec(run_dir, superblock=(1, 1, 1), batch_blocks=2), cluster, kill)
        assert killed
        assert not killed[0].is_running() or killed[0].status() == psutil.STATUS_ZOMBIE
        time.sleep(0.1)
    assert results(run_dir) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_killed_scheduler_is_one_error_and_resumes(run, run_dir, undisturbed, seed, moments):
    step, done = moments[np.random.default_rng(100 + seed).integers(len(moments))]
    script = ROOT / "tests/helpers/dask_process.py"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    spec = run.spec(run_dir, superblock=(1, 1, 1), batch_blocks=2)
    with subprocess.Popen(
        [sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True
    ) as cluster:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()

        def kill(name: str, count: int, total: int) -> None:
            if name == step and count >= done:
                cluster.kill()

        with pytest.raises(StitchError, match="lost the dask scheduler"):  # noqa: SIM117
            with dask_client(DaskSettings(address=address)) as client:
                run_stitch(spec, client, kill)
        assert cluster.wait() == -signal.SIGKILL
    assert in_a_process(spec, 1, "never") == 0
    assert results(run_dir) == undisturbed


@pytest.fixture
def small_disk(tmp_path):
    """Yield a folder on a file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount the small file system that this test fills")
    yield folder
    # Lazily: threads of the cluster may still hold a mapped file.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize(
    ("step", "here"),
    [
        ("contacts", False),
        ("agglomerate 2/3", False),
        ("lut up 1/3", False),
        ("lut map", True),
        ("relabel", False),
        ("relabel", True),
        ("pyramid s1", False),
    ],
)
def test_full_disk_is_one_error_and_resumes(run, small_disk, client, undisturbed, step, here):
    run_dir, ballast = small_disk / "run", small_disk / "ballast"
    write_run(run, run_dir)

    def fill(name: str, done: int, total: int) -> None:
        if name == step and not ballast.exists():
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))

    if here:
        client = None
    with pytest.raises((OSError, StitchError)) as caught:
        run_stitch(run.spec(run_dir, batch_blocks=2), client, fill)
    assert ballast.exists()
    if isinstance(caught.value, OSError):
        assert caught.value.errno == errno.ENOSPC
    assert "No space left on device" in str(caught.value)
    assert "\n" not in str(caught.value)
    ballast.unlink()
    run_stitch(run.spec(run_dir, batch_blocks=2), client)
    assert results(run_dir) == undisturbed


@pytest.mark.parametrize("workers", [0, 1])
def test_full_disk_on_the_command_line(small_disk, tmp_path, workers):
    rng = np.random.default_rng(0)
    for name, data in (
        ("fragments", rng.integers(1, 90_000, (8, 256, 256)).astype(np.uint64)),
        ("affinities", rng.integers(0, 255, (3, 8, 256, 256)).astype(np.uint8)),
    ):
        create_array(
            tmp_path / "in.zarr", name, shape=data.shape, chunks=data.shape, dtype=data.dtype,
            voxel_size=(30, 6, 6),
        )[:] = data  # fmt: skip
    arguments = [
        "stitch", "--fragments", tmp_path / "in.zarr/fragments", "--affinities",
        tmp_path / "in.zarr/affinities", "--set", f"stitch.dask.workers={workers}", "--output",
    ]  # fmt: skip
    failed = agq(*arguments, small_disk / "out")
    assert failed.returncode != 0
    assert "Traceback" not in failed.stderr
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("agq: ")
    assert "No space left on device: " in last
    assert "run the command again, it goes on" in last


@pytest.mark.parametrize("step", ["contacts", "lut up 1/3", "relabel", "pyramid s1"])
def test_a_run_folder_that_goes_away_is_not_made_anew(run, run_dir, client, undisturbed, step):
    away = run_dir.with_name("away")

    def move(name: str, done: int, total: int) -> None:
        if name == step and run_dir.exists():
            run_dir.rename(away)

    with pytest.raises(RunGoneError, match="is gone"):
        run_stitch(run.spec(run_dir, batch_blocks=2), client, move)
    assert not run_dir.exists()
    run_stitch(run.spec(away, batch_blocks=2), client)
    assert results(away) == undisturbed
