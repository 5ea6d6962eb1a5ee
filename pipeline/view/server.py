"""Neuroglancer's web server within the bounds of `agq.pipeline.web`.

Every address of a viewer has its random token in it, and of its volumes too. Neuroglancer looks for
it only after it has read a body, of up to a gigabyte, and the numbers in an address; and it answers
under any host name.
"""

import re
import socket
from pathlib import Path
from typing import Any

import neuroglancer
import tornado.httputil
import tornado.web

from agq.errors import InputError
from agq.pipeline.web import BoundedServer, host_names

_MAX_BODY = 64 << 20
"""Bytes of a body: a browser sends its screenshots, and it knows the token."""


def require_server(host: str, port: int) -> None:
    """Start the server of all viewers of this process, unless it runs.

    Raises
    ------
    InputError
        If the address cannot be used.
    """
    if neuroglancer.server.is_server_running():
        return
    try:
        # Tried first: where it fails, Tornado leaves its socket open.
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
        neuroglancer.server.global_server = _Server(bind_address=host, bind_port=port)
    except (OSError, OverflowError) as error:
        raise InputError(f"--port {port} cannot be used ({error}); try another") from error


def serve_folder(viewer: Any, folder: Path) -> str | None:
    """Serve the files of a folder to those who know the viewer; return its address.

    None where a program started a server of neuroglancer's before: it has no files to give.
    """
    server = neuroglancer.server.global_server
    if not isinstance(server, _Server):
        return None
    server.folders[viewer.token] = folder
    return f"{server.server_url}/folder/{viewer.token}"


class _Folder(tornado.web.StaticFileHandler):
    """Files of the folder of a viewer; neuroglancer asks for ranges of them."""

    def initialize(self, server: Any) -> None:  # type: ignore[override]
        super().initialize(path="")
        self._server = server

    async def get(self, token: str, path: str, include_body: bool = True) -> None:  # type: ignore[override]
        if token not in self._server.viewers or token not in self._server.folders:
            raise tornado.web.HTTPError(404)
        self.root = str(self._server.folders[token])
        await super().get(path, include_body)

    def set_extra_headers(self, path: str) -> None:
        # The page may have been opened under another name of this machine.
        self.set_header("Access-Control-Allow-Origin", "*")


class _Server(neuroglancer.server.Server):
    """Refuses a request that names no viewer before anything else."""

    def _attempt_to_start_server(self) -> None:
        super()._attempt_to_start_server()
        self.folders: dict[str, Path] = {}
        self.app.add_handlers(".*", [(r"/folder/([^/]+)/(.+)", _Folder, {"server": self})])
        unbounded = self.http_server
        listening = [one.dup() for one in unbounded._sockets.values()]
        unbounded.stop()
        self.http_server: Any = BoundedServer(
            self.app,
            names=host_names(self._bind_address),
            knows=self._names_a_viewer,
            max_body=_MAX_BODY,
        )
        self.http_server.add_sockets(listening)

    def _names_a_viewer(self, request: tornado.httputil.HTTPServerRequest) -> bool:
        # /v/TOKEN/..., and /neuroglancer/info/TOKEN.VOLUME of a volume.
        return any(word in self.viewers for word in re.split(r"[/.]", request.path))
