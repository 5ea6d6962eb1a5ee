"""Volumes behind passwords and signed addresses: a run reads them, and nobody else sees them."""

import contextlib
import json
import subprocess
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from agq.pipeline.config.recorded import read_target
from tests.helpers import ROOT
from tests.helpers.runs import agq, blobs, command, environment, make_config, results, write_volume
from tests.helpers.signed import forms, signed_server

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("signed")]

OLD, NEW = "X-Amz-Signature=QUERYSECRET1", "X-Amz-Signature=FRESHSECRET2"
SHAPE = (10, 32, 32)


def secrets_in(texts: dict[str, str], *queries: str) -> list[str]:
    return [
        f"{part} in {name}"
        for name, text in texts.items()
        for query in queries
        for part in forms(query)
        if part in text
    ]


def files_of(folder: Path) -> dict[str, str]:
    """Text of all files of a folder but those that are for its owner only."""
    found = {}
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_mode & 0o077:
            found[str(file)] = file.read_bytes().decode("latin-1")
    return found


class CommandLines:
    """What a user of the machine sees of all processes while a command runs."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    self.seen.add(" ".join(process.cmdline()))

    def __enter__(self) -> "CommandLines":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of which all volumes are signed, and the same run of plain files."""
    folder = tmp_path_factory.mktemp("signed")
    raw = blobs(SHAPE)
    plain = make_config(folder, raw, workers={"count": 1}, stitch={"dask": {"workers": 1}})
    write_volume(folder / "in.zarr", "mask", np.ones(SHAPE, np.uint8))
    write_volume(folder / "in.zarr", "truth", (raw > 128).astype(np.uint64))
    write_volume(folder / "in.zarr", "classes", np.ones(SHAPE, np.uint8))
    values = yaml.safe_load(plain.read_text())
    with signed_server(folder, OLD) as server:
        url = server.url("in.zarr", OLD)
        values["run_dir"] = str(folder / "signed")
        values["input"] = {
            name: {"path": url, "dataset": name} for name in ("raw", "mask", "classes")
        }
        values["evaluate"] = {"truth": {"path": url, "dataset": "truth"}}
        values["model"] = {**values["model"], "options": {"state": None}}
        config = folder / "signed.yaml"
        config.write_text(yaml.safe_dump(values))
        with CommandLines() as lines:
            done = agq("run", config)
        assert done.returncode == 0, done.stderr
        yield folder, config, server, done, lines


def test_a_signed_volume_is_read_by_all_stages(run):
    folder, _, _, _, _ = run
    values = yaml.safe_load((folder / "config.yaml").read_text())
    for name in ("raw", "mask", "classes"):
        values["input"][name] = {"path": str(folder / "in.zarr"), "dataset": name}
    (folder / "plain.yaml").write_text(yaml.safe_dump(values))
    done = agq("run", folder / "plain.yaml")
    assert done.returncode == 0, done.stderr
    assert results(folder / "signed") == results(folder / "run")


def test_nothing_that_others_see_has_a_secret(run):
    folder, _, server, done, lines = run
    seen = files_of(folder / "signed") | {"stdout": done.stdout, "stderr": done.stderr}
    assert any("worker" in line for line in lines.seen)
    assert not secrets_in(seen | {"processes": "\n".join(lines.seen)}, OLD)
    record = json.loads((folder / "signed" / "run.json").read_text())
    assert record["config"]["input"]["raw"]["path"] == server.shown("in.zarr")
    private = {p.name for p in (folder / "signed").rglob("*.secrets.json")}
    assert private == {"run.secrets.json", "predict.secrets.json"}
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in (folder / "signed").rglob("*.secrets.*"))


def test_the_folder_alone_opens_them_again(run):
    folder, _, server, _, _ = run
    url = server.url("in.zarr", OLD)
    assert read_target(folder / "signed").input.raw.path == url
    for arguments in (
        ("report", folder / "signed"),
        ("snapshot", folder / "signed", "--out", folder / "signed" / "x.png"),
        ("evaluate", folder / "signed"),
        ("stitch", folder / "signed", "--set", "stitch.across=0.6"),
    ):
        done = agq(*arguments)
        assert done.returncode == 0, done.stderr
        assert not secrets_in(files_of(folder / "signed") | {"out": done.stdout + done.stderr}, OLD)


def test_a_fresh_signature_is_the_same_input(run):
    folder, config, server, _, _ = run
    server.queries = {NEW}
    try:
        # The former one has expired: said in one line, and it is in none.
        done = agq("predict", config, "--blocks", "0")
        assert done.returncode == 2
        assert "its signature may have expired" in done.stderr
        assert done.stderr.count("\n") == 1
        done = agq("--debug", "predict", config, "--blocks", "0")
        assert "Traceback" in done.stderr
        assert not secrets_in({"err": done.stderr}, OLD)
        values = yaml.safe_load(config.read_text())
        for section in (*values["input"].values(), values["evaluate"]["truth"]):
            section["path"] = "${SIGNED_URL}"
        config.write_text(yaml.safe_dump(values))
        done = subprocess.run(
            command("predict", config, "--blocks", "0"),
            env=environment() | {"SIGNED_URL": server.url("in.zarr", NEW)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not secrets_in(files_of(folder / "signed") | {"err": done.stderr}, OLD, NEW)
        known = (folder / "signed" / "run.secrets.json").read_text()
        assert NEW in known
        assert OLD not in known
    finally:
        server.queries = {OLD, NEW}
