"""One message by one way: what answers badly, or never, costs its time limit and one line."""

import json
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from agq.credentials import hide
from agq.errors import InputError
from agq.pipeline.config.schema import parse_config
from agq.pipeline.config.yaml_settings import apply_override
from agq.pipeline.notify import deliver as module
from agq.pipeline.notify.deliver import deliver
from agq.pipeline.notify.message import compose
from agq.pipeline.notify.settings import NotifySettings


@pytest.fixture
def message(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    return compose("failure", tmp_path / "run", "a1", 'it "broke"\x1b[31m\nhere')


def test_a_message_is_one_line_of_plain_text(message):
    assert message.reason == 'it "broke"\\u001b[31m\\nhere'
    assert message.text.startswith("agq: run on ")
    assert "has failed" in message.text
    assert "\n" not in message.text
    assert message.key == "a1-failure"


@pytest.mark.parametrize(
    ("answer", "tries", "problem"),
    [
        (200, 1, None),
        (204, 1, None),
        (500, 3, "answered with status 500"),
        (503, 3, "answered with status 503"),
        (429, 3, "answered with status 429"),
        (404, 1, "answered with status 404"),
        # The other address would get what this one is told.
        (302, 1, "answered with status 302"),
        ("hang", 3, "no answer within 0.3 s"),
        ("drip", 3, "no answer within 0.3 s"),
        ("cut", 3, "closed connection without response"),
    ],
)
def test_what_a_webhook_answers(hook, message, answer, tries, problem):
    hook.answer = answer
    settings = NotifySettings(webhook=hook.address, timeout_s=0.3)
    began = time.monotonic()
    said = deliver(settings, "webhook", message)
    assert time.monotonic() - began < 4
    assert len(hook.heard) == tries
    assert all(json.loads(message.model_dump_json()) == heard for _, heard, _ in hook.heard)
    assert (said is None) if problem is None else said.endswith(problem)
    assert "/services" not in (said or "")


def test_nobody_listens(message):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = NotifySettings(webhook=f"http://127.0.0.1:{port}/x", timeout_s=2)
    assert deliver(settings, "webhook", message) == f"127.0.0.1:{port}: Connection refused"


def test_a_password_is_sent_as_a_header_and_the_address_comes_from_a_file(hook, message, tmp_path):
    file = tmp_path / "hook"
    file.write_text(hook.address.replace("//", "//me:pass%20word@") + "?token=1\n")
    file.chmod(0o600)
    assert deliver(NotifySettings(webhook_file=file), "webhook", message) is None
    path, _, authorization = hook.heard[0]
    assert path.endswith("?token=1")
    assert authorization == "Basic bWU6cGFzcyB3b3Jk"
    file.unlink()
    assert "No such file" in deliver(NotifySettings(webhook_file=file), "webhook", message)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"webhook": "ftp://host/x"}, "webhook: not an address such as https://host/path"),
        ({"webhook": "https:///x"}, "webhook: not an address"),
        ({"webhook": "https://host/hunter2 x"}, "webhook: not an address"),
        ({"webhook": "https://host:port/hunter2"}, "webhook: not an address"),
        ({"command": "mail hunter2"}, "command: a list of a program and its arguments"),
        ({"command": [""]}, "command.0: an argument of a command has characters"),
        ({"webhook_file": "/none/hunter2x"}, None),
        ("https://host/hunter2", "notify: "),
    ],
)
def test_settings_that_reach_nobody(given, words):
    values = {"run_dir": "x", "input": {"raw": {"path": "x"}}, "notify": given}
    if words is None:
        with pytest.raises(InputError, match=r"webhook_file /none/hunter2x: No such file"):
            parse_config(values).notify.address()
        return
    with pytest.raises(InputError) as refused:
        parse_config(values)
    assert words in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_the_address_stands_in_no_command_line():
    address = "https://hooks.example/T/abcdefghijklmnop"
    for setting in (f"notify.webhook={address}", f"notify={{webhook: '{address}'}}"):
        with pytest.raises(InputError, match=r"--set notify\.webhook: other users") as refused:
            apply_override({}, setting)
        assert "hooks.example" not in str(refused.value)
    apply_override({}, "notify.webhook=${ADDRESS}")


def test_messages_hide_the_whole_address_once_it_is_known():
    address = "https://hooks.example/services/T12/abcdefghijklmnopqr?x=abcdefghijklmnopqrs"
    assert NotifySettings(webhook=address).address() == address
    shown = hide(f"no answer from {address}, nor from abcdefghijklmnopqr; services")
    assert "abcdefgh" not in shown
    assert "T12" not in shown
    assert shown.endswith("services")


def script(folder: Path, text: str) -> tuple[str, ...]:
    file = folder / "hook.py"
    file.write_text(text)
    return (sys.executable, str(file))


def test_a_command_gets_the_facts_twice(message, tmp_path):
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(sys.stdin.read() + '\\n'"
        " + os.environ['AGQ_NOTIFY_REASON'] + '\\n' + os.environ['AGQ_NOTIFY_STAGE'] + '\\n')"
    )
    words = (*script(tmp_path, code), str(tmp_path / "a $(touch pwned) 'b'"))
    assert deliver(NotifySettings(command=words), "command", message) is None
    said = Path(words[-1]).read_text().splitlines()
    assert json.loads(said[0]) == json.loads(message.model_dump_json())
    assert said[1:] == [message.reason, ""]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import sys; sys.exit('no such channel')", "ended with status 1: no such channel"),
        ("import os; os.kill(os.getpid(), 9)", "ended with status -9: "),
        (None, "cannot be run: No such file or directory"),
    ],
)
def test_a_command_that_fails(message, tmp_path, code, problem):
    words = (str(tmp_path / "none"),) if code is None else script(tmp_path, code)
    said = deliver(NotifySettings(command=words), "command", message)
    assert said is not None
    assert problem.strip() in said
    assert "\n" not in said


def test_a_command_that_hangs_is_killed_with_all_that_it_has_started(message, tmp_path):
    mark = tmp_path / "pid"
    code = (
        "import subprocess, sys, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(mark)!r}).write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    settings = NotifySettings(command=script(tmp_path, code), timeout_s=3)
    began = time.monotonic()
    assert "was killed after 3 s" in deliver(settings, "command", message)
    assert time.monotonic() - began < 6
    pid = int(mark.read_text())
    until = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)
