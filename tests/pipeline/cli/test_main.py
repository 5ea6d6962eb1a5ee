"""What every user meets first: version, completion of the shell, a configuration to start from."""

import errno
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from agq.pipeline.cli import watch
from agq.pipeline.folder import RunFolder
from tests.helpers import ROOT
from tests.helpers.runs import environment, make_config


def agq_module(folder: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """Run `python -m agq` in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "agq", *map(str, arguments)],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def completed(words: str, folder: Path) -> list[str]:
    """Return what a Tab after these words offers."""
    place = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    return agq_module(folder, _AGQ_COMPLETE="complete_bash", **place).stdout.split()


def test_version(main):
    code, text, _ = main("--version")
    assert (code, text) == (0, f"agq {version('agq-pipeline')}\n")


def test_python_m_agq_is_agq(tmp_path):
    done = agq_module(tmp_path, "--help")
    assert done.returncode == 0
    assert "Usage: agq [OPTIONS] COMMAND" in done.stdout


def test_the_shell_completes_commands_and_options(tmp_path):
    assert completed("agq st", tmp_path) == ["stitch", "status"]
    assert completed("agq config ", tmp_path) == ["init", "check", "explain", "schema"]
    assert "--only-failed" in completed("agq predict --", tmp_path)


def test_a_tab_imports_no_command(tmp_path):
    done = agq_module(
        tmp_path,
        _AGQ_COMPLETE="complete_bash",
        COMP_WORDS="agq ",
        COMP_CWORD="1",
        PYTHONVERBOSE="1",
    )
    assert done.stdout.split()[0] == "run"
    assert "agq.pipeline.cli.lazy" in done.stderr
    for module in ("agq.pipeline.cli.run", "numpy", "rich.table"):
        assert f"import '{module}'" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_for_a_shell(main, monkeypatch, shell):
    # Otherwise typer looks for the shell among the parents of this process; there may be none.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, text, _ = main("--show-completion", shell)
    assert code == 0
    assert "_AGQ_COMPLETE" in text


@pytest.mark.parametrize("template", ["local", "slurm", "demo"])
def test_a_configuration_to_start_from(main, tmp_path, template):
    file = tmp_path / "my.yaml"
    code, text, _ = main("config", "init", template, "-o", file)
    assert code == 0
    assert f"wrote {file}; next: " in text
    assert file.read_text() == (ROOT / "configs" / f"{template}.yaml").read_text()
    assert main("config", "check", file)[0] == 0
    file.write_text("edited")
    code, _, err = main("config", "init", template, "-o", file)
    assert code == 2
    assert err == f"agq: {file} exists; name another file with -o\n"
    assert file.read_text() == "edited"


def test_a_configuration_where_nothing_can_be_written(main, tmp_path):
    code, _, err = main("config", "init", "-o", tmp_path / "none" / "my.yaml")
    assert code == 2
    assert err == f"agq: {tmp_path}/none/my.yaml cannot be written: {os.strerror(2)}\n"


def test_the_default_is_for_one_machine(tmp_path):
    assert agq_module(tmp_path, "config", "init").returncode == 0
    assert yaml.safe_load((tmp_path / "my.yaml").read_text())["run_dir"] == "runs/my-volume"


REFUSALS = {
    "ENOSPC": "free some space",
    "EDQUOT": "quota",
    "EROFS": "choose another folder",
    "EACCES": "ask its owner",
    "EPERM": "ask its owner",
    "EFBIG": "ulimit -f",
    "EMFILE": "ulimit -n",
    "ENFILE": "too many open files",
    "EIO": "fails",
    "ESTALE": "file server",
    "ENOTDIR": "",
    "ELOOP": "",
    "ETXTBSY": "",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_system_refuses_is_one_line(main, tmp_path, monkeypatch, name):
    number = getattr(errno, name)

    def refused(_target):
        raise OSError(number, os.strerror(number), f"{tmp_path}/a\udcff b")

    monkeypatch.setattr(watch, "_status_of", refused)
    code, _, err = main("status", tmp_path)
    assert code == 2
    assert err.startswith(f"agq: {tmp_path}/a\\udcff b: ")
    assert os.strerror(number) in err
    assert REFUSALS[name] in err
    assert err.count("\n") == 1


def test_two_files_and_none(main, tmp_path, monkeypatch):
    errors = [OSError(18, "Invalid cross-device link", "a", None, "b"), OSError(28, "disk full")]
    monkeypatch.setattr(watch, "_status_of", lambda _: (_ for _ in ()).throw(errors.pop(0)))
    assert main("status", tmp_path)[2] == "agq: a -> b: Invalid cross-device link\n"
    assert main("status", tmp_path)[2].startswith("agq: disk full: free some space")
    # Without a file and a known cause it is an error of the program.
    errors.append(OSError("of a library"))
    with pytest.raises(OSError, match="of a library"):
        main("status", tmp_path)


SECRET_URL = "https://user:RAWSECRET@host/in.zarr?sig=QUERYSECRET"


@pytest.mark.parametrize(
    "words",
    [
        ("import", SECRET_URL, "out.zarr"),
        ("evaluate", "run", f"{SECRET_URL}::truth"),
        ("stitch", "--fragments", SECRET_URL),
        ("view", "run", f"--base-url={SECRET_URL}"),
        ("run", "config.yaml", "--set", f"input.raw.path={SECRET_URL}"),
        ("run", "config.yaml", f"--set=input.raw={{path: '{SECRET_URL}'}}"),
        ("stitch", "RUN", "--set", f"input.classes.path=${{X:-{SECRET_URL}}}"),
        ("run", "config.yaml", "--set", "ledger.uri=mongodb://user:RAWSECRET@host/"),
        ("run", "config.yaml", "--set", "ledger.uri=mongodb://host/"),
        ("run", "config.yaml", "--set", "ledger={uri: 'mongodb://user:RAWSECRET@host/'}"),
        ("stitch", "RUN", "--set", "ledger.uri=mongodb://user:RAWSECRET@host/"),
    ],
)
def test_secrets_on_a_command_line_are_refused(main, tmp_path, monkeypatch, words):
    """Other users of the machine see command lines; the message says how to do it."""
    monkeypatch.chdir(tmp_path)
    make_config(tmp_path)
    RunFolder(tmp_path / "RUN").create({"input": {}}, {})
    code, out, err = main(*words)
    assert code == 2
    assert err.count("\n") == 1
    assert "other users of this machine can read" in err
    assert ("AGQ_MONGO_URI" if "mongodb" in str(words) else "${RAW_URL}") in err
    assert "SECRET" not in out + err


def test_a_variable_stands_for_an_argument(main, tmp_path, monkeypatch):
    monkeypatch.setenv("RAW_URL", str(tmp_path / "nothing.zarr"))
    assert f"{tmp_path}/nothing.zarr: no such file" in main("evaluate", "${RAW_URL}", "x")[2]
    assert f"{tmp_path}/nothing.zarr: no such file" in main("evaluate", "${RAW_URL}::a", "x")[2]
    assert "${NONE}: no such file" in main("evaluate", "${NONE}", "x")[2]
    # In a setting, it is the configuration that replaces it.
    monkeypatch.setenv("LEDGER", "mongodb://user:RAWSECRET@host/")
    config = make_config(tmp_path)
    assert main("config", "check", config, "--set", "ledger.uri=${LEDGER}")[0] == 0
    assert main("config", "check", config, "--set", "ledger.uri=null")[0] == 0


def test_an_uncaught_error_shows_no_secret():
    code = (
        "import sys; sys.argv = ['agq', 'status', '.']\n"
        "from agq.pipeline.cli import main, watch\n"
        f"def fail(_): raise RuntimeError('{SECRET_URL}')\n"
        "watch._status_of = fail\n"
        "main.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "RuntimeError: https://user:***@host/in.zarr?***" in done.stderr
    assert "SECRET" not in done.stderr
