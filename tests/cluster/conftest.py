"""A real SLURM of four emulated nodes with two emulated GPUs each, for the tests of this folder.

Needs Debian or Ubuntu as root: `slurm-up.sh` installs what is missing. `AGQ_TEST_SLURM=1` makes its
absence an error instead of a skip (CI). Each process of pytest-xdist brings up a cluster of its
own, so that a node killed by one test is none of another's. `AGQ_SLURM_LAB` names the folder of the
clusters' files, one folder a cluster: `make test-cluster` sets it and takes the clusters down even
if the tests are killed.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.runs import chunks
from tests.helpers.runs import agq, make_config, results

HERE = Path(__file__).parent
NODES = 4
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            if "quiet" in item.fixturenames:  # these submit jobs
                item.add_marker(pytest.mark.timeout(900))


FAULT, RATE = "fault", "rate"


@pytest.fixture
def note(record_property) -> Callable[[str, str, float], None]:
    """Return a function that adds a line to the table that is printed at the end."""

    def add(case: str, what: str, since: float) -> None:
        record_property(FAULT, f"| {case} | {what} | {time.monotonic() - since:.0f} |")

    return add


@pytest.fixture
def note_rate(record_property) -> Callable[[str], None]:
    """Return a function that keeps what is printed about rates at the end."""
    return lambda text: record_property(RATE, text)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [
        report for group in ("passed", "failed") for report in terminalreporter.getreports(group)
    ]
    properties = [pair for r in reports if r.when == "call" for pair in r.user_properties]
    faults = [text for name, text in properties if name == FAULT]
    if faults:
        terminalreporter.write_line("\n| case | what happened | seconds to recover |")
        terminalreporter.write_line("| --- | --- | --- |")
    for line in [*faults, *(f"\n{text}" for name, text in properties if name == RATE)]:
        terminalreporter.write_line(line)


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
    """First of some ports in a row that are free, below those that the system gives out.

    Processes of pytest-xdist look in ranges of their own.
    """
    process = int(WORKER.removeprefix("gw") or 0) % 6
    while True:
        first = random.randrange(20000 + 2000 * process, 22000 + 2000 * process - count)
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
    lab = Path(given or tempfile.mkdtemp(prefix="agq-slurm-", dir="/tmp")) / (WORKER or "gw0")
    lab.mkdir()
    for place in (lab.parent, lab):
        place.chmod(0o755)  # munge wants a folder that others can enter
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
            shutil.rmtree(lab.parent, ignore_errors=True)


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
