"""The web server of the page: static files, JSON and block maps, read only.

dask and neuroglancer need Tornado anyway, so the page adds nothing to install and nothing to build.
It is one HTML, one CSS and one JavaScript file that load nothing from other hosts, so it works on a
login node without internet. Names, paths and errors travel as JSON and become text nodes in the
browser, never HTML.
"""

import asyncio
import hmac
import json
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

import tornado.httpserver
import tornado.netutil
import tornado.web

from agq.blockwise.volumes.triples import Triple, triple
from agq.errors import InputError
from agq.pipeline.dashboard.runs import Runs

_FILES: Final = Path(__file__).parent
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_BY: Final = ("state", "seconds", "labels", "dropped")

Viewer = Callable[[Path, str, Triple], str]
"""Makes a viewer of a run folder, bound to a host, at a voxel, and returns its address."""


class Dashboard:
    """A running server; open its `address`.

    Parameters
    ----------
    host, port
        Address to listen on; port 0 takes any free one.
    token
        Require a token on the loopback interface too; other interfaces always require it.
    viewer
        Makes the viewer behind a link; without it, links show the command instead.

    Raises
    ------
    InputError
        If the address cannot be used.
    """

    def __init__(
        self,
        runs: Runs,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: bool = False,
        viewer: Viewer | None = None,
    ) -> None:
        self.host = host
        local = host in _LOOPBACK
        self.token = secrets.token_urlsafe(24) if token or not local else None
        try:
            sockets = tornado.netutil.bind_sockets(port, host)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"--host {host} --port {port} cannot be used ({error}); try --port 0"
            ) from None
        self.port = int(sockets[0].getsockname()[1])
        shared = {"dashboard": self}
        self.runs = runs
        self.viewer = viewer
        # Another site could let its own name point here; its requests carry that name.
        self.names = {*_LOOPBACK, "[::1]"} if local else None
        application = tornado.web.Application(
            [
                (r"/", _Page, shared),
                (r"/api/runs", _Listing, shared),
                (r"/api/run/([0-9A-Za-z_-]+)", _Overview, shared),
                (r"/api/run/([0-9A-Za-z_-]+)/map", _Map, shared),
                (r"/api/run/([0-9A-Za-z_-]+)/block", _Block, shared),
                (r"/api/run/([0-9A-Za-z_-]+)/log", _Log, shared),
                (r"/view/([0-9A-Za-z_-]+)", _View, shared),
                (r"/(page\.js|page\.css)", _Static, shared | {"path": str(_FILES)}),
            ],
            # Not logged: addresses may hold the token.
            log_function=lambda handler: None,
            compress_response=True,
        )
        self._server = tornado.httpserver.HTTPServer(application)
        self._server.add_sockets(sockets)

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


class _Guarded(tornado.web.RequestHandler):
    """Checks host name and token before anything else."""

    def initialize(self, dashboard: Dashboard, **_: Any) -> None:
        self.dashboard = dashboard

    def set_default_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        names = self.dashboard.names
        if names is not None and self.request.host_name not in names:
            raise tornado.web.HTTPError(403, reason="Wrong host name")
        token = self.dashboard.token
        if token is None:
            return
        cookie = f"agq-{self.dashboard.port}"
        given = self.get_query_argument("token", None)
        if given is not None and hmac.compare_digest(given.encode(), token.encode()):
            # From now on the cookie is enough, and the address bar no longer shows the token.
            self.set_cookie(cookie, token, httponly=True, samesite="Strict")
            return
        kept = self.get_cookie(cookie) or ""
        if not hmac.compare_digest(kept.encode(), token.encode()):
            raise tornado.web.HTTPError(403, reason="Token missing or wrong")

    def write_error(self, status_code: int, **_: Any) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{status_code}: {self._reason}\n")

    async def answer(self, work: Callable[[], Any]) -> Any:
        """Run `work` in a thread; answer an input error with a plain 404."""
        try:
            return await asyncio.get_running_loop().run_in_executor(None, work)
        except InputError as error:
            self.set_status(404)
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            await self.finish(f"{error}\n")
            raise tornado.web.Finish from None

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


class _Page(_Guarded):
    async def get(self) -> None:
        if self.get_query_argument("token", None) is not None:
            rest = {k: v[-1].decode() for k, v in self.request.query_arguments.items()}
            del rest["token"]
            self.redirect("/?" + urlencode(rest) if rest else "/")
            return
        self.set_header("Content-Type", "text/html; charset=utf-8")
        await self.finish((_FILES / "page.html").read_bytes())


class _Static(tornado.web.StaticFileHandler):
    """Style and script of the page; they hold no data and need no token."""

    def initialize(self, path: str, **_: Any) -> None:  # type: ignore[override]
        super().initialize(path)

    def set_extra_headers(self, path: str) -> None:
        for name, value in _HEADERS.items():
            self.set_header(name, value)


class _Listing(_Guarded):
    async def get(self) -> None:
        await self.send_json(self.dashboard.runs.listing)


class _Overview(_Guarded):
    async def get(self, key: str) -> None:
        await self.send_json(lambda: self.dashboard.runs.view(key).overview())


class _Map(_Guarded):
    async def get(self, key: str) -> None:
        by, axis = self.get_query_argument("by"), self.number("axis", 2)
        index = self.number("index", 2**40)
        if by not in _BY:
            raise tornado.web.HTTPError(400, reason="Bad by")
        image = await self.answer(
            lambda: self.dashboard.runs.view(key).image(by, axis, index)  # type: ignore[arg-type]
        )
        described = {
            "shape": image.cells.shape,
            "step": image.step,
            "blocks": image.blocks,
            "low": image.low,
            "high": image.high,
        }
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("X-Map", json.dumps(described))
        await self.finish(image.cells.tobytes())


class _Block(_Guarded):
    async def get(self, key: str) -> None:
        at, axis = self.position("at"), self.number("axis", 2)
        step = max(1, self.number("step", 2**20))
        await self.send_json(lambda: self.dashboard.runs.view(key).block(at, axis, step))


class _Log(_Guarded):
    async def get(self, key: str) -> None:
        worker = self.get_query_argument("worker")
        text = await self.answer(lambda: self.dashboard.runs.view(key).log(worker))
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        await self.finish(text or "this machine has no log of that name\n")


class _View(_Guarded):
    async def get(self, key: str) -> None:
        at, make = self.position("at"), self.dashboard.viewer
        if make is None:
            raise tornado.web.HTTPError(404, reason="No viewer here: run agq view")
        host = self.dashboard.host
        address = await self.answer(lambda: make(self.dashboard.runs.view(key).path, host, at))
        # The browser may reach this machine by another name (a tunnel, a cluster's login node).
        place = urlsplit(address)
        self.redirect(place._replace(netloc=f"{self.request.host_name}:{place.port}").geturl())
