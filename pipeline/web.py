"""A web server that strangers cannot fill: other users of the machine can connect to it.

Tornado reads a body of 100 MB before it asks who sends it, waits an hour for a request, and writes
a traceback for each connection that it has no file descriptor for. Here all of that is bounded, and
whoever does not know the secret of the page gets nothing but a refusal, before a body is read.
"""

import asyncio
import errno
import functools
import resource
import socket
from collections.abc import Callable, Iterable
from typing import Any, Final

import tornado.http1connection
import tornado.httpserver
import tornado.httputil
import tornado.iostream

LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")

MAX_BODY: Final = 64 << 10
"""Bytes of a request's body."""

_MAX_HEADER: Final = 16 << 10
_MAX_CONNECTIONS: Final = 128
_ACCEPT_AT_ONCE: Final = 8
_REQUEST_S: Final = 20.0
_PAUSE_S: Final = 1.0
_OF_BODIES: Final = ("Content-Length", "Transfer-Encoding")
_NO_MORE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def host_names(host: str) -> frozenset[str] | None:
    """Return the names by which a browser may ask for a server that listens on `host`.

    Another site could let its own name point to the loopback interface, and its pages would then
    be allowed to read the answers; its requests carry that name. None: any name, because a machine
    of a network has names that it does not know.
    """
    return frozenset({*LOOPBACK, "[::1]"}) if host in LOOPBACK else None


class BoundedServer(tornado.httpserver.HTTPServer):
    """A Tornado server with limits, for an application that answers only those who know a secret.

    No more than 128 connections are open, fewer where the process may open few files. When there
    are more, the oldest of those is closed that has not shown the secret yet: so idle and slow ones
    keep nobody out. A request must arrive within 20 s.

    Parameters
    ----------
    application
        Answers requests.
    names
        Host names by which it may be asked; None for any.
    knows
        Tells whether a request shows the secret.
    public
        Paths that need no secret, asked by GET and without a body.
    max_body
        Bytes of a body at most.
    """

    def initialize(  # type: ignore[override]
        self,
        application: Any,
        *,
        names: frozenset[str] | None,
        knows: Callable[[tornado.httputil.HTTPServerRequest], bool],
        public: frozenset[str] = frozenset(),
        max_body: int = MAX_BODY,
    ) -> None:
        """Take what the constructor was given; Tornado calls this instead of it."""
        super().initialize(
            application,
            idle_connection_timeout=_REQUEST_S,
            body_timeout=_REQUEST_S,
            max_header_size=_MAX_HEADER,
            max_body_size=max_body,
            # The whole of a request, read in pieces of Tornado's size.
            max_buffer_size=_MAX_HEADER + max_body + (64 << 10),
        )
        self._names, self._knows, self._public = names, knows, public
        self._listening: list[socket.socket] = []
        # In the order in which they came, with whether they have not shown the secret.
        self._open: dict[tornado.iostream.IOStream, bool] = {}
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        few = files != resource.RLIM_INFINITY and files < 4 * _MAX_CONNECTIONS
        self._most = max(files // 4, 8) if few else _MAX_CONNECTIONS

    # Connections

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        """Accept connections on sockets that listen; called in the event loop."""
        for listening in sockets:
            listening.setblocking(False)
            self._listening.append(listening)
            self._resume(listening)

    def stop(self) -> None:
        """Stop listening."""
        loop = asyncio.get_running_loop()
        while self._listening:
            listening = self._listening.pop()
            loop.remove_reader(listening)
            listening.close()

    def _resume(self, listening: socket.socket) -> None:
        if listening in self._listening:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        # Few, so that those who are connected are heard before others push them out.
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                connection, address = listening.accept()
            except OSError as error:
                if error.errno in _NO_MORE and not self._close_oldest(strangers_only=True):
                    # Nothing here would give a descriptor back: other parts of the process will.
                    loop = asyncio.get_running_loop()
                    loop.remove_reader(listening)
                    loop.call_later(_PAUSE_S, functools.partial(self._resume, listening))
                return
            if len(self._open) >= self._most:
                self._close_oldest()
            self._handle_connection(connection, address)

    def handle_stream(self, stream: tornado.iostream.IOStream, address: Any) -> None:
        """Serve a new connection."""
        self._open[stream] = True
        super().handle_stream(stream, address)

    def on_close(self, server_conn: object) -> None:
        """Forget a connection that has ended."""
        super().on_close(server_conn)
        self._open.pop(_stream(server_conn), None)

    def _close_oldest(self, *, strangers_only: bool = False) -> bool:
        """Close the oldest connection, of a stranger if possible; tell whether there was one."""
        rest = () if strangers_only else self._open
        oldest = next((s for s, stranger in self._open.items() if stranger), next(iter(rest), None))
        if oldest is None:
            return False
        del self._open[oldest]
        oldest.close()
        return True

    # Requests

    def start_request(
        self, server_conn: object, request_conn: tornado.httputil.HTTPConnection
    ) -> tornado.httputil.HTTPMessageDelegate:
        """Let a request in, or refuse it, when its headers are there."""
        inner = super().start_request(server_conn, request_conn)
        return _Door(self, inner, server_conn, request_conn)

    def refusal(
        self, server_conn: object, request: tornado.httputil.HTTPServerRequest
    ) -> str | None:
        """Say why a request is refused; None lets it in."""
        if self._names is not None and request.host_name not in self._names:
            return "Wrong host name"
        if self._knows(request):
            if (stream := _stream(server_conn)) in self._open:
                self._open[stream] = False
            return None
        plain = request.method == "GET" and not any(name in request.headers for name in _OF_BODIES)
        return None if plain and request.path in self._public else "Token missing or wrong"


def _stream(server_conn: object) -> tornado.iostream.IOStream:
    assert isinstance(server_conn, tornado.http1connection.HTTP1ServerConnection)
    return server_conn.stream


class _Door(tornado.httputil.HTTPMessageDelegate):
    """Refuses a request before its body is read and before any handler sees it."""

    def __init__(
        self,
        server: BoundedServer,
        inner: tornado.httputil.HTTPMessageDelegate,
        server_conn: object,
        request_conn: tornado.httputil.HTTPConnection,
    ) -> None:
        self._server, self._inner = server, inner
        self._server_conn, self._request_conn = server_conn, request_conn

    def headers_received(self, start_line: Any, headers: tornado.httputil.HTTPHeaders) -> Any:
        try:
            request = tornado.httputil.HTTPServerRequest(
                connection=self._request_conn, start_line=start_line, headers=headers
            )
            refusal = self._server.refusal(self._server_conn, request)
        except (ValueError, tornado.httputil.HTTPInputError) as error:
            raise tornado.httputil.HTTPInputError(str(error)) from None
        if refusal is None:
            return self._inner.headers_received(start_line, headers)
        body = f"403: {refusal}\n".encode()
        self._inner = tornado.httputil.HTTPMessageDelegate()
        self._request_conn.write_headers(
            tornado.httputil.ResponseStartLine("HTTP/1.1", 403, refusal),
            tornado.httputil.HTTPHeaders(
                {
                    "Content-Type": "text/plain; charset=utf-8",
                    "Content-Length": str(len(body)),
                    "Connection": "close",
                }
            ),
            # An answer to HEAD has only the headers; Tornado refuses more, with a traceback.
            None if start_line.method == "HEAD" else body,
        )
        # Before the body is read: then Tornado closes the connection instead of reading on.
        self._request_conn.finish()
        return None

    def data_received(self, chunk: bytes) -> Any:
        return self._inner.data_received(chunk)

    def finish(self) -> None:
        self._inner.finish()

    def on_connection_close(self) -> None:
        self._inner.on_connection_close()
