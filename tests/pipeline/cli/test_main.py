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
from tests.helpers import ROOT
from tests.helpers.runs import environment


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
    assert completed("agq config ", tmp_path) == ["init", "check", "schema"]
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
