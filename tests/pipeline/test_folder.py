"""The run folder: one coordinator at a time, one identity, nothing deleted that is no run."""

import json
import shutil
import subprocess
import sys

import pytest

from agq.errors import InputError
from agq.pipeline.cli.arguments import watched
from agq.pipeline.config.recorded import read_target
from agq.pipeline.config.schema import masked
from agq.pipeline.folder import RunFolder, identity_hash

IDENTITY = {"raw": {"shape": [4, 4, 4]}, "model": {"sha": "a"}}


def test_create_records_and_joins(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create({"run_dir": "x"}, IDENTITY)
    run.update_stage("predict", state="running", blocks_total=3)
    run.update_stage("predict", state="done")
    run.create({"run_dir": "y"}, IDENTITY)
    record = run.record()
    assert record["config"] == {"run_dir": "y"}
    assert record["stages"]["predict"] == {"state": "done", "blocks_total": 3}
    assert len(record["commands"]) == 2
    assert record["commands"][0]["versions"]["torch"]
    assert record["identity_hash"] == identity_hash(IDENTITY)


def test_another_identity_is_refused_with_every_difference(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create({}, IDENTITY)
    before = run.record_path.read_bytes()
    other = {"raw": {"shape": [4, 4, 8]}, "model": {"sha": "b"}}
    with pytest.raises(InputError) as error:
        run.create({}, other)
    message = str(error.value)
    assert 'model.sha: "a" -> "b"' in message
    assert "raw.shape: [4, 4, 4] -> [4, 4, 8]" in message
    assert "--overwrite" in message
    assert run.record_path.read_bytes() == before


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    run = RunFolder(tmp_path)
    with pytest.raises(InputError, match="not empty and holds no run"):
        run.create({}, IDENTITY)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}'])
def test_damaged_record_is_one_line(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json"):
        RunFolder(tmp_path).record()


def test_second_process_is_refused_while_the_first_lives(tmp_path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from agq.pipeline.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock():\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=f"another agq process.*pid {holder.pid}"),
            RunFolder(tmp_path).lock(),
        ):
            pass
        # The kernel drops the lock of a killed process: no stale lock to remove by hand.
        holder.kill()
    with RunFolder(tmp_path).lock():
        pass


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not writable"), RunFolder(tmp_path / "file" / "r").lock():
        pass


def test_record_is_valid_json_after_many_updates(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create({}, IDENTITY)
    for i in range(20):
        run.update_stage(f"stage{i}", state="done")
        json.loads(run.record_path.read_text())
    assert len(run.record()["stages"]) == 20


def test_settings_replace_values_of_a_recorded_run(tmp_path):
    """`agq stitch RUN --set ...` must not ignore the setting."""
    run = RunFolder(tmp_path / "run")
    config = {"run_dir": str(run.path), "input": {"raw": {"path": "raw.zarr"}}}
    run.create(config, {"grid": 1})
    assert read_target(run.path).stitch.across == 0.7
    found = read_target(run.path, ["stitch.across=0.6", "stitch.min_size=9"])
    assert (found.stitch.across, found.stitch.min_size) == (0.6, 9)
    with pytest.raises(InputError, match=r"unknown key 'stitch\.acros'"):
        read_target(run.path, ["stitch.acros=0.6"])
    # Sections that were not set are recorded as null.
    run.create(masked(read_target(run.path)), {"grid": 1})
    assert run.record()["config"]["evaluate"] is None
    found = read_target(run.path, ["evaluate.truth.path=t.zarr", "ledger.database=d"])
    assert found.evaluate.truth.path == "t.zarr"
    assert found.ledger.database == "d"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("ledger.uri=mongodb://me:s3cr@t@db:1/?tls=true", "ledger.uri=mongodb://me:***@db:1"),
        ("--set=ledger.uri=mongodb+srv://me:s3cr t@db", "--set=ledger.uri=mongodb+srv://me:***@db"),
        ("ledger={uri: 'mongodb://db/?tlsCertificateKeyFilePassword=s3cr'}",
         "ledger={uri: 'mongodb://db"),
        ("input.raw.path=https://me:s3cr@host/x.zarr", "input.raw.path=https://me:***@host/x.zarr"),
        ("stitch.across=0.6", "stitch.across=0.6"),
    ],
)  # fmt: skip
def test_passwords_of_the_command_line_are_not_recorded(tmp_path, monkeypatch, given, shown):
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["agq", "run", given])
    run.create({}, IDENTITY)
    assert run.record()["commands"][-1]["argv"] == ["agq", "run", shown]
    assert "s3cr" not in run.record_path.read_text()


def test_a_run_is_watched_without_its_whole_configuration(tmp_path, monkeypatch):
    monkeypatch.delenv("AGQ_MONGO_URI", raising=False)
    run = RunFolder(tmp_path / "run")
    config = {"run_dir": str(run.path), "input": {"raw": {"path": "raw.zarr"}}}
    # As another release wrote it: no reason not to say how far it is.
    run.create({**config, "later": 1}, {"grid": 1})
    assert watched(run.path) == (run.path, None)
    # Settings of the database that cannot be meant are named.
    run.create({**config, "ledger": {"databse": "x"}}, {"grid": 1})
    with pytest.raises(InputError, match=r"unknown key 'ledger\.databse'"):
        watched(run.path)


def test_the_database_of_a_recorded_run_is_found(tmp_path, monkeypatch):
    """A file that cannot be read (a colleague's, or of a folder that has moved) hides no other."""
    run = RunFolder(tmp_path / "run")
    gone = tmp_path / "before" / "slurm" / "ledger-uri"
    config = {"run_dir": str(run.path), "input": {"raw": {"path": "raw.zarr"}}}
    recorded = {"uri": None, "uri_file": str(gone), "database": "d"}
    run.create({**config, "ledger": recorded}, {"grid": 1})
    monkeypatch.delenv("AGQ_MONGO_URI", raising=False)
    # With nothing else, what is missing is named.
    with pytest.raises(InputError, match=r"before/slurm/ledger-uri: No such file"):
        read_target(run.path).ledger.resolve()
    monkeypatch.setenv("AGQ_MONGO_URI", "mongodb://environment/")
    found = read_target(run.path).ledger
    assert (found.resolve().get_secret_value(), found.database) == ("mongodb://environment/", "d")
    for file in (run.path / "slurm" / "ledger-uri", gone):
        file.parent.mkdir(parents=True)
        file.write_text(f"mongodb://{file.parent.parent.name}/")
        found = read_target(run.path).ledger.resolve().get_secret_value()
        assert found == f"mongodb://{file.parent.parent.name}/"


def started(path) -> RunFolder:
    """A run as a command begins it."""
    run = RunFolder(path)
    with run.lock():
        run.create({"run_dir": str(path)}, IDENTITY)
    return run


def test_a_copied_run_gets_an_id_of_its_own(tmp_path):
    first = started(tmp_path / "run").record()["id"]
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copy = RunFolder(tmp_path / "copy")
    assert not copy.has_own_id(copy.record())
    own = started(tmp_path / "copy").record()
    assert own["id"] != first
    assert own["copy_of"] == first
    # From now on each keeps its own, also after a move.
    assert started(tmp_path / "copy").record()["id"] == own["id"]
    assert started(tmp_path / "run").record()["id"] == first
    (tmp_path / "copy").rename(tmp_path / "moved")
    assert started(tmp_path / "moved").record()["id"] == own["id"]


def test_a_copy_of_a_run_of_an_earlier_release(tmp_path):
    run = started(tmp_path / "run")
    record = run.record()
    del record["place"]
    run.record_path.write_text(json.dumps(record))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert started(tmp_path / "run").record()["id"] == record["id"]
    assert started(tmp_path / "copy").record()["id"] != record["id"]
