"""A real web server that hears messages, and answers as a test wants."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

PATH = "/services/T0000/B0000/abcdefghijklmnopqrstuvwx"
"""Of a webhook: what many chat programs give out, a secret without user or query."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: "Hook"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append((self.path, json.loads(body), self.headers["Authorization"]))
        answer = self.server.answer
        if answer == "hang":
            self.server.over.wait(20)
        elif answer == "drip":
            while not self.server.over.wait(0.1):
                self.wfile.write(b"H")
        elif answer == 302:
            self.send_response(302)
            self.send_header("Location", self.server.url + "/elsewhere")
            self.end_headers()
        elif answer == "cut":
            self.connection.close()
        else:
            self.send_response(int(answer))
            self.end_headers()

    do_GET = do_POST  # noqa: N815 - a redirect that is followed

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # its client has gone
            super().handle()


class Hook(http.server.ThreadingHTTPServer):
    """The server: `answer` is a status, or how it misbehaves; `heard` is what came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: int | str = 200
        self.heard: list[tuple[str, dict[str, Any], str | None]] = []
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.address = self.url + PATH

    def events(self) -> list[str]:
        return [message["event"] for _, message, _ in self.heard]

    def wait_for(self, *events: str, seconds: float = 20) -> None:
        until = time.monotonic() + seconds
        while self.events() != [*events]:
            assert time.monotonic() < until, self.events()
            time.sleep(0.02)


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()
