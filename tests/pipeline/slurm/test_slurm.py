"""Batch scripts, checks and secrets of a submission, without a cluster (tests/cluster has one)."""

import asyncio
import contextlib
import errno
import itertools
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from distributed import Client
from distributed.security import Security
from pydantic import SecretStr

from agq import caches
from agq.blockwise.ledger.settings import LedgerSettings
from agq.blockwise.predict.spec import Session
from agq.errors import InputError, RunStoppedError
from agq.pipeline.cli import slurm as commands
from agq.pipeline.config.schema import Config, parse_config
from agq.pipeline.folder import RunFolder
from agq.pipeline.notify.notifier import Notifier
from agq.pipeline.slurm import check as check_module
from agq.pipeline.slurm import client, dask_jobs, jobs
from agq.pipeline.slurm import coordinator as slurm_coordinator
from agq.pipeline.slurm import stitch as slurm_stitch
from agq.pipeline.slurm.check import Association, Cluster, Node, Partition, check, grace_s
from agq.pipeline.slurm.client import QueueEntry
from agq.pipeline.slurm.scripts import coordinator_script, worker_script
from agq.pipeline.slurm.settings import SlurmSettings
from tests.helpers.runs import environment, make_config
from tests.helpers.stitch_runs import open_cluster
from tests.helpers.strangers import attack, listening

ODD = "a ü 'q\" $(touch pwned) `x`; #y & z"


def config(run_dir: Path, **sections) -> Config:
    return Config.model_validate(
        {"run_dir": str(run_dir), "input": {"raw": {"path": "x.zarr"}}, **sections}
    )


def run_script(folder: Path, text: str, **environment: str) -> subprocess.Popen:
    """Run a batch script with stand-ins for the program and for scontrol."""
    tools = folder / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {folder}/scontrol.txt\n')
    (tools / "scontrol").chmod(0o755)
    path = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", **environment}
    return subprocess.Popen(["bash", "-c", text], env={**os.environ, **path}, cwd=folder)


def program(folder: Path, text: str) -> str:
    file = folder / "program"
    file.write_text("#!/bin/bash\n" + text)
    file.chmod(0o755)
    return str(file)


def test_odd_names_reach_the_program_as_they_are(tmp_path):
    run_dir = tmp_path / ODD
    (tmp_path / ODD).mkdir()
    section = SlurmSettings(
        python=program(tmp_path, f'printf "%s\\n" "$PWD" "$@" > {tmp_path}/said')
    )
    script = worker_script(section, run_dir, run_dir)
    assert run_script(tmp_path, script.text).wait(20) == 0
    said = (tmp_path / "said").read_text().splitlines()
    assert said == [str(run_dir), "-P", "-m", "agq.pipeline.slurm.worker", str(run_dir)]
    assert not list(tmp_path.rglob("pwned"))
    directives = [line for line in script.text.splitlines() if line.startswith("#SBATCH")]
    assert all(line.isascii() and ODD not in line for line in directives)


def test_a_container_gets_gpus_and_options(tmp_path):
    section = SlurmSettings(
        container="apptainer:///my images/agq.sif", container_options=("--bind=/scratch",)
    )
    text = worker_script(section, tmp_path, tmp_path).text
    expected = "apptainer exec --nv --bind=/scratch '/my images/agq.sif' python -P -m"
    assert expected in text
    assert "--nv" not in coordinator_script(section, tmp_path, tmp_path).text


@pytest.mark.parametrize(
    ("ends", "deaths", "requeued"),
    [("exit 75", 0, True), ("exit 75", 6, True), ("exit 1", 0, False), ("kill -9 $$", 0, True),
     ("kill -9 $$", 4, True), ("kill -9 $$", 5, False)],
)  # fmt: skip
def test_a_job_is_requeued_when_its_program_asks_or_was_killed(tmp_path, ends, deaths, requeued):
    """Requeues of other kinds (pre-emption, nodes, by hand) do not use up the restarts."""
    run_dir = tmp_path / ODD
    (run_dir / "slurm").mkdir(parents=True)
    if deaths:
        (run_dir / "slurm" / "killed").mkdir()
        (run_dir / "slurm" / "killed" / "17").write_text("Monday gpu1\n" * deaths)
    section = SlurmSettings(python=program(tmp_path, ends))
    text = coordinator_script(section, run_dir, tmp_path).text
    code = run_script(tmp_path, text, SLURM_RESTART_COUNT="9").wait(20)
    assert (tmp_path / "scontrol.txt").exists() == requeued
    assert code == (75 if requeued else 137 if "kill" in ends else 1)
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text().split() == ["requeue", "17"]
    killed = run_dir / "slurm" / "killed" / "17"
    now = len(killed.read_text().splitlines()) if killed.exists() else 0
    assert now == deaths + ("kill" in ends)


@pytest.mark.parametrize(("restarts", "requeued"), [("4", True), ("5", False)])
def test_deaths_that_cannot_be_written_down_are_bounded(tmp_path, restarts, requeued):
    """As on a full disk, or where the run folder has gone, which is not made anew."""
    section = SlurmSettings(python=program(tmp_path, "kill -9 $$"))
    text = coordinator_script(section, tmp_path / "gone", tmp_path).text
    assert run_script(tmp_path, text, SLURM_RESTART_COUNT=restarts).wait(20) != 0
    assert (tmp_path / "scontrol.txt").exists() == requeued
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_reach_the_program_and_its_end_is_waited_for(tmp_path, number):
    body = f"""
trap 'sleep 0.3; echo got > {tmp_path}/got; exit 7' {number.name[3:]}
echo ready > {tmp_path}/ready
while :; do sleep 0.05; done
"""
    text = coordinator_script(
        SlurmSettings(python=program(tmp_path, body)), tmp_path, tmp_path
    ).text
    job = run_script(tmp_path, text)
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(number)
    assert job.wait(20) == 7
    assert (tmp_path / "got").exists()


def test_the_password_is_in_one_file_for_its_owner_only(tmp_path, monkeypatch):
    uri = "mongodb://me:s3cr3t@db/"
    run_dir = tmp_path / "run"
    for given in ({"ledger": {"uri": uri, "database": "d"}}, {}):
        if not given:
            monkeypatch.setenv("AGQ_MONGO_URI", uri)
        made = config(run_dir, **given)
        jobs.save_config(made)
        for script in jobs.scripts(made, ["predict", "stitch"], tmp_path):
            assert "s3cr3t" not in script.text
        holders = [f for f in run_dir.rglob("*") if f.is_file() and "s3cr3t" in f.read_text()]
        assert holders == [run_dir / "slurm" / "ledger-uri"]
        assert stat.S_IMODE(holders[0].stat().st_mode) == 0o600
        ledger = jobs.load_config(run_dir).ledger
        assert ledger.resolve() == SecretStr(uri)
        assert ledger.database == ("d" if given else LedgerSettings().database)


def test_a_job_whose_coordinator_never_comes_waits_and_ends_with_0(tmp_path):
    made = config(tmp_path / "run", slurm={"wait_s": 2, "gpus": 2})
    jobs.save_config(made)
    record = jobs.Jobs(here=str(tmp_path), grace_s=2, workers=1)
    jobs.record_path(tmp_path / "run").write_text(record.model_dump_json())
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "agq.pipeline.slurm.worker", str(tmp_path / "run")],
        env={**environment(), "SLURM_JOB_ID": "17", "CUDA_VISIBLE_DEVICES": "2,3"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began >= 2
    assert "no coordinator came for 2 s: leaving" in done.stderr
    assert not (tmp_path / "run" / "logs" / "predict").exists(), "no worker was started"


@pytest.fixture
def queue(monkeypatch):
    """A stand-in for SLURM's queue: the ids of the jobs in it."""
    waiting: list[int] = []
    monkeypatch.setattr(check_module, "read_cluster", lambda: CLUSTER)
    monkeypatch.setattr(check_module, "check", lambda *_: [])
    monkeypatch.setattr(
        client,
        "queue",
        lambda ids, _users=(): [QueueEntry(n, (), "RUNNING", "") for n in ids if n in waiting],
    )

    def submit(_arguments):
        waiting.append(next(numbers))
        return waiting[-1]

    numbers = itertools.count(1)
    monkeypatch.setattr(client, "submit", submit)
    return waiting


def test_a_stitch_behind_a_prediction_leaves_its_settings_alone(tmp_path, queue, monkeypatch):
    uri = "mongodb://me:s3cr3t@127.0.0.1:9/"
    monkeypatch.setenv("AGQ_MONGO_URI", uri)
    file = make_config(tmp_path, slurm={"gpus": 0, "lead_s": 77})
    commands.submit(file, stage="predict")
    run_dir = tmp_path / "run"
    before = jobs.load_config(run_dir)
    scripts = {
        name: (run_dir / "slurm" / f"{name}.sh").read_bytes() for name in ("coordinator", "workers")
    }
    # Later, from another shell, while the coordinator waits or runs.
    monkeypatch.delenv("AGQ_MONGO_URI")
    changes = ["slurm.gpus=1", "slurm.lead_s=50", "slurm.stitch.cpus=3", "stitch.across=0.6",
               "workers.timeout_s=5"]  # fmt: skip
    for held in (False, True):
        with RunFolder(run_dir).lock() if held else contextlib.nullcontext():
            commands.submit(file, stage="stitch", after="predict", settings=changes)
        now = jobs.load_config(run_dir)
        assert now.ledger == before.ledger
        assert now.ledger.resolve() == SecretStr(uri)
        assert now.workers == before.workers
        assert now.slurm.model_copy(update={"stitch": before.slurm.stitch}) == before.slurm
        assert (now.slurm.stitch.cpus, now.stitch.across) == (3, 0.6)
        assert "--cpus-per-task=3" in (run_dir / "slurm" / "stitch.sh").read_text()
        for name, text in scripts.items():
            assert (run_dir / "slurm" / f"{name}.sh").read_bytes() == text
        queue.pop()  # the stitch has left the queue
    roi = "input.roi={offset: [0, 0, 0], shape: [9, 9, 9]}"
    with pytest.raises(InputError, match=r"input\.roi"):
        commands.submit(file, stage="stitch", after="predict", settings=[roi])
    with pytest.raises(InputError, match="--overwrite would delete"):
        commands.submit(file, stage="stitch", after="predict", overwrite=True)


@pytest.mark.parametrize("submitted", [False, True])
def test_a_stitch_behind_a_prediction_that_is_not_in_the_queue(tmp_path, queue, submitted):
    """As while `agq predict` works on the run: refused before anything is written."""
    file = make_config(tmp_path, slurm={"gpus": 0})
    if submitted:
        commands.submit(file, stage="predict")
        queue.clear()
    folder = tmp_path / "run" / "slurm"
    before = {path: path.read_bytes() for path in folder.glob("*")}
    with RunFolder(tmp_path / "run").lock(), pytest.raises(InputError, match="no prediction of"):
        commands.submit(file, stage="stitch", after="predict", settings=["stitch.across=0.6"])
    assert {path: path.read_bytes() for path in folder.glob("*")} == before


CLUSTER = Cluster(
    {
        "gpu": Partition(
            "gpu", True, True, 60.0, 5, (Node(8, 4000, {"a100": 2}, frozenset({"ib"})),)
        ),
        "cpu": Partition("cpu", False, True, None, 0, (Node(64, 256000, {}, frozenset()),)),
        "old": Partition("old", False, False, None, 0, ()),
    },
    max_array=100,
    kill_wait_s=30,
)
SMALL = {"mem": "2G", "coordinator": {"mem": "1G"}, "stitch": {"partition": "cpu"}}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"partition": "gup"}, ["slurm.partition", "'gup'", "cpu, gpu, old"]),
        ({"partition": "old"}, ["old takes no jobs"]),
        ({"workers": 101}, ["slurm.workers", "MaxArraySize", "100"]),
        ({"gpus": 3}, ["slurm.gpus", "gpu:a100:2"]),
        ({"gres": "gpu:v100"}, ["gpu:v100", "gpu:a100:2"]),
        ({"cpus": 9}, ["slurm.cpus", "8"]),
        ({"mem": "5G"}, ["slurm.mem", "4000M"]),
        ({"time": "2:00:00"}, ["slurm.time", "60 minutes"]),
        ({"time": "2", "lead_s": 120}, ["slurm.lead_s", "120", "2 minutes", "slurm.time"]),
        ({"lead_s": 3600}, ["slurm.lead_s", "60 minutes", "slurm.time"]),
        ({"coordinator": {"time": "1"}}, ["slurm.lead_s", "slurm.coordinator.time"]),
        ({"constraint": "v100"}, ["slurm.constraint", "'v100'", "ib"]),
        ({"coordinator": {"partition": "x"}}, ["slurm.coordinator.partition"]),
        ({"stitch": {"mem": "32G"}}, ["slurm.stitch.mem"]),
    ],
)
def test_what_the_cluster_lacks_is_named_with_what_it_has(wrong, words):
    section = SlurmSettings.model_validate(SMALL | wrong)
    with pytest.raises(InputError) as raised:
        check(section, CLUSTER)
    for word in words:
        assert word in str(raised.value)


def test_jobs_without_a_time_get_the_partition_default(monkeypatch):
    shown = (
        "PartitionName=gpu Default=YES State=UP MaxTime=7-0:0:0 DefaultTime=00:30:00 GraceTime=0",
        "PartitionName=cpu Default=NO State=UP MaxTime=UNLIMITED DefaultTime=NONE GraceTime=0",
    )
    said = {"sinfo": "gpu|8|4000|gpu:a100:2|\ncpu|64|256000|(null)|\n", "config": ""}
    monkeypatch.setattr(
        check_module,
        "call",
        lambda words: said.get(words[0]) or ("\n".join(shown) if "partition" in words else "x"),
    )
    cluster = check_module.read_cluster()
    assert [p.default_minutes for p in cluster.partitions.values()] == [30, None]
    section = SlurmSettings(**SMALL)
    expected = {"predict": 7000.0, "stitch": 9e5}
    notes = check_module.short_limits(section, cluster, expected)
    # The stitch has a partition without any limit.
    assert [note.partition(" ")[0] for note in notes] == ["slurm.time", "slurm.coordinator.time"]
    assert "the job gets 30 minutes (DefaultTime of partition gpu)" in notes[0]
    assert "the forecast is 1h 56m; it goes on after a requeue" in notes[0]
    assert not check_module.short_limits(section, cluster, {"predict": 1700.0})
    asked = section.model_copy(update={"time": "20"})
    assert len(check_module.short_limits(asked, cluster, expected)) == 1
    with pytest.raises(InputError, match=r"30 minutes \(DefaultTime of partition gpu\)"):
        check(section.model_copy(update={"lead_s": 1800}), cluster)
    warned = check(section.model_copy(update={"lead_s": 1000}), cluster)
    assert any("DefaultTime" in warning for warning in warned)


MIXED = Cluster(
    {
        "mixed": Partition(
            "mixed",
            True,
            True,
            None,
            0,
            (Node(64, 256000, {}, frozenset({"big"})), Node(8, 32000, {"a100": 4}, frozenset())),
            accounts=frozenset({"lab"}),
        ),
        "off": Partition("off", False, False, None, 0, (Node(64, 256000, {}, frozenset()),)),
        "any": Partition(
            "any", False, True, 30.0, 0, (Node(64, 256000, {"v100": 1}, frozenset()),)
        ),
    },
    max_array=100,
    kill_wait_s=30,
)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        # Each is had somewhere, but on no node all of it.
        ({"cpus": 4, "gpus": 4}, ["slurm:", "16 cores", "4 of gpu", "8 cores 32000M gpu:a100:4"]),
        ({"mem": "64G"}, ["slurm:", "64G", "together"]),
        ({"gpus": 1, "constraint": "big"}, ["slurm:", "the feature big"]),
        ({"partition": "off"}, ["slurm.partition", "off takes no jobs"]),
        ({"partition": "any,mixed", "time": "1:00:00", "cpus": 99}, ["slurm.time", "30 minutes"]),
        ({"account": "other"}, ["slurm.account", "mixed is not for other", "lab"]),
    ],
)
def test_one_node_must_have_all_that_a_job_asks_for(wrong, words):
    section = SlurmSettings.model_validate(
        {"mem": "8G", "stitch": {"mem": "8G"}, "coordinator": {"mem": "8G"}} | wrong
    )
    with pytest.raises(InputError) as raised:
        check(section, MIXED)
    for word in words:
        assert word in str(raised.value), raised.value


def test_a_job_fits_if_one_of_its_partitions_takes_it():
    cpu = {"mem": "8G", "partition": "any"}
    section = SlurmSettings.model_validate(
        {"partition": "off,any,mixed", "gpus": 4, "mem": "8G", "cpus": 2, "stitch": cpu,
         "coordinator": cpu}
    )  # fmt: skip
    assert check(section, MIXED) == []


def test_a_default_partition_that_is_down():
    down = Cluster({"d": Partition("d", True, False, None, 0, ())}, 100, 30)
    with pytest.raises(InputError, match=r"slurm\.partition: d takes no jobs now"):
        check(SlurmSettings(), down)


MINE = (
    Association("lab", "", frozenset({"normal", "low"})),
    Association("guest", "old", frozenset({"low"})),
)
RULES = frozenset({"associations", "limits", "qos"})


@pytest.mark.parametrize(
    ("asked", "mine", "words"),
    [
        ({"account": "labb"}, MINE, ["slurm.account", "labb", "you have lab"]),
        ({"account": "guest"}, MINE, ["slurm.account", "guest", "partition gpu"]),
        ({}, (), ["slurm.account", "you have none"]),
        ({"qos": "high"}, MINE, ["slurm.qos", "high", "low, normal"]),
        ({"stitch": {"partition": "cpu", "qos": "urgent"}}, MINE, ["slurm.stitch.qos", "urgent"]),
        ({"account": "lab", "qos": "low"}, MINE, None),
        # Nobody answers, or nobody asks.
        ({"account": "labb", "qos": "high"}, None, None),
    ],
)
def test_accounts_and_qos_that_the_accounting_knows(asked, mine, words):
    section = SlurmSettings.model_validate(SMALL | asked)
    cluster = replace(CLUSTER, enforced=RULES, associations=mine)
    if words is None:
        assert check(section, cluster) == []
    else:
        with pytest.raises(InputError) as raised:
            check(section, cluster)
        for word in words:
            assert word in str(raised.value), raised.value
    assert check(section, replace(cluster, enforced=frozenset())) == []


def test_a_container_program_that_is_not_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    section = {**SMALL, "container": "apptainer:///a.sif"}
    [warning] = check(SlurmSettings.model_validate(section), CLUSTER)
    assert "apptainer is not on the PATH" in warning
    section["prologue"] = ["module load apptainer"]
    assert check(SlurmSettings.model_validate(section), CLUSTER) == []
    (tmp_path / "apptainer").write_text("#!/bin/sh\n")
    (tmp_path / "apptainer").chmod(0o755)
    del section["prologue"]
    assert check(SlurmSettings.model_validate(section), CLUSTER) == []


def test_what_fits_is_accepted():
    section = SlurmSettings.model_validate(
        SMALL | {"gpus": 2, "gres": "gpu:a100", "time": "1:00:00", "constraint": "ib"}
    )
    assert check(section, CLUSTER) == []
    # The shorter of KillWait and GraceTime, less a margin.
    assert grace_s(section, CLUSTER) == 4
    assert grace_s(section.model_copy(update={"grace_s": 9}), CLUSTER) == 9


@pytest.mark.parametrize("time", [None, "2:00:00"])
def test_jobs_of_dask_workers_ask_for_what_the_stitch_asks_for(tmp_path, time, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/scratch/of-this-job-alone")
    stitch = {"jobs": 2, "cpus": 3, "mem": "900000K", "partition": "cpu", "time": time}
    section = SlurmSettings(qos="low", account="lab", python="/my python", stitch=stitch)
    options = dask_jobs.jobqueue_options(section, tmp_path / "run")
    script = dask_jobs.WorkerJob("tls://n:1", "x", certificates="c", **options).job_script()
    lines = script.splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert {"-p cpu", "-A lab", "--qos=low", "--mem=900000K", "--cpus-per-task=3"} <= asked
    # Without a time, the partition's limit: not dask-jobqueue's half an hour.
    assert {line for line in asked if line.startswith("-t")} == ({f"-t {time}"} if time else set())
    words = shlex.split(lines[-1])
    assert words[:4] == ["/my python", "-P", "-m", "agq.pipeline.slurm.dask_worker"]
    assert words[words.index("--nworkers") + 1] == "3"
    # Each job spills to its own temporary folder: that of the stitch's job is not for others.
    assert "of-this-job-alone" not in script
    # The last one counts: no worker is killed while the job still has memory.
    assert words[len(words) - words[::-1].index("--memory-limit")] == "0"


@pytest.mark.parametrize(
    "name",
    ["a b", "it's", 'a "b"', "line\nbreak", "$HOME $(id)", "~", "naïve 神经", "-x"],
)
def test_jobs_of_dask_workers_take_any_run_folder(tmp_path, name):
    """The shell that runs the script, and the arguments of sbatch, get the folder as it is."""
    python, certificates = tmp_path / "python", tmp_path / name / "slurm" / "dask"
    python.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n')
    python.chmod(0o755)
    certificates.mkdir(parents=True)
    section = SlurmSettings(python=str(python), stitch={"jobs": 1, "mem": "1G"})
    options = dask_jobs.jobqueue_options(section, tmp_path / name)
    dask_jobs.write_certificates(Security.temporary(), certificates)
    job = dask_jobs.WorkerJob("tls://n:1", "x", certificates=str(certificates), **options)
    with job.job_file() as script:
        assert stat.S_IMODE(Path(script).stat().st_mode) == 0o600
        done = subprocess.run(["bash", script], capture_output=True, text=True, check=True)
        asked = [line for line in Path(script).read_text().splitlines() if "#SBATCH" in line]
    words = done.stdout.split("\0")
    assert words[words.index("--certificates") + 1] == str(certificates)
    assert {stat.S_IMODE(file.stat().st_mode) for file in certificates.iterdir()} == {0o600}
    assert not [line for line in asked if str(tmp_path) in line]
    logs = tmp_path / name / "logs" / "slurm"
    assert job.sbatch_arguments == [f"--chdir={logs}"]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--dependency=afterok:1", "sets --dependency"), ("--array=0-3", "use `workers`"),
        ("--wrap=id", "sets --wrap"), ("--chdir=/", "sets --chdir"), ("--output=x", "--output"),
        ("--dep=singleton", "sets --dependency"), ("--mem-per-cpu=1G", "use `mem`"),
        ("--gpus=2", "use `gpus`"), ("--test-only", "--test-only"), ("--parsable", "--parsable"),
        ("-d", "one long option"), ("--reservation x", "one long"), ("script.sh", "one long"),
        ("--comment=a\nb", "one long"), ("--", "one long"), ("--=x", "one long"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("job", [None, "stitch"])
def test_options_of_sbatch_that_are_refused(tmp_path, option, words, job):
    section = {"extra": ["--reservation=x", option]}
    with pytest.raises(InputError) as raised:
        parse_config(
            {
                "run_dir": "x",
                "input": {"raw": {"path": "x"}},
                "slurm": {job: section} if job else section,
            }
        )
    field = f"slurm.{job}.extra" if job else "slurm.extra"
    assert field in str(raised.value)
    assert words in str(raised.value)


def test_further_options_of_sbatch_reach_every_kind_of_job(tmp_path, queue, monkeypatch, capsys):
    odd = '--comment=it\'s $(touch pwned) "ü"'
    extra = ["--reservation=x", "--exclude=n12,n13", "--export=NONE", "--exclusive", odd]
    stitch = {"extra": ["--mail-type=END"], "jobs": 1, "mem": "1G"}
    slurm = {"gpus": 0, "extra": extra, "stitch": stitch, "coordinator": {"extra": []}}
    file = make_config(tmp_path, slurm=slurm)
    given = {}
    monkeypatch.setattr(
        client, "submit", lambda words: given.setdefault(words[-1].stem, words) and len(given)
    )
    commands.submit(file)
    options = {name: words[1:-1] for name, words in given.items()}
    assert not set(options["coordinator"]) & {*extra, "--mail-type=END"}
    assert [word for word in options["workers"] if word in extra] == extra
    assert "--mail-type=END" in options["stitch"]
    assert not set(options["stitch"]) & set(extra)
    section = SlurmSettings(extra=(odd,), stitch={"jobs": 1, "mem": "1G"})
    job = dask_jobs.WorkerJob(
        "tls://n:1", "x", certificates="c", **dask_jobs.jobqueue_options(section, tmp_path)
    )
    assert job.sbatch_arguments[1:] == [odd]
    capsys.readouterr()
    queue.clear()
    commands.submit(file, dry_run=True, settings=["run_dir=other"])
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("# sbatch")]
    assert [shlex.split(line)[3:8] == extra for line in lines] == [False, True, False, False]
    # The jobs that the stitch submits are shown too.
    assert shlex.split(lines[-1])[3:] == ["--mail-type=END", "SCRIPT"]
    assert "# 1 jobs of dask workers, which the stitch submits" in shown
    assert f" -P -m agq.pipeline.slurm.dask_worker {dask_jobs.UNKNOWN_ADDRESS} " in shown


def test_a_job_of_dask_workers_is_submitted_and_recorded_as_the_others(tmp_path, monkeypatch):
    """With sbatch's own variables it would ask for something else; unrecorded, nobody ends it."""
    said = tmp_path / "said"
    for name, text in (("sbatch", "env; echo 77"), ("scancel", "echo scancel $@")):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\n({text}) >> {said}\n[ {name} = scancel ] || echo 77\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("SBATCH_RESERVATION", "SLURM_CPUS_PER_TASK", "SCANCEL_STATE"):
        monkeypatch.setenv(name, "odd")
    run_dir = tmp_path / "run"
    (run_dir / "slurm").mkdir(parents=True)
    jobs.save(run_dir, jobs.Jobs(here="/", grace_s=30, workers=1))
    job = dask_jobs.shown_job(SlurmSettings(stitch={"jobs": 1, "mem": "1G"}), run_dir)

    async def come_and_go() -> None:
        await job.start()
        await job.close()

    asyncio.run(come_and_go())
    assert "odd" not in said.read_text()
    assert "scancel 77" in said.read_text()
    assert [(entry.id, entry.role) for entry in jobs.load(run_dir).jobs] == [(77, "dask")]
    with jobs.changing(run_dir) as record:
        record.cancelled = True
    with pytest.raises(RuntimeError, match="cancelled"):
        asyncio.run(come_and_go())
    assert len(jobs.load(run_dir).jobs) == 1


def test_the_program_of_dask_workers_answers_nobody_else(tmp_path):
    certificates, security = tmp_path / "a line\nbreak", Security.temporary()
    certificates.mkdir()
    dask_jobs.write_certificates(security, certificates)
    with (
        open_cluster(0, security=security, protocol="tls://") as cluster,
        Client(cluster) as client,
    ):
        words = [sys.executable, "-P", "-m", "agq.pipeline.slurm.dask_worker"]
        words += [cluster.scheduler_address, "--certificates", str(certificates)]
        with subprocess.Popen(words, stderr=subprocess.DEVNULL) as program:
            try:
                client.wait_for_workers(1, timeout=60)
                addresses = listening(program.pid)
                assert len(addresses) == 2  # a nanny and its worker
                assert attack(addresses) == []
                (path,) = client.run(lambda: sys.path).values()
                assert str(caches.temporary_folder()) in path[0]
            finally:
                program.terminate()


class _DaskCluster:
    """As much of dask-jobqueue's cluster as is asked here; jobs are numbered from 100."""

    def __init__(self) -> None:
        self.workers: dict[str, SimpleNamespace] = {}
        self.worker_spec: dict[str, dict] = {}
        self.scheduler_info: dict = {"workers": {}}
        self.submitted = 0

    def scale(self, jobs: int) -> None:
        while len(self.workers) < jobs:
            name = f"SLURMCluster-{self.submitted}"
            self.worker_spec[name] = {}
            self.workers[name] = SimpleNamespace(job_id=str(100 + self.submitted))
            self.submitted += 1

    def sync(self, function, *arguments):
        return asyncio.run(function(*arguments))


def test_a_lost_dask_job_is_replaced_with_pauses_and_others_work_on(tmp_path, monkeypatch):
    now, queued = 0.0, {100, 101}
    monkeypatch.setattr(dask_jobs.time, "monotonic", lambda: now)
    monkeypatch.setattr(
        dask_jobs.slurm,
        "queue",
        lambda jobs: [QueueEntry(j, (), "RUNNING", "") for j in jobs if j in queued],
    )
    cluster = _DaskCluster()
    cluster.scale(2)
    watched = dask_jobs.WorkerJobs(cluster, 2, tmp_path)
    # Two processes of the first job; the second job and all that follow it end before they join.
    cluster.scheduler_info["workers"] = {i: {"name": f"SLURMCluster-0-{i}"} for i in range(2)}
    watched.check()
    assert cluster.submitted == 2
    queued.remove(101)

    def check_for(minutes: int) -> None:
        nonlocal now
        for _ in range(4 * minutes):
            watched.check()
            now += 15

    check_for(60)
    # A bad node: ever longer pauses, and no end of the run.
    assert 12 < cluster.submitted < 30
    assert set(cluster.workers) == {"SLURMCluster-0", f"SLURMCluster-{cluster.submitted - 1}"}
    assert set(cluster.worker_spec) == set(cluster.workers)
    # When a worker of a new job joins, the count starts again.
    queued.add(100 + cluster.submitted - 1)
    cluster.scheduler_info["workers"][2] = {"name": f"SLURMCluster-{cluster.submitted - 1}-0"}
    watched.check()
    assert watched.in_vain == 0
    # Nobody is left: three times as many jobs as wanted may fail, then it ends.
    cluster.scheduler_info["workers"] = {}
    queued.clear()
    with pytest.raises(RunStoppedError, match="6 dask worker jobs were refused, or ended"):
        check_for(60)


@pytest.mark.parametrize(
    ("fault", "cancelled", "code"),
    [
        (InputError("no input"), False, 1),
        (ZeroDivisionError("of nobody's expectation"), False, None),
        (OSError(errno.EIO, "broken"), False, 1),
        (SystemExit(75), False, 75),
        (SystemExit(143), True, 143),
        (SystemExit(75), True, 143),
    ],
    ids=str,
)
def test_workers_learn_that_no_coordinator_comes(tmp_path, monkeypatch, fault, cancelled, code):
    """A coordinator that fails or is cancelled closes the session, and never succeeds."""
    record = jobs.Jobs(here="/", grace_s=30, workers=1, cancelled=cancelled)
    (tmp_path / "slurm").mkdir()
    jobs.record_path(tmp_path).write_text(record.model_dump_json())
    Session(id="x", host="h", port=1).save(tmp_path)

    def predict(*_):
        raise fault

    monkeypatch.setattr(slurm_coordinator, "_predict", predict)
    monkeypatch.setattr(slurm_coordinator, "cap_output", lambda: None)
    monkeypatch.setattr(slurm_coordinator.signal, "signal", lambda *_: None)
    with contextlib.nullcontext() if code is not None else pytest.raises(type(fault)):
        assert slurm_coordinator.main([str(tmp_path)]) == code
    comes_again = isinstance(fault, SystemExit) and not cancelled
    assert Session.load(tmp_path).state == ("open" if comes_again else "closed")


def test_jobs_of_the_original_are_none_of_a_copy(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.lock():
        run.create({"run_dir": str(run.path)}, {"grid": 1})
    (run.path / "slurm").mkdir()
    record = jobs.Jobs(here="/", grace_s=30, workers=1, jobs=[])
    jobs.record_path(run.path).write_text(record.model_dump_json())
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    for command in (commands.resume, commands.cancel, partial(commands.scale, count=1)):
        with pytest.raises(InputError, match=r"copy is a copy.*agq submit"):
            command(copy)
    assert not jobs.are_of_another(run.path)
    copied = RunFolder(copy)
    with copied.lock():
        copied.create({"run_dir": str(copy)}, {"grid": 1})
    assert not jobs.record_path(copy).exists()
    assert jobs.record_path(run.path).exists()


def test_a_stitch_waits_while_the_disk_is_full(tmp_path, monkeypatch):
    full = [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota")]
    probes = [InputError("still full"), None, None]
    done = []

    def raise_next(errors):
        if errors and (error := errors.pop(0)) is not None:
            raise error

    monkeypatch.setattr(slurm_stitch, "load_config", lambda _: config(tmp_path))
    monkeypatch.setattr(slurm_stitch, "prepare_stitch", lambda *_, **__: None)
    session = SimpleNamespace()
    monkeypatch.setattr(slurm_stitch, "open_session", lambda _: contextlib.nullcontext(session))
    monkeypatch.setattr(slurm_stitch.stages, "stitch", lambda *_, **__: raise_next(full))
    monkeypatch.setattr(slurm_stitch.stages, "score", lambda _: None)
    monkeypatch.setattr(slurm_stitch.stages, "picture", done.append)
    monkeypatch.setattr(slurm_coordinator, "_LOCKED_S", 0.0)
    monkeypatch.setattr(slurm_coordinator, "require_writable", lambda _: raise_next(probes))
    slurm_stitch._stitch(tmp_path, Notifier(tmp_path, None))
    assert (full, probes, done) == ([], [], [session])
    full.append(OSError(errno.EIO, "broken"))
    with pytest.raises(OSError, match="broken"):
        slurm_stitch._stitch(tmp_path, Notifier(tmp_path, None))


@pytest.mark.parametrize(
    "section",
    [
        {"partition": "a b"},
        {"partition": "a\n#SBATCH --wrap=x"},
        {"qos": "$(x)"},
        {"address": "0.0.0.0"},
        {"address": "::"},
        {"address": "[::]"},
        {"address": "0"},
        {"mem": "lots"},
        {"time": "soon"},
        {"prologue": ["a\nb"]},
        {"container": "docker://x"},
        {"container": "apptainer://x.sif", "stitch": {"jobs": 1}},
        {"lead_s": 1},
    ],
)
def test_values_that_would_break_a_script_are_refused(section):
    with pytest.raises(ValueError, match="validation error"):
        SlurmSettings.model_validate(section)


def test_what_a_folder_says_of_its_jobs_is_read_as_files_alone(tmp_path: Path) -> None:
    """A stranger's folder may hold anything under these names: agq status must not wait for it."""
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    for path, read in (
        (jobs.record_path(run), jobs.load),
        (jobs.config_path(run), jobs.load_config),
    ):
        os.mkfifo(path)
        with pytest.raises(InputError, match="is a FIFO"):
            read(run)
        path.unlink()
        path.symlink_to("/dev/zero")
        with pytest.raises(InputError, match="is a symbolic link"):
            read(run)
        path.unlink()
