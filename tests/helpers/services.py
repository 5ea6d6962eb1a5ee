"""Servers that tests talk to, as processes of their own: they can be stopped, killed and restarted.

The MongoDB-wire server is SecantusDB from an environment of its own::

    python3 -m venv .venv-services
    .venv-services/bin/pip install -r tests/requirements-services.txt
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from tests.helpers import ROOT

SERVER = ROOT / ".venv-services" / "bin" / "secantusd-py"
MISSING = (
    "no MongoDB-wire server: run `python3 -m venv .venv-services && "
    ".venv-services/bin/pip install -r tests/requirements-services.txt`, or set AGQ_TEST_MONGO_URI"
)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class MongoServer:
    """One server over one folder; the port stays the same over restarts."""

    def __init__(self, folder: Path, *, auth: bool = False, options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.auth = auth
        self.options = options
        self.query = ""
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/" + (self.query and f"?{self.query}")

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [str(SERVER), "--host", "127.0.0.1", "--port", str(self.port), "--standalone"]
        command += ["--storage-path", str(self.folder / "db"), *(["--auth"] if self.auth else [])]
        command += self.options
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            # An answer, not only an open port: a signal sent before that can get lost.
            with contextlib.suppress(PyMongoError), self.client() as client:
                client.admin.command("ping")
                return
        raise RuntimeError((self.folder / "server.log").read_text()[-2000:])

    def client(self) -> MongoClient:
        return MongoClient(self.uri, serverSelectionTimeoutMS=1000)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def add_user(self, user: str, password: str, roles: Sequence[Any] = ("root",)) -> None:
        with self.client() as client:
            client.admin.command("createUser", user, pwd=password, roles=list(roles))

    def uri_of(self, user: str, password: str) -> str:
        """URI with a user; their password may hold any sign."""
        return f"mongodb://{user}:{quote(password, safe='')}@127.0.0.1:{self.port}/"


@contextlib.contextmanager
def running(server: MongoServer) -> Iterator[MongoServer]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def mongo_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a server that stays up; AGQ_TEST_MONGO_URI names a real one instead."""
    given = os.environ.get("AGQ_TEST_MONGO_URI")
    if given:
        yield given
        return
    if not SERVER.exists():
        pytest.skip(MISSING)
    with running(MongoServer(tmp_path_factory.mktemp("mongo"))) as server:
        yield server.uri


@pytest.fixture
def mongo_server(tmp_path: Path) -> Iterator[MongoServer]:
    """Server of one test, which may stop, kill and restart it."""
    if not SERVER.exists():
        pytest.skip(MISSING)
    with running(MongoServer(tmp_path / "mongo")) as server:
        yield server
