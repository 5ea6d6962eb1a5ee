"""A local dask cluster is nobody else's: not its ports, not the folders that it imports from."""

import os
import stat
import sys
import tempfile
from pathlib import Path

from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.stitch.settings import DaskSettings
from tests.helpers.stitch_runs import open_cluster, results
from tests.helpers.strangers import NOBODY, attack, listening


def test_no_port_of_a_stitch_answers_a_stranger(run, run_dir, undisturbed):
    """dask runs whatever a client sends: whoever is answered may do what the user may."""
    answers: list[str] = []
    with open_cluster(0) as control:
        before, unsafe = listening(), control.scheduler_address.removeprefix("tcp://")

        def strike(step: str, done: int, _total: int) -> None:
            if step == "relabel" and done and not answers:
                ports = listening() - before
                assert len(ports) == 3  # the scheduler, and a worker with its nanny
                answers.extend(attack(ports | {unsafe}))

        with dask_client(DaskSettings(workers=1)) as client:
            run_stitch(run.spec(run_dir), client, strike)
    # Against a scheduler without certificates it works, for everybody.
    for user in {os.getuid(), NOBODY} if os.getuid() == 0 else {os.getuid()}:
        assert any(line.startswith(f"{user} {unsafe} client ") for line in answers)
    assert [line for line in answers if line.split()[1] != unsafe] == []
    assert results(run_dir) == undisturbed


def test_threads_of_a_stitch_need_no_port():
    before = listening()
    with dask_client(processes=False) as client:
        assert client.submit(int, 3).result() == 3
        assert listening() == before


def test_dask_imports_from_no_folder_that_others_have_made(tmp_path, monkeypatch):
    """dask puts its temporary folder first on the path of every process, whoever owns it."""
    hostile = tmp_path / "dask-scratch-space"
    hostile.mkdir()
    (hostile / "agq_test_hostile.py").write_text("")
    hostile.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = list(sys.path)
    with dask_client(DaskSettings(workers=1)) as client:
        paths = [[p for p in sys.path if p not in before], *client.run(_import_path).values()]
    for path in paths:
        added = {Path(p) for p in path if Path(p).is_relative_to(tmp_path)}
        assert added
        assert hostile not in added
        for folder in {parent for p in added for parent in p.parents} | added:
            if folder != tmp_path and folder.is_relative_to(tmp_path) and folder.exists():
                found = folder.stat()
                assert found.st_uid == os.getuid()
                assert not stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    assert sys.path == before


def _import_path() -> list[str]:
    return sys.path
