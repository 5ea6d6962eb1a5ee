"""Secrets in addresses: what is shown of them, in any text."""

import logging
import subprocess
import sys

import pytest

from agq import credentials
from agq.credentials import HidingFormatter, has_secret, hidden, hide, hide_address, remember

SHOWN = [
    ("http://user:RAW@h:1/in.zarr?sig=QUERY", "http://user:***@h:1/in.zarr?***"),
    ("https://host/in.zarr?X-Amz-Signature=QUERY&X-Amz-Date=1", "https://host/in.zarr?***"),
    ("https://a.blob.core.windows.net/c/x?sv=1&sig=QUERY", "https://a.blob.core.windows.net/c/x?***"),
    ("https://host/in.zarr#token=QUERY", "https://host/in.zarr?***"),
    ("https://host?QUERY", "https://host?***"),
    ("https://user:a/RAW@host/x", "https://user:***@host/x"),
    ("https://user:a?RAW@host/x", "https://user:***@host/x"),
    ("https://user:RAW@b@host/x", "https://user:***@host/x"),
    ("https://RAW@host/x", "https://***@host/x"),
    ("https://RAW:@host/x", "https://***@host/x"),
    ("https://:RAW@host/x", "https://***@host/x"),
    ("s3://ID:RAW@bucket/x.zarr", "s3://ID:***@bucket/x.zarr"),
    ("zarr3://https://user:RAW@host/x", "zarr3://https:***@host/x"),
    ("http:/user:RAW@host/x?sig=QUERY", "http:/user:***@host/x?***"),
    ("http://user:RAW@[::1]:80/x?QUERY", "http://user:***@[::1]:80/x?***"),
    ("mongodb://user@host/db", "mongodb://user@host/db"),
    ("mongodb://user:1234/RAW@host/db", "mongodb://user:***@host/db"),
    ("mongodb+srv://user:RAW@a,b:1/db?tls=true", "mongodb+srv://user:***@a,b:1/db?***"),
    ("s3://bucket/raw.zarr", "s3://bucket/raw.zarr"),
    ("https://host:8080/a@b/raw.zarr", "https://host:8080/a@b/raw.zarr"),
    ("data/what?.zarr", "data/what?.zarr"),
    ("relative/path", "relative/path"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(credentials, "_known", set())


@pytest.mark.parametrize(("address", "shown"), SHOWN)
def test_what_is_shown_of_an_address(address, shown):
    assert hide_address(address) == shown
    assert hidden({"a": [address]}) == {"a": [shown]}
    assert has_secret(address) == (address != shown)
    assert hide_address(shown) == shown
    if "://" in address:
        text = f"({address}): cannot be read, '{address}', <{address}>"
        assert hide(text) == f"({shown}): cannot be read, '{shown}', <{shown}>"
        assert hide(hide(text)) == hide(text)


@pytest.mark.parametrize("space", [" ", "\t", "\n", "\u00a0"])
def test_a_password_may_have_spaces(space):
    for address in (f"http://user:a{space}RAW@host/x", f"http://RAW{space}a@host/x"):
        assert "RAW" not in hide_address(address)
        assert "RAW" not in str(hidden({"path": address}))
        assert has_secret(address)
        remember(address)
        assert "RAW" not in hide(f"{address}: cannot be read")


@pytest.mark.parametrize(
    "text",
    [
        "GET /in.zarr/raw/zarr.json?X-Amz-Signature=SECRETVALUE&a=b failed",
        "Max retries exceeded with url: /in.zarr?sv=1&sig=SECRETVALUE (Caused by ...)",
        "/x?access_token=SECRETVALUE",
    ],
)
def test_signatures_without_their_address_are_hidden(text):
    assert "SECRETVALUE" not in hide(text)


def test_remembered_secrets_are_hidden_wherever_they_are():
    remember({"raw": ["http://user:RAW%2FSECRET@h/in.zarr?mine=QUERY+SECRET&x=1", 3, None]})
    text = (
        "RAW%2FSECRET RAW/SECRET QUERY SECRET QUERY+SECRET QUERY%20SECRET mine=QUERY+SECRET&x=1 "
        "dXNlcjpSQVcvU0VDUkVU x=1"
    )
    assert set(hide(text).split()[:-1]) == {"***"}
    assert hide(text).split()[-1] == "x=1"
    remember("http://u:abc@h/")
    assert hide("abc") == "abc"
    remember("https://user@h/in.zarr")
    assert hide("other users of https://user@h/") == "other users of https://***@h/"


def test_a_long_hostile_text_takes_no_time():
    for piece in ("://", "://a:", "?sig=", "a", "://a@", "?", "http://a?"):
        hide(piece * (200_000 // len(piece)))


def test_log_lines_and_uncaught_errors_hide_secrets():
    record = logging.makeLogRecord({"msg": "%s is away", "args": ("http://u:RAW@h/?QUERY",)})
    assert HidingFormatter("%(message)s").format(record) == "http://u:***@h/?*** is away"
    code = (
        "import logging, threading, agq.credentials as c; c.log_to_stderr()\n"
        "def fail(): raise ValueError('http://u:RAW@h/x?QUERY')\n"
        "t = threading.Thread(target=fail); t.start(); t.join()\n"
        "try: fail()\n"
        "except ValueError: logging.exception('http://u:RAW@h')\n"
        "fail()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("http://u:***@h/x?***") == 3
    # The source line of a traceback is the program's.
    assert "RAW" not in done.stderr.replace("raise ValueError('http://u:RAW@h/x?QUERY')", "")
