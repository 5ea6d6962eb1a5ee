"""A real SLURM of four emulated nodes with two emulated GPUs each, for the tests of this folder.

Needs Debian or Ubuntu as root: `slurm-up.sh` installs what is missing. `AGQ_TEST_SLURM=1` makes its
absence an error instead of a skip (CI).
"""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FAULTS = HERE.parents[1] / "build" / "cluster-faults.tsv"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(900))


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter) -> None:
    if FAULTS.exists():
        terminalreporter.write_line("\n| case | what happened | seconds to recover |")
        terminalreporter.write_line("| --- | --- | --- |")
        for line in FAULTS.read_text(encoding="utf-8").splitlines():
            terminalreporter.write_line(f"| {' | '.join(line.split(chr(9)))} |")


class Slurm:
    """The emulated cluster."""

    def __init__(self, lab: Path) -> None:
        self.lab = lab
        # Nine ports from here on; another cluster on this machine keeps its own.
        self.port = 20000 + os.getpid() % 20000

    def script(self, name: str, *arguments: str) -> str:
        environment = {
            **os.environ,
            "SLURM_LAB": str(self.lab),
            "SLURM_PORT": str(self.port),
            "SLURM_NODES": "4",
            "SLURM_GPUS": "2",
        }
        done = subprocess.run(
            ["bash", str(HERE / name), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        return done.stdout

    def up(self) -> None:
        found = re.search(r"SLURM_CONF=(\S+)", self.script("slurm-up.sh"))
        os.environ["SLURM_CONF"] = found[1]

    def down(self) -> None:
        self.script("slurm-down.sh")

    def kill_node(self, name: str, mode: str = "dead") -> None:
        self.script("slurm-nodefail.sh", name, mode)

    def command(self, *words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if os.geteuid() != 0:
        reason = "a SLURM for tests is brought up by root only (make test-cluster as root)"
        if os.environ.get("AGQ_TEST_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    FAULTS.unlink(missing_ok=True)
    lab = Path("/tmp") / f"agq-slurm-{os.getpid()}"  # munge wants a folder that others can enter
    cluster = Slurm(lab)
    before = os.environ.get("SLURM_CONF")
    try:
        cluster.up()
    except RuntimeError as error:
        if os.environ.get("AGQ_TEST_SLURM"):
            raise
        pytest.skip(f"SLURM cannot be had here: {error}")
    yield cluster
    cluster.down()
    if before is None:
        os.environ.pop("SLURM_CONF", None)
    else:
        os.environ["SLURM_CONF"] = before


@pytest.fixture
def quiet(slurm: Slurm) -> Iterator[Slurm]:
    """The cluster with all nodes up and no job, before and after."""
    _clean(slurm)
    yield slurm
    _clean(slurm)


def _clean(slurm: Slurm) -> None:
    subprocess.run(["scancel", "--user=root"], check=False, capture_output=True)
    slurm.up()
    deadline = time.monotonic() + 60
    while slurm.command("squeue", "--noheader", "--format=%i").strip():
        assert time.monotonic() < deadline, slurm.command("squeue")
        time.sleep(0.3)
