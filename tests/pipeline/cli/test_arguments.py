"""Volumes as users name them on a command line."""

import socket
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from agq.pipeline.cli.arguments import open_location
from tests.helpers.runs import write_volume


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


class _Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def test_colons_of_an_ipv6_host_begin_no_dataset(tmp_path):
    write_volume(tmp_path / "in.zarr", "truth", np.ones((2, 3, 4), np.uint8))
    try:
        server = _Server(("::1", 0), partial(_Quiet, directory=str(tmp_path)))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            for user in ("", "user@", "user:a::b@"):
                url = f"http://{user}[::1]:{server.server_port}/in.zarr"
                for place in (f"{url}::truth", f"{url}/truth"):
                    assert open_location(place, "labels", None).shape == (2, 3, 4)
        finally:
            server.shutdown()
            thread.join()
