"""Checkpoints by name: the registry, downloads that break off, mirrors, and what is refused."""

import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agq.errors import InputError
from agq.model.checkpoint import load, resolve
from agq.pipeline.checkpoints.fetch import fetch, find
from agq.pipeline.checkpoints.registry import known
from tests.helpers.networks import write_checkpoint
from tests.helpers.runs import agq
from tests.helpers.signed import signed_server


class Handler(SimpleHTTPRequestHandler):
    """Gives parts of files if asked, and breaks off after `most` bytes of each answer."""

    def do_GET(self) -> None:
        server: Any = self.server
        data = Path(self.translate_path(self.path)).read_bytes()
        wanted = self.headers.get("Range") if server.parts else None
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        server.starts.append(start)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + server.most])
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None: ...


class Server(ThreadingHTTPServer):
    parts = True
    most = 2**30
    starts: list[int]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGQ_CHECKPOINTS", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "web").mkdir()
    return write_checkpoint(tmp_path / "web" / "lab.safetensors")


@pytest.fixture
def server(weights: Path) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), partial(Handler, directory=str(weights.parent))) as server:
        server.starts = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def write_registry(folder: Path, **entry: Any) -> Path:
    file = folder / "registry.yaml"
    file.write_text(json.dumps({"checkpoints": [{"name": "lab", **entry}]}))
    return file


def test_the_packages_registry_is_of_its_own_files():
    for name, entry in known().items():
        assert entry.file is not None
        assert load(resolve(name)).provenance
        assert resolve(name).name == entry.file
        with pytest.raises(InputError, match=f"{name} comes with the package"):
            find(name, None, None, None)


def test_a_name_of_a_registry_is_fetched_once(cache, weights, server, monkeypatch):
    write_registry(weights.parent, url="lab.safetensors", sha256=sha256(weights))
    monkeypatch.setenv("AGQ_REGISTRY", f"{server.address}/registry.yaml")
    listed = agq("checkpoint", "list").stdout
    assert "lab: agq checkpoint fetch lab" in listed
    assert "em: in the package" in listed
    done = agq("checkpoint", "fetch", "lab")
    assert done.returncode == 0, done.stderr
    assert f"fetched {cache / 'lab'}; use it with model.checkpoint: lab" in done.stdout
    assert resolve("lab") == cache / "lab"
    assert load("lab").sha256 == load(weights).sha256
    assert names(cache) == ["lab"]
    asked = len(server.starts)
    again = agq("checkpoint", "fetch", "lab")
    assert "there already" in again.stdout
    assert len(server.starts) == asked + 1, "the registry alone"
    assert "lab: fetched" in agq("checkpoint", "list").stdout
    # Another file of this name is fetched in its place.
    other = write_checkpoint(weights.parent / "lab.safetensors", seed=1)
    write_registry(weights.parent, url="lab.safetensors", sha256=sha256(other))
    assert fetch(find("lab", None, None, None)) == (cache / "lab", True)
    assert sha256(cache / "lab") == sha256(other)


@pytest.mark.parametrize("parts", [True, False])
def test_a_download_that_breaks_off_goes_on(cache, weights, server, parts):
    server.parts, size = parts, weights.stat().st_size
    server.most = size // 3
    wanted = find(f"{server.address}/lab.safetensors", sha256(weights), None, None)
    if parts:
        assert fetch(wanted) == (cache / "lab", True)
        assert 3 <= len(server.starts) <= 5
        assert server.starts == sorted(set(server.starts)), "each goes on where the last broke off"
    else:
        with pytest.raises(InputError, match="cannot be read"):
            fetch(wanted)
        (part,) = cache.glob(".lab.*.part")
        assert 0 < part.stat().st_size < size
        server.most = size
        assert fetch(wanted) == (cache / "lab", True)
    assert sha256(cache / "lab") == sha256(weights)
    assert names(cache) == ["lab"]


def test_a_whole_part_of_a_killed_download_is_taken(cache, weights, server):
    wanted = find(f"{server.address}/lab.safetensors", sha256(weights), None, None)
    cache.mkdir()
    part = cache / f".lab.{wanted.sha256[:16]}.part"
    part.write_bytes(weights.read_bytes())
    assert fetch(wanted) == (cache / "lab", True)
    assert server.starts == [weights.stat().st_size - 1]
    part.write_bytes(weights.read_bytes() + b"more")
    (cache / "lab").unlink()
    assert fetch(wanted) == (cache / "lab", True)


def test_mirrors_and_paths(cache, weights, server, tmp_path):
    digest = sha256(weights)
    assert fetch(find(str(weights), digest, "mine", None)) == (cache / "mine", True)
    gone = "http://127.0.0.1:1/models/lab.safetensors"
    for name, mirror in (("a", str(weights.parent)), ("b", server.address)):
        assert fetch(find(gone, digest, name, mirror)) == (cache / name, True)
    with signed_server(weights.parent, "sig=1") as signed:
        url = signed.url("lab.safetensors", "sig=1")
        assert fetch(find(url, digest, "c", None)) == (cache / "c", True)
        bad = agq("checkpoint", "fetch", signed.url("lab.safetensors", "sig=2"), "--sha256", digest)
        assert bad.returncode == 2
        assert "SECRET" not in bad.stderr + bad.stdout
        assert "sig=2" not in bad.stderr + bad.stdout


def test_what_is_not_wanted_is_not_kept(cache, weights, tmp_path):
    text = tmp_path / "text.pt"
    text.write_text("no weights")
    for file, digest, problem in (
        (weights, "0" * 64, r"is not what was asked for: its sha256 is [0-9a-f]{64}, not 0{64}"),
        (
            tmp_path / "text.pt",
            sha256(tmp_path / "text.pt"),
            r"text\.pt is corrupt or no checkpoint",
        ),
    ):
        with pytest.raises(InputError, match=f"{problem}; nothing is kept"):
            fetch(find(str(file), digest, "bad", None))
        assert names(cache) == []


@pytest.mark.parametrize(
    ("asked", "options", "problem"),
    [
        ("nix", (None, None, None), "no checkpoint of this name; there are demo, em"),
        ("http://a/b.pt", (None, None, None), "give --sha256 too"),
        ("http://a/b.pt", ("12", None, None), "is not 64 hexadecimal digits"),
        ("http://a/b.pt", ("0" * 64, "../b", None), "give a name of small letters"),
        ("http://a/b.pt", ("0" * 64, "em", None), "the registry has another checkpoint"),
        ("ftp://a/b.pt", ("0" * 64, "b", None), "No such file"),
    ],
)
def test_what_cannot_be_fetched(cache, asked, options, problem):
    with pytest.raises(InputError, match=problem):
        fetch(find(asked, *options))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[", "is no valid YAML"),
        ("3", "needs a list of checkpoints"),
        ("checkpoints: [{name: A, file: a}]", "checkpoints.0.name"),
        ("checkpoints: [{name: a}]", "needs a url, or a file of the package"),
        ("checkpoints: [{name: a, url: a}]", "a url needs the sha256"),
        ("checkpoints: [{name: a, file: a}]", "file is of the package; give a url"),
    ],
)
def test_registries_that_are_wrong(tmp_path, monkeypatch, text, problem):
    monkeypatch.setenv("AGQ_REGISTRY", str(tmp_path / "registry.yaml"))
    with pytest.raises(InputError, match=r"AGQ_REGISTRY.*registry\.yaml.*cannot be read"):
        known()
    (tmp_path / "registry.yaml").write_text(text)
    with pytest.raises(InputError, match=problem):
        known()
