"""The web server of the page: static files, JSON and block maps, read only.

dask and neuroglancer need Tornado anyway, so the page adds nothing to install and nothing to build.
It is one HTML, one CSS and one JavaScript file that load nothing from other hosts, so it works on a
login node without internet. Names, paths and errors travel as JSON and become text nodes in the
browser, never HTML. Who may ask is decided in `agq.pipeline.web`, before a handler sees a request.
"""

import asyncio
import hmac
import json
import logging
import secrets
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

import tornado.httputil
import tornado.netutil
import tornado.web

from agq.blockwise.volumes.triples import Triple, triple
from agq.errors import InputError, machine_fault
from agq.pipeline.dashboard.runs import Runs
from agq.pipeline.suspects.listed import MOST
from agq.pipeline.web import LOOPBACK, BoundedServer, host_names

_logger = logging.getLogger(__name__)
_FILES: Final = Path(__file__).parent
_STATIC: Final = ("page.js", "page.css")
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_BACKLOG: Final = 1024
_BY: Final = ("state", "seconds", "labels", "dropped")

Viewer = Callable[[Path, str, Triple, tuple[int, ...]], str]
"""Makes a viewer of a run folder, bound to a host, at a voxel, on some segments, and returns its
address."""


class Dashboard:
    """A running server; open its `address`.

    Parameters
    ----------
    host, port
        Address to listen on; port 0 takes any free one.
    token
        Off: whoever reaches the loopback interface, every user of the machine, may read.
    viewer
        Makes the viewer behind a link; without it, links show the command instead.

    Raises
    ------
    InputError
        If the address cannot be used, or there is to be no token on another interface.
    """

    def __init__(
        self,
        runs: Runs,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: bool = True,
        viewer: Viewer | None = None,
    ) -> None:
        if not token and host not in LOOPBACK:
            raise InputError(
                f"--no-token --host {host}: without a token only the loopback interface may be "
                "listened on; leave out one of the two"
            )
        self.host = host
        self.token = secrets.token_urlsafe(24) if token else None
        try:
            sockets = tornado.netutil.bind_sockets(port, host, backlog=_BACKLOG)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"--host {host} --port {port} cannot be used ({error}); try --port 0"
            ) from None
        self.port = int(sockets[0].getsockname()[1])
        shared = {"dashboard": self}
        self.runs = runs
        self.viewer = viewer
        self.told: set[tuple[str, int]] = set()
        application = tornado.web.Application(
            [
                (r"/", _Page, shared),
                (r"/api/runs", _Listing, shared),
                (r"/api/run/([0-9A-Za-z_-]+)", _Overview, shared),
                (r"/api/run/([0-9A-Za-z_-]+)/map", _Map, shared),
                (r"/api/run/([0-9A-Za-z_-]+)/block", _Block, shared),
                (r"/api/run/([0-9A-Za-z_-]+)/log", _Log, shared),
                (r"/api/run/([0-9A-Za-z_-]+)/picture", _Picture, shared),
                (r"/api/run/([0-9A-Za-z_-]+)/suspects", _Suspects, shared),
                (r"/api/run/([0-9A-Za-z_-]+)/suspect", _SuspectPicture, shared),
                (r"/view/([0-9A-Za-z_-]+)", _View, shared),
                *((f"/({name})", _Static, shared | {"path": str(_FILES)}) for name in _STATIC),
            ],
            # Not logged: addresses may hold the token.
            log_function=lambda handler: None,
            compress_response=True,
        )
        self._server = BoundedServer(
            application,
            names=host_names(host),
            knows=self._knows,
            # Style and script of the page hold no data.
            public=frozenset(f"/{name}" for name in _STATIC),
        )
        self._server.add_sockets(sockets)

    @property
    def cookie(self) -> str:
        """Name of the cookie that stands for the token."""
        return f"agq-{self.port}"

    def _knows(self, request: tornado.httputil.HTTPServerRequest) -> bool:
        if self.token is None:
            return True
        given = request.query_arguments.get("token", [])[-1:]
        if self.cookie in request.cookies:
            given.append(request.cookies[self.cookie].value.encode())
        return any(hmac.compare_digest(text, self.token.encode()) for text in given)

    @property
    def address(self) -> str:
        """The address to open in a browser."""
        host = socket.getfqdn() if self.host in ("0.0.0.0", "::", "") else self.host  # noqa: S104
        shown = f"[{host}]" if ":" in host else host
        query = "" if self.token is None else "?" + urlencode({"token": self.token})
        return f"http://{shown}:{self.port}/{query}"

    def close(self) -> None:
        """Stop listening."""
        self._server.stop()


async def serve(runs: Runs, *, announce: Callable[[Dashboard], None], **options: Any) -> None:
    """Serve until cancelled; `announce` is called when the server listens.

    Other parameters are those of `Dashboard`.
    """
    dashboard = Dashboard(runs, **options)
    announce(dashboard)
    try:
        await asyncio.Event().wait()
    finally:
        dashboard.close()


class _Handler(tornado.web.RequestHandler):
    """Answers a request that the server has let in."""

    def initialize(self, dashboard: Dashboard, **_: Any) -> None:
        self.dashboard = dashboard

    def set_default_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        token = self.dashboard.token
        if token is not None and "token" in self.request.query_arguments:
            # From now on the cookie is enough, and the address bar no longer shows the token.
            self.set_cookie(self.dashboard.cookie, token, httponly=True, samesite="Strict")

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        # A browser asks every two seconds: each place that fails is told once.
        place = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(tb)][-1:]
        if isinstance(value, tornado.web.HTTPError) or not place or place[0] in self.dashboard.told:
            return
        self.dashboard.told.add(place[0])
        _logger.error("the page cannot answer", exc_info=(typ, value, tb))

    def write_error(self, status_code: int, **_: Any) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{status_code}: {self._reason}\n")

    async def answer(self, work: Callable[[], Any]) -> Any:
        """Run `work` in a thread; answer what is wrong with the run with a plain 404."""
        try:
            return await asyncio.get_running_loop().run_in_executor(None, work)
        except InputError as error:
            told = str(error)
        except OSError as error:
            told = machine_fault(error) or str(error)
        self.set_status(404)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        await self.finish(f"{told}\n")
        raise tornado.web.Finish

    def number(self, name: str, most: int) -> int:
        try:
            value = int(self.get_query_argument(name))
        except ValueError:
            value = -1
        if not 0 <= value <= most:
            raise tornado.web.HTTPError(400, reason=f"Bad {name}")
        return value

    def position(self, name: str) -> Triple:
        try:
            return triple(self.get_query_argument(name).split(","))
        except ValueError:
            raise tornado.web.HTTPError(400, reason=f"Bad {name}") from None

    async def send_json(self, work: Callable[[], Any]) -> None:
        # Browsers refuse NaN.
        data = await self.answer(lambda: json.dumps(work(), allow_nan=False, default=str))
        self.set_header("Content-Type", "application/json; charset=utf-8")
        await self.finish(data)


class _Page(_Handler):
    async def get(self) -> None:
        if self.get_query_argument("token", None) is not None:
            rest = {k: v[-1].decode() for k, v in self.request.query_arguments.items()}
            del rest["token"]
            self.redirect("/?" + urlencode(rest) if rest else "/")
            return
        self.set_header("Content-Type", "text/html; charset=utf-8")
        await self.finish((_FILES / "page.html").read_bytes())


class _Static(tornado.web.StaticFileHandler):
    """Style and script of the page."""

    def initialize(self, path: str, **_: Any) -> None:  # type: ignore[override]
        super().initialize(path)

    def set_extra_headers(self, path: str) -> None:
        for name, value in _HEADERS.items():
            self.set_header(name, value)


class _Listing(_Handler):
    async def get(self) -> None:
        await self.send_json(self.dashboard.runs.listing)


class _Overview(_Handler):
    async def get(self, key: str) -> None:
        await self.send_json(lambda: self.dashboard.runs.view(key).overview())


class _Map(_Handler):
    async def get(self, key: str) -> None:
        by, axis = self.get_query_argument("by"), self.number("axis", 2)
        chosen = self.get_query_argument("index", None) is not None
        index = self.number("index", 2**40) if chosen else None
        if by not in _BY:
            raise tornado.web.HTTPError(400, reason="Bad by")
        image = await self.answer(
            lambda: self.dashboard.runs.view(key).image(by, axis, index)  # type: ignore[arg-type]
        )
        described = {
            "shape": image.cells.shape,
            "step": image.step,
            "blocks": image.blocks,
            "index": image.index,
            "low": image.low,
            "high": image.high,
        }
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("X-Map", json.dumps(described))
        await self.finish(image.cells.tobytes())


class _Block(_Handler):
    async def get(self, key: str) -> None:
        at, axis = self.position("at"), self.number("axis", 2)
        step = max(1, self.number("step", 2**20))
        await self.send_json(lambda: self.dashboard.runs.view(key).block(at, axis, step))


class _Log(_Handler):
    async def get(self, key: str) -> None:
        worker = self.get_query_argument("worker")
        text = await self.answer(lambda: self.dashboard.runs.view(key).log(worker))
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        await self.finish(text or "this machine has no log of that name\n")


class _Picture(_Handler):
    async def get(self, key: str) -> None:
        png = await self.answer(lambda: self.dashboard.runs.view(key).picture())
        if png is None:
            raise tornado.web.HTTPError(404, reason="No picture")
        self.set_header("Content-Type", "image/png")
        await self.finish(png)


class _Suspects(_Handler):
    async def get(self, key: str) -> None:
        await self.send_json(lambda: self.dashboard.runs.view(key).suspects())


class _SuspectPicture(_Handler):
    async def get(self, key: str) -> None:
        rank = self.number("rank", MOST)
        png = await self.answer(lambda: self.dashboard.runs.view(key).suspect(rank))
        if png is None:
            raise tornado.web.HTTPError(404, reason="No picture")
        self.set_header("Content-Type", "image/png")
        await self.finish(png)


class _View(_Handler):
    async def get(self, key: str) -> None:
        at, make = self.position("at"), self.dashboard.viewer
        try:
            segments = tuple(int(n) for n in self.get_query_arguments("segment")[:2])
        except ValueError:
            raise tornado.web.HTTPError(400, reason="Bad segment") from None
        if make is None:
            raise tornado.web.HTTPError(404, reason="No viewer here: run agq view")
        host = self.dashboard.host
        address = await self.answer(
            lambda: make(self.dashboard.runs.view(key).path, host, at, segments)
        )
        # The browser may reach this machine by another name (a tunnel, a cluster's login node).
        place = urlsplit(address)
        self.redirect(place._replace(netloc=f"{self.request.host_name}:{place.port}").geturl())
