"""A web server that gives files only to those who say a password and a signature."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

USER, PASSWORD = "user", "RAW+SECRET/1"
_PASSWORD = "RAW%2BSECRET%2F1"


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        signed = urlsplit(self.path).query in self.server.queries
        if not signed or self.headers.get("Authorization") != f"Basic {pair}":
            self.send_error(403)
        else:
            super().do_GET()

    def send_head(self) -> Any:
        if Path(self.translate_path(self.path)).is_dir():
            self.send_error(404)
            return None
        return super().send_head()

    def log_message(self, format: str, *args: Any) -> None: ...


class SignedServer(ThreadingHTTPServer):
    """Serves a folder.

    Attributes
    ----------
    queries
        Those that are signed at present.
    """

    request_queue_size = 64
    queries: set[str]

    def url(self, name: str, query: str) -> str:
        return f"http://{USER}:{_PASSWORD}@127.0.0.1:{self.server_port}/{name}?{query}"

    def shown(self, name: str) -> str:
        return f"http://{USER}:***@127.0.0.1:{self.server_port}/{name}?***"


@contextmanager
def signed_server(folder: Path, *queries: str) -> Iterator[SignedServer]:
    with SignedServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        server.queries = set(queries)
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def forms(query: str) -> list[str]:
    """Return what must be in no file, output or command line: both secrets in all their forms."""
    pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    return [PASSWORD, _PASSWORD, pair, query, query.partition("=")[2]]
