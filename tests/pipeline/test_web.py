"""What strangers can do to a web server of agq: nothing that a good client notices."""

import asyncio
import json
import queue
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import tornado.netutil
import tornado.web

from agq.blockwise.blocks.grid import BlockGrid
from agq.pipeline import web
from agq.pipeline.folder import RunFolder
from tests.helpers.runs import ROOT, command, environment

FILES = 256
"""Files that the server may open; it must keep some of them for itself."""


class Page:
    """A page that a process of its own serves, asked over plain sockets."""

    def __init__(self, process: "subprocess.Popen[str]", errors: Path) -> None:
        assert process.stdout is not None
        self.process, self.errors = process, errors
        address = process.stdout.readline()
        self.port = int(re.search(r":(\d+)/", address)[1])  # type: ignore[index]
        self.token = address.strip().partition("token=")[2]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def answer(self, request: bytes) -> bytes:
        """Return what a request gets until the connection is closed or its answer is whole."""
        with self.connect() as link:
            link.sendall(request)
            got = b""
            with suppress(ConnectionResetError):
                while piece := link.recv(1 << 16):
                    got += piece
        return got

    def runs(self) -> list[str]:
        """Return the names of the runs, as a browser that knows the token gets them; or nothing."""
        head = f"GET /api/runs?token={self.token} HTTP/1.1\r\nHost: localhost\r\n"
        got = self.answer(head.encode() + b"Connection: close\r\n\r\n")
        if not got:
            return []
        assert got.startswith(b"HTTP/1.1 200 "), got
        return [line["name"] for line in json.loads(got.partition(b"\r\n\r\n")[2])]

    def memory(self) -> int:
        """Return the most MiB that the process has held."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) >> 10  # type: ignore[index]

    def open_files(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())


@contextmanager
def _served(tmp_path: Path) -> Iterator[Page]:
    run = RunFolder(tmp_path / "run")
    grid = BlockGrid((4, 20, 20), (30, 6, 6), (4, 10, 10))
    with run.lock():
        config = {"run_dir": str(run.path), "input": {"raw": {"path": "nowhere.zarr"}}}
        run.create(config, {"grid": grid.to_dict()})
    errors = tmp_path / "errors"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            command("dashboard", run.path, "--port", 0),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(),
            cwd=ROOT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES)),
        )
    with process:
        try:
            yield Page(process, errors)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with _served(tmp_path_factory.mktemp("served")) as found:
        assert found.runs() == ["run"]
        yield found
        assert found.process.poll() is None
        assert found.runs() == ["run"]
        assert found.errors.read_text() == ""


def _large(token: str) -> list[bytes]:
    """Return the beginnings of requests whose bodies are too large."""
    address = f"POST /api/runs?token={token} HTTP/1.1\r\nHost: localhost\r\n".encode()
    return [
        address + b"Content-Length: 100000000\r\n\r\n",
        address + b"Content-Length: 65537\r\n\r\n",
        address + b"Transfer-Encoding: chunked\r\n\r\n",
        address + b"Expect: 100-continue\r\nContent-Length: 100000000\r\n\r\n",
        b"GET /" + b"x" * 10**8,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 10**8,
    ]


@pytest.mark.parametrize("known", [False, True])
def test_large_bodies_are_refused_unread(page: Page, known: bool) -> None:
    before = page.memory()
    chunk = b"%x\r\n" % 10**6 + b"x" * 10**6 + b"\r\n"
    for begin in _large(page.token if known else "wrong"):
        body = chunk if b"chunked" in begin else b"x" * 10**6
        with page.connect() as link:
            sent = 0
            with suppress(OSError):
                link.sendall(begin)
                for _ in range(100):
                    link.sendall(body)
                    sent += len(body)
            # What the buffers of two sockets hold is sent before the refusal is noticed.
            assert sent < 32 << 20
    assert page.runs() == ["run"]
    assert page.memory() - before < 16


def test_a_body_within_the_limit_is_only_not_wanted(page: Page) -> None:
    head = f"POST /api/runs?token={page.token} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    got = page.answer(head.encode() + b"Content-Length: 65536\r\n\r\n" + b"x" * 65536)
    assert got.startswith(b"HTTP/1.1 405 ")


def test_a_thousand_idle_or_slow_connections_keep_nobody_out(page: Page) -> None:
    """Each sends nothing, or a part of a request; those that are closed are opened again."""
    stop, links = threading.Event(), []
    beginnings = (b"", b"G", b"GET / HTTP/1.1\r\nHost: localhost\r\n")
    with ExitStack() as stack:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))

        def flood() -> None:
            for k in range(1000):
                if stop.is_set():
                    return
                with suppress(OSError):
                    link = page.connect()
                    links.append(stack.enter_context(link))
                    link.sendall(beginnings[k % 3])

        attacker = threading.Thread(target=flood)
        attacker.start()
        stack.callback(attacker.join)
        stack.callback(stop.set)
        while attacker.is_alive():
            # Where this process stops between its connection and its request, others may push it
            # out before it has said who it is.
            assert any(page.runs() == ["run"] for _ in range(5))
            time.sleep(0.05)
        assert len(links) > 900
        assert page.runs() == ["run"]
        assert page.open_files() < FILES // 2
        assert page.memory() < 300


MULTIPART = (
    b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
    b"Content-Type: multipart/form-data; boundary=\r\n\r\nxx"
)
BAD = [
    b"\r\n\r\n",
    b"\0\xff\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\nHost: [::1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost:999999999999\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nCookie: \xe9=\xff; agq=;;=\r\n\r\n",
    b"GET /?"
    + b"&".join(b"a=%d" % k for k in range(2000))
    + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /?token=%ff%00%zz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /%2e%2e/run.json HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /page.js HTTP/1.1\r\nHost: localhost\r\nRange: bytes=9-2\r\n\r\n",
    b"GET /page.css%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"HEAD /page.js HTTP/1.1\r\nHost: elsewhere\r\n\r\n",
    b"POST /page.js" + MULTIPART,
    b"GET /page.js" + MULTIPART,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01",
]


@pytest.mark.parametrize("request_bytes", BAD, ids=lambda b: repr(b[:30]))
def test_bad_requests_get_a_refusal_and_no_traceback(page: Page, request_bytes: bytes) -> None:
    with page.connect() as link:
        link.sendall(request_bytes)
        link.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            assert b"run.json" not in link.recv(1 << 16)


def test_requests_that_do_not_arrive_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_REQUEST_S", 0.2)
    known = b"POST /?token=x HTTP/1.1\r\nHost: localhost\r\n"
    beginnings = [b"", b"GET / HT", known, known + b"Content-Length: 9\r\n\r\nxx"]
    with _in_thread() as port, ExitStack() as stack:
        links = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            for _ in beginnings
        ]
        for link, begin in zip(links, beginnings, strict=True):
            link.sendall(begin)
        for link in links:
            # A byte now and then does not help.
            with suppress(ConnectionError):
                link.sendall(b"x")
                assert link.recv(100) == b""


_FULL = """
import asyncio, resource, socket, sys
import tornado.netutil, tornado.web
from agq.pipeline.web import BoundedServer

async def main():
    server = BoundedServer(
        tornado.web.Application(log_function=print), names=None, knows=lambda request: True
    )
    (listening,) = tornado.netutil.bind_sockets(0, "127.0.0.1", family=socket.AF_INET)
    server.add_sockets([listening])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    reader = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    print(listening.getsockname()[1], flush=True)
    await reader
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await asyncio.sleep(30)

asyncio.run(main())
"""


def test_where_no_file_can_be_opened_connections_wait(tmp_path: Path) -> None:
    with (tmp_path / "errors").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _FULL],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(),
        )
    with process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            port = int(process.stdout.readline())
            with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
                link.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
                time.sleep(0.2)
                process.stdin.close()
                assert link.recv(100).startswith(b"HTTP/1.1 404 ")
        finally:
            process.kill()
    assert (tmp_path / "errors").read_text() == ""


@contextmanager
def _in_thread() -> Iterator[int]:
    """Serve an application that answers nothing but errors; yield the port."""
    ready: queue.Queue[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def serve() -> None:
        server = web.BoundedServer(
            tornado.web.Application(log_function=print),
            names=None,
            knows=lambda request: "token" in request.query_arguments,
        )
        (listening,) = tornado.netutil.bind_sockets(0, "127.0.0.1")
        server.add_sockets([listening])
        end = asyncio.Event()
        ready.put((listening.getsockname()[1], asyncio.get_running_loop(), end))
        await end.wait()
        server.stop()
        await server.close_all_connections()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    port, loop, end = ready.get(timeout=20)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(20)
