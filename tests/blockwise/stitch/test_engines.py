"""Where a stitch runs: worker counts, TLS schedulers, and what it asks of a scheduler."""

import gc
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import dask
import pytest
from distributed.security import Security

from agq.blockwise.stitch import workers
from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.stitch.settings import DaskSettings
from agq.blockwise.stitch.workers import StitchError, Task, workers_of
from agq.errors import InputError
from tests.helpers.fragments import GRID, make_run, write_run
from tests.helpers.stitch_runs import open_cluster, results


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> tuple[Security, dict[str, Path]]:
    """Return certificates made for the test, as a scheduler takes them and as files."""
    folder, security = tmp_path_factory.mktemp("tls"), Security.temporary()
    files = {}
    for name, pem in (
        ("ca_file", security.tls_ca_file),
        ("cert_file", security.tls_client_cert),
        ("key_file", security.tls_client_key),
    ):
        files[name] = folder / f"{name}.pem"
        files[name].write_text(pem)
    return security, files


def test_scheduler_behind_tls(run, run_dir, undisturbed, tmp_path, certificates):
    security, files = certificates
    with open_cluster(1, security=security, protocol="tls://") as cluster:
        address = cluster.scheduler_address
        assert address.startswith("tls://")
        section = DaskSettings(address=address, **files)
        with dask_client(section) as client:
            run_stitch(run.spec(run_dir), client)
        with (
            pytest.raises(InputError, match=r"cannot connect.*stitch\.dask\.ca_file"),
            dask_client(DaskSettings(address=address), timeout=0.5),
        ):
            pass
        other = Security.temporary()
        strangers = {}
        for name, pem in (("cert_file", other.tls_client_cert), ("key_file", other.tls_client_key)):
            strangers[name] = tmp_path / name
            strangers[name].write_text(pem)
        wrong = DaskSettings(address=address, **files | strangers)
        with (
            pytest.raises(InputError, match="cannot connect"),
            dask_client(wrong, timeout=0.5),
        ):
            pass
    assert results(run_dir) == undisturbed


LEAVES_A_TASK = """
import sys, time
from pathlib import Path
from distributed import Client
from agq.blockwise.stitch.workers import Task, workers_of

class Slow(Task):
    def run(self):
        Path(folder, "begun").touch()
        time.sleep(4)
        Path(folder, "late").touch()

address, folder = sys.argv[1:]
workers_of(Client(address), Path(folder)).run("slow", [Slow([1])])
"""


def test_tasks_of_a_killed_client_are_waited_for(tmp_path):
    """A scheduler lets what runs go on; its files must not appear among those of the next."""
    with (
        open_cluster(1) as cluster,
        dask_client(DaskSettings(address=cluster.scheduler_address)) as client,
    ):
        address = cluster.scheduler_address
        with subprocess.Popen([sys.executable, "-c", LEAVES_A_TASK, address, tmp_path]) as first:
            while not (tmp_path / "begun").exists():
                assert first.poll() is None
                time.sleep(0.05)
            first.kill()
        notes: list[str] = []
        workers_of(client, tmp_path / "other", on_note=notes.append).wait_for_stragglers()
        assert not notes
        workers_of(client, tmp_path, on_note=notes.append).wait_for_stragglers()
        assert (tmp_path / "late").exists()
    assert notes == [f"waiting for 1 tasks that an earlier command left running in {tmp_path}"]


@dataclass(frozen=True)
class Square(Task):
    """Some work."""

    def run(self) -> int:
        """Return the square of a number."""
        return int(self.items[0]) ** 2


def test_the_scheduler_has_a_bounded_number_of_tasks(tmp_path, client, monkeypatch):
    monkeypatch.setattr(workers, "_MOST_SUBMITTED", 3)
    submitted, told = [], []

    def tell(step: str, done: int, total: int) -> None:
        submitted.append(sum(step in str(key) for key in client.futures))
        told.append((done, total))

    some = [Square([n]) for n in range(20)]
    found = workers_of(client, tmp_path, tell).run("squares", some)
    assert sorted(found) == [n**2 for n in range(20)]
    assert told == [(n, 20) for n in range(21)]
    assert 1 < max(submitted) <= 3


def test_a_scheduler_without_workers_is_given_up(tmp_path):
    write_run(make_run(GRID, seed=5), tmp_path)
    notes: list[str] = []
    spec = make_run(GRID, seed=5).spec(tmp_path)
    with (
        open_cluster(0) as cluster,
        dask_client(DaskSettings(address=cluster.scheduler_address)) as client,
    ):
        with pytest.raises(StitchError, match=r"contacts: .*no worker is connected for 1 s"):
            run_stitch(spec, client, on_note=notes.append, wait_s=1)
        assert len(notes) == 1
        assert notes[0].endswith(f"dask worker {cluster.scheduler_address}")
        # One that comes in time is enough.
        threading.Timer(1, cluster.scale, [1]).start()
        assert run_stitch(spec, client, wait_s=30).segments > 0


def test_a_client_that_cannot_connect_leaves_nothing(tmp_path):
    """dask leaves its event loop behind, on which the next client then could not start."""
    threads, scheduler = set(threading.enumerate()), dask.config.get("scheduler", None)
    for address in ("tls://127.0.0.1:1", "tls://127.0.0.1:1", "tcp://127.0.0.1:1"):
        with (
            pytest.raises(InputError, match="cannot connect"),
            dask_client(DaskSettings(address=address), timeout=0.2),
        ):
            pass
        gc.collect()
        assert set(threading.enumerate()) == threads
        # Else arrays could not be read in this process any more.
        assert dask.config.get("scheduler", None) == scheduler
    with dask_client(processes=False) as client:
        assert client.submit(int, 3).result() == 3


def test_certificates_are_checked_first(tmp_path, certificates):
    _, files = certificates
    with pytest.raises(ValueError, match="go together"):
        DaskSettings(address="tls://host:8786", ca_file=files["ca_file"])
    with pytest.raises(ValueError, match="starts with tls://"):
        DaskSettings(address="tcp://host:8786", **files)
    absent = files | {"key_file": tmp_path / "none.pem"}
    with (
        pytest.raises(InputError, match=r"stitch\.dask\.key_file: .*none\.pem: No such file"),
        dask_client(DaskSettings(address="tls://127.0.0.1:1", **absent)),
    ):
        pass
