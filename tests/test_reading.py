"""Files that are none, that lead elsewhere, and that have no end."""

import os
import socket
from pathlib import Path

import pytest

from agq.errors import DamagedError, InputError
from agq.reading import (
    DOCUMENT_LEVELS,
    NotAFileError,
    open_file,
    parse_json,
    read_file,
    read_json,
    read_record,
)


@pytest.fixture
def odd(tmp_path):
    """A folder with one of everything that is no file."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "terminal").symlink_to("/dev/tty")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("missing")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.open(tmp_path, os.O_RDONLY)
        try:  # the name of a socket must be short
            listening.bind(f"/proc/self/fd/{here}/socket")
        finally:
            os.close(here)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fifo", "FIFO"),
        ("folder", "folder"),
        ("device", "device"),
        ("socket", "socket"),
    ],
)
def test_what_is_no_file_is_named_and_does_not_hang(odd, name, kind):
    with pytest.raises(NotAFileError, match=kind):
        read_file(odd / name)
    with pytest.raises(NotAFileError, match="link" if name == "device" else kind):
        read_file(odd / name, within=odd)


@pytest.mark.parametrize(
    "name", ["loop", "nowhere", "missing", "folder/x", "fifo/x", "n" * 300, "nul\0", "\ud800"]
)
def test_what_cannot_be_opened_is_an_error_with_its_path(odd, name):
    with pytest.raises(OSError, match=r".") as raised:
        read_file(odd / name)
    assert raised.value.filename == str(odd / name)


def test_a_terminal_is_no_file_or_not_there(odd):
    with pytest.raises((NotAFileError, OSError)):
        read_file(odd / "terminal")


def test_a_file_is_read_whole_up_to_the_most(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    assert read_file(file) == read_file(str(file), most=10) == b"0123456789"
    assert read_file(file, within=tmp_path) == b"0123456789"
    with pytest.raises(InputError, match="10 bytes, and such a file 9 at most"):
        read_file(file, most=9)
    file.write_bytes(b"")
    assert read_file(file, most=0) == b""
    with open_file(file) as opened:
        assert opened.read() == b""


def test_a_sparse_file_of_a_terabyte_is_refused_unread(tmp_path):
    file = tmp_path / "file"
    file.touch()
    os.truncate(file, 2**40)
    with pytest.raises(InputError, match="1099511627776 bytes"):
        read_json(file)


def test_links_are_followed_unless_a_folder_binds(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder in (run / "logs", outside):
        folder.mkdir(parents=True)
    (outside / "secret").write_bytes(b"secret")
    (run / "logs" / "own").write_bytes(b"own")
    (run / "logs" / "link").symlink_to(outside / "secret")
    (run / "away").symlink_to(outside)
    (tmp_path / "alias").symlink_to(run)
    assert read_file(run / "logs" / "link") == read_file(run / "away" / "secret") == b"secret"
    # The folder itself may be reached by a link.
    assert read_file(tmp_path / "alias" / "logs" / "own", within=tmp_path / "alias") == b"own"
    with pytest.raises(NotAFileError, match="link is a symbolic link"):
        read_file(run / "logs" / "link", follow=False)
    for inside in ("logs/link", "away/secret"):
        with pytest.raises(NotAFileError, match="is a symbolic link"):
            read_file(run / inside, within=run)
    for beside in (run / "../outside/secret", outside / "secret", run, "/etc/passwd"):
        with pytest.raises(NotAFileError, match="does not lie in"):
            read_file(beside, within=run)
    with pytest.raises(FileNotFoundError):
        read_file(run / "logs" / "missing", within=run)


def test_no_descriptor_stays_open(odd):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in ("fifo", "folder", "device", "socket", "loop", "nowhere", "folder/x"):
        for within in (None, odd):
            with pytest.raises((InputError, OSError)):
                read_file(odd / name, within=within)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_document_is_as_deep_as_documents_are(tmp_path):
    deep = "[" * DOCUMENT_LEVELS + "]" * DOCUMENT_LEVELS
    assert parse_json(deep)
    for levels in (DOCUMENT_LEVELS, 900, 200_000):
        for opening, closing in ("[]", ('{"a":', "}")):
            with pytest.raises(ValueError, match="levels"):
                parse_json(opening * levels + "{}" + closing * levels)
    with pytest.raises(ValueError, match="digit"):
        parse_json("1" * 5000)
    with pytest.raises(ValueError, match="utf-8"):
        parse_json(b'{"a": "\xff"}')
    (tmp_path / "a.json").write_text('{"a": [1, {"b": null}]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, {"b": None}]}


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b'"a"', b"{", b"\xff", b"[" * 100_000, b"null"])
def test_a_record_is_an_object(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(DamagedError, match=r"a\.json: file is damaged"):
        read_record(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_record(tmp_path / "a.json") == {"a": 1}
