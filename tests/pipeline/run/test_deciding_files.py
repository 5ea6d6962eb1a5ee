"""What decides what a worker or a job runs is written by its owner alone, whatever the umask."""

import os
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.predict.paths import session_path, spec_path
from agq.blockwise.predict.spec import PredictSpec, Session
from agq.errors import InputError
from agq.pipeline.cli.slurm import _start_record, _write_scripts
from agq.pipeline.config.schema import load_config, masked
from agq.pipeline.folder import RunFolder
from agq.pipeline.slurm import jobs
from tests.helpers.runs import make_config

NOBODY = 65534
FILES = {
    "run.json",
    "run.secrets.json",
    "predict.json",
    "session.json",
    "slurm/config.json",
    "slurm/config.secrets.json",
    "slurm/coordinator.sh",
    "slurm/jobs.json",
    "slurm/ledger-uri",
    "slurm/stitch.sh",
    "slurm/workers.sh",
}
PRIVATE = {"run.secrets.json", "session.json", "slurm/config.secrets.json", "slurm/ledger-uri"}


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def spec_of(run_dir: Path) -> PredictSpec:
    grid = BlockGrid(
        volume_shape=(4, 8, 8), voxel_size=(1, 1, 1), write_shape=(4, 8, 8), after=(0, 0, 0)
    )
    return PredictSpec(run_dir=str(run_dir), raw={"path": "x"}, grid=grid.to_dict(), factory="a:b")


def submitted(folder: Path) -> Path:
    """Write what `agq submit` and a prediction leave in a run folder."""
    file = make_config(
        folder,
        run_dir=str(folder / "runs" / "run"),
        input={"mask": {"path": "https://user:RAWSECRET@host/m.zarr"}},
        ledger={"uri": "mongodb://user:s3cr3t@host/"},
        slurm={"partition": "gpu"},
    )
    config = load_config(file)
    run = RunFolder(Path(config.run_dir))
    with run.lock():
        run.create(config.model_dump(mode="json"), {"grid": 1})
        run.update(config=masked(config))
        _start_record(config, 30)
        jobs.save_config(config)
        _write_scripts(config, ["predict", "stitch"], folder)
    spec_of(run.path).save()
    Session(id="x", token="t").save(run.path)
    return run.path


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0, 0o002, 0o022, 0o077], indirect=True)
def test_only_the_owner_writes_what_decides(tmp_path, umask):
    run = submitted(tmp_path)
    found = {str(p.relative_to(run)): p for p in run.rglob("*") if p.is_file()}
    assert set(found) >= FILES
    for name in FILES:
        wanted = 0o600 if name in PRIVATE else 0o644 & ~umask
        assert rights(found[name]) == wanted, name
    for folder in (run, run / "slurm"):
        assert rights(folder) == 0o755 & ~umask
    if os.geteuid() == 0 and umask == 0:
        _let_a_stranger_try(run, found)
    assert PredictSpec.load(run) == spec_of(run)
    assert Session.load(run).token == "t"
    assert jobs.load_config(run).slurm.partition == "gpu"


def _let_a_stranger_try(run: Path, found: dict[str, Path]) -> None:
    """Another user can neither write, replace nor, where it is a secret, read them."""
    code = (
        "import os, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "def tried(what, *args):\n"
        "    try: what(*args)\n"
        "    except OSError: return\n"
        "    print(what.__name__, *args)\n"
        "for path in sys.argv[1:]:\n"
        "    tried(os.open, path, os.O_WRONLY | os.O_APPEND)\n"
        "    tried(os.rename, path, path + '.x')\n"
        "    tried(os.unlink, path)\n"
        "    tried(os.open, path, os.O_RDONLY)\n"
    )
    above = [p for p in run.parents if p != Path("/") and not rights(p) & 0o001]
    before = {p: rights(p) for p in above}
    try:
        for path in above:
            path.chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-c", code, *(str(found[name]) for name in FILES)],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for path, mode in before.items():
            path.chmod(mode)
    read = {f"open {found[name]} {os.O_RDONLY}" for name in FILES - PRIVATE}
    assert set(done.stdout.splitlines()) == read


@pytest.mark.parametrize("umask", [0o002], indirect=True)
def test_a_folder_that_is_shared_on_purpose_stays_shared(tmp_path, umask):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o2775)
    run = submitted(tmp_path)
    assert rights(run) == rights(run / "slurm") == 0o2775
    # The group replaces these files by whole ones of its own; nobody writes into another's.
    assert rights(run / "predict.json") == 0o644


@pytest.mark.parametrize(
    ("path", "load"),
    [
        (spec_path, partial(PredictSpec.load, to_run=True)),
        (session_path, Session.load),
        (jobs.config_path, jobs.load_config),
    ],
)
@pytest.mark.parametrize("mode", [0o664, 0o646, 0o602])
def test_workers_take_nothing_that_others_can_write(tmp_path, path, load, mode):
    run = submitted(tmp_path)
    file = path(run)
    file.chmod(mode)
    with pytest.raises(InputError, match=r"can be written by other users.*chmod go-w") as caught:
        load(run)
    assert str(file) in str(caught.value)
    # What an earlier release left is closed by the next command that works on the run.
    with RunFolder(run).lock():
        load(run)
    assert not rights(file) & 0o022


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
@pytest.mark.parametrize(
    ("path", "load"),
    [
        (spec_path, partial(PredictSpec.load, to_run=True)),
        (session_path, Session.load),
        (jobs.config_path, jobs.load_config),
    ],
)
def test_workers_take_nothing_of_strangers(tmp_path, monkeypatch, path, load):
    run = submitted(tmp_path)
    os.chown(path(run), NOBODY, NOBODY)
    with pytest.raises(InputError, match=r"belongs to nobody \(uid 65534\), and decides"):
        load(run)
    monkeypatch.setenv("AGQ_TRUSTED_USERS", str(NOBODY))
    load(run)
