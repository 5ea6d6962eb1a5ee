"""A real SLURM of four emulated nodes with two emulated GPUs each, for the tests of this folder.

Needs Debian or Ubuntu as root: `slurm-up.sh` installs what is missing. `AGQ_TEST_SLURM=1` makes its
absence an error instead of a skip (CI). `AGQ_SLURM_LAB` names the folder of the cluster's files:
who sets it (`make test-cluster`) takes the cluster down even if the tests are killed.
"""

import contextlib
import os
import random
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.runs import FAULTS, RATE, chunks
from tests.helpers.runs import agq, make_config, results

HERE = Path(__file__).parent
NODES = 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(900))


_begun = []


@pytest.fixture(scope="session", autouse=True)
def tables() -> None:
    """Start the tables that are printed at the end anew."""
    for earlier in (FAULTS, RATE):
        earlier.unlink(missing_ok=True)
    _begun.append(True)


def pytest_terminal_summary(terminalreporter) -> None:
    if _begun and FAULTS.exists():
        terminalreporter.write_line("\n| case | what happened | seconds to recover |")
        terminalreporter.write_line("| --- | --- | --- |")
        for line in FAULTS.read_text(encoding="utf-8").splitlines():
            terminalreporter.write_line(f"| {' | '.join(line.split(chr(9)))} |")
    if _begun and RATE.exists():
        terminalreporter.write_line("\n" + RATE.read_text(encoding="utf-8"))


class Slurm:
    """The emulated cluster."""

    def __init__(self, lab: Path) -> None:
        self.lab = lab
        self.port = free_ports(1 + NODES)

    def script(self, name: str, *arguments: str) -> str:
        environment = {
            **os.environ,
            "SLURM_LAB": str(self.lab),
            "SLURM_PORT": str(self.port),
            "SLURM_NODES": str(NODES),
            "SLURM_GPUS": "2",
        }
        done = subprocess.run(
            ["bash", str(HERE / name), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
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


def free_ports(count: int) -> int:
    """First of some ports in a row that are free, below those that the system gives out."""
    while True:
        first = random.randrange(20000, 32000 - count)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    sock = stack.enter_context(socket.socket())
                    sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return first


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    wanted = bool(os.environ.get("AGQ_TEST_SLURM"))
    if os.geteuid() != 0:
        reason = "a SLURM for tests is brought up by root only (make test-cluster as root)"
        if wanted:
            pytest.fail(reason)
        pytest.skip(reason)
    given = os.environ.get("AGQ_SLURM_LAB")
    lab = Path(given or tempfile.mkdtemp(prefix="agq-slurm-", dir="/tmp"))
    lab.chmod(0o755)  # munge wants a folder that others can enter
    cluster = Slurm(lab)
    before = os.environ.get("SLURM_CONF")
    try:
        try:
            cluster.up()
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            if wanted:
                raise
            pytest.skip(f"SLURM cannot be had here: {error}")
        yield cluster
    finally:
        cluster.down()
        if before is None:
            os.environ.pop("SLURM_CONF", None)
        else:
            os.environ["SLURM_CONF"] = before
        if not given:
            shutil.rmtree(lab, ignore_errors=True)


@pytest.fixture
def quiet(slurm: Slurm) -> Slurm:
    """The cluster with all nodes up and no job, whatever the last test has left."""
    slurm.up()
    subprocess.run(["scancel", "--user=root"], check=False, capture_output=True)
    deadline = time.monotonic() + 180
    while slurm.command("squeue", "--noheader", "--format=%i").strip():
        assert time.monotonic() < deadline, slurm.command("squeue")
        time.sleep(0.3)
    return slurm


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of an undisturbed run on this machine, without a cluster."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = agq("run", make_config(folder))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="session")
def undisturbed(calm: Path) -> dict[str, bytes]:
    """Bytes of the fragments and sidecars of an undisturbed run."""
    return chunks(calm)


@pytest.fixture(scope="session")
def segmented(calm: Path) -> dict[str, bytes]:
    """Bytes of everything that an undisturbed run computes."""
    return results(calm)
