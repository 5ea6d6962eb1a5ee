"""What others can get from the server of a viewer without its token: nothing."""

import gc
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from agq.pipeline.view.layers import volume_layer

neuroglancer = pytest.importorskip("neuroglancer", reason="the extra `view` is not installed")
viewer_module = pytest.importorskip("agq.pipeline.view.viewer")


@pytest.fixture
def viewer(tmp_path: Path) -> Iterator[Any]:
    array = create_array(
        tmp_path / "in.zarr",
        "raw",
        shape=(4, 8, 8),
        chunks=(4, 8, 8),
        dtype=np.uint8,
        voxel_size=(30, 6, 6),
    )
    array[...] = 7
    layer = volume_layer("raw", open_volume(tmp_path / "in.zarr", "raw"), "image")
    yield viewer_module.build_viewer([layer])
    neuroglancer.stop()


def ask(
    viewer: Any, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    """Return status, body and headers of an answer; status 0 if the connection was closed."""
    link = http.client.HTTPConnection("127.0.0.1", urlsplit(str(viewer)).port, timeout=20)
    try:
        link.request(method, path, body, headers)
        answer = link.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    except ConnectionError:
        return 0, b"", {}
    finally:
        link.close()


def volume_of(viewer: Any) -> str:
    url = viewer.state.to_json()["layers"][0]["source"][0]["url"]
    return str(url).removeprefix("python://volume/")


def paths_of(token: str, volume: str) -> list[tuple[str, str]]:
    return [
        ("GET", f"/v/{token}/"),
        ("GET", f"/v/{token}/main.bundle.js"),
        ("GET", f"/neuroglancer/info/{volume}"),
        ("GET", f"/neuroglancer/skeletoninfo/{volume}"),
        ("GET", f"/neuroglancer/npz/{volume}/1,1,1/0,0,0/2,2,2"),
        ("GET", f"/neuroglancer/npz/{volume}/1,1,1/{'9' * 40}/1"),
        ("GET", f"/neuroglancer/mesh/{volume}/7"),
        ("GET", f"/neuroglancer/skeleton/{volume}/7"),
        ("GET", f"/events/{token}?c=x&gc=&gs="),
        ("POST", f"/state/{token}"),
        ("POST", f"/action/{token}"),
        ("POST", f"/credentials/{token}"),
        ("POST", f"/volume_response/{token}/1/info"),
        ("GET", "/"),
        ("GET", "/v//"),
    ]


def test_without_the_token_everything_is_refused(
    viewer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for method, path in paths_of("0" * 40, "0" * 40 + "." + "0" * 40):
        assert ask(viewer, path, method)[0] == 403
    # The token of a viewer that is gone, and the part of an address behind the token alone.
    gone = neuroglancer.Viewer()
    token = gone.token
    assert ask(viewer, f"/v/{token}/")[0] == 200
    del gone
    gc.collect()
    assert ask(viewer, f"/v/{token}/")[0] == 403
    second = volume_of(viewer).partition(".")[2]
    assert ask(viewer, f"/neuroglancer/info/{second}")[0] == 403
    assert ask(viewer, f"/neuroglancer/info/?{viewer.token}")[0] == 403
    assert caplog.records == []


def test_with_the_token_it_answers_its_own_names_and_origin_alone(viewer: Any) -> None:
    volume = volume_of(viewer)
    for host in ("127.0.0.1:1", "localhost:8766", "[::1]:80"):
        status, body, headers = ask(viewer, f"/neuroglancer/info/{volume}", Host=host)
        assert (status, json.loads(body)["shape"]) == (200, [4, 8, 8])
        assert not any(name.lower().startswith("access-control") for name in headers)
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "127.0.0.2"):
        for method, path in paths_of(viewer.token, volume):
            assert ask(viewer, path, method, Host=host)[0] == 403


def test_no_credentials_of_the_user_are_given_out(viewer: Any) -> None:
    body = json.dumps({"key": "google-brainmaps", "parameters": None}).encode()
    assert ask(viewer, f"/credentials/{viewer.token}", "POST", body)[0] == 403


def test_large_bodies_are_not_read(viewer: Any) -> None:
    def post(token: str) -> None:
        with suppress(ConnectionError):
            assert ask(viewer, f"/state/{token}", "POST", bytes(10**8))[0] in (0, 400, 403)

    strangers = [threading.Thread(target=post, args=("0" * 40,)) for _ in range(3)]
    for thread in strangers:
        thread.start()
    post(viewer.token)
    for thread in strangers:
        thread.join()
    assert ask(viewer, f"/v/{viewer.token}/")[0] == 200


def test_a_port_that_is_taken_leaves_nothing_behind(viewer: Any) -> None:
    port = urlsplit(str(viewer)).port
    neuroglancer.stop()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        before = threading.active_count()
        with pytest.raises(InputError, match=f"--port {taken.getsockname()[1]} cannot be used"):
            viewer_module.require_server("127.0.0.1", taken.getsockname()[1])
        assert threading.active_count() == before
        assert not neuroglancer.server.is_server_running()
    viewer_module.require_server("127.0.0.1", port)
    assert urlsplit(neuroglancer.server.get_server_url()).port == port
