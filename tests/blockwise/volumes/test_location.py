"""Volumes in object stores and on web servers."""

import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from tests.helpers.buckets import Bucket, s3
from tests.helpers.volumes import PLACE, check, ome_group, put, put_n5, put_precomputed, voxels

__all__ = ["s3"]


def test_s3(tmp_path: Path, s3: Bucket) -> None:
    data = voxels((9, 20, 30), "uint16")
    put(tmp_path / "a.zarr", "volumes/raw", data, chunks=(5, 10, 16), **PLACE)
    put(tmp_path / "b.zarr", "raw", data, 2, chunks=(5, 10, 16), **PLACE)
    ome_group(tmp_path / "a.zarr", "img", [data], [[30, 6, 6]], version="0.5")
    put_n5(tmp_path / "c.n5" / "raw", data, (16, 10, 5), resolution=[6, 6, 30])
    put_precomputed(tmp_path / "d", [data], [[6, 6, 30]])
    for name in ("a.zarr", "b.zarr", "c.n5", "d"):
        s3.upload(tmp_path / name, f"deep/{name}")
    for name, dataset in (
        ("a.zarr", "volumes/raw"),
        ("b.zarr", "raw"),
        ("b.zarr/raw", None),
        ("b.zarr", None),
        ("a.zarr", "img"),
        ("c.n5", "raw"),
        ("d", None),
    ):
        volume = open_volume(f"s3://em-data/deep/{name}", dataset)
        np.testing.assert_array_equal(volume.read((1, 2, 3), (9, 19, 28)), data[1:, 2:19, 3:28])
        assert tuple(volume.voxel_size) == (30, 6, 6)
    assert volume.path == "s3://em-data/deep/d"
    check(open_volume("precomputed://s3://em-data/deep/d"), data)
    volume = open_volume("s3://em-data/deep/a.zarr/img/0")
    assert tuple(volume.voxel_size) == (30, 6, 6)
    with pytest.raises(InputError, match=r"no dataset 'raww'; it holds: raw \(9, 20, 30\) <u2"):
        open_volume("s3://em-data/deep/b.zarr", "raww")
    with pytest.raises(InputError, match="no zarr, N5 or precomputed metadata found"):
        open_volume("s3://em-data/deep/nothing.zarr")
    with pytest.raises(InputError, match=r"s3://no-such-bucket/a\.zarr"):
        open_volume("s3://no-such-bucket/a.zarr", "raw")
    pickled = pickle.loads(pickle.dumps(open_volume("s3://em-data/deep/a.zarr", "volumes/raw")))
    np.testing.assert_array_equal(pickled.read((0, 0, 0), (2, 3, 4)), data[:2, :3, :4])


def test_s3_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "do-not-show",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"s3://other/a\.zarr: cannot be read") as caught:
        open_volume("s3://other/a.zarr", "raw")
    assert "do-not-show" not in str(caught.value)
    assert "\n" not in str(caught.value)


class QuietHandler(SimpleHTTPRequestHandler):
    """A web server that does not talk on stderr and gives no listings."""

    def do_GET(self) -> None:
        if self.path.count("/") == 2 and self.path.startswith("/closed/"):
            super().send_error(401)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None: ...

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def send_error(self, code: int, *args: Any) -> None:
        # As buckets do that may not be listed: what is not there is forbidden.
        super().send_error(403 if code == 404 else code, *args)


class QuietServer(ThreadingHTTPServer):
    request_queue_size = 64  # the default of 5 makes parallel reads wait for TCP retries


def test_http(tmp_path: Path) -> None:
    put(tmp_path / "a.zarr", "raw", voxels(), **PLACE)
    put(tmp_path / "b.zarr", "raw", voxels(), 2, **PLACE)
    put_n5(tmp_path / "c.n5" / "raw", voxels(), resolution=[6, 6, 30])
    put(tmp_path / "d.zarr", "volumes/s0", voxels())
    zarr.open_group(tmp_path / "d.zarr", mode="a").attrs["resolution"] = [30, 6, 6]
    ome_group(tmp_path / "e.zarr", "img", [voxels()], [[30, 6, 6]], version="0.4")
    put_precomputed(tmp_path / "f", [voxels()], [[6, 6, 30]])
    put(tmp_path / "closed", "raw", voxels(), **PLACE)
    server = QuietServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        for name in ("a.zarr", "b.zarr", "c.n5"):
            check(open_volume(f"{base}/{name}", "raw"), voxels())
            # The server lists no folders: the usual names are tried.
            check(open_volume(f"{base}/{name}"), voxels())
            check(open_volume(f"{base}/{name}/raw"), voxels())
        for path, dataset in (
            ("d.zarr", None),
            ("d.zarr", "volumes"),
            ("d.zarr/volumes", "s0"),
            ("d.zarr/volumes/s0", None),
            ("e.zarr/img/0", None),
            ("f", None),
            ("f", "6_6_30"),
        ):
            volume = open_volume(f"{base}/{path}", dataset)
            check(volume, voxels())
            assert tuple(volume.voxel_size) == (30, 6, 6)
        # What lies above the path given may be closed.
        check(open_volume(f"{base}/closed/raw"), voxels())
        with pytest.raises(InputError, match=r"it holds: volumes/s0 \(5, 7, 9\) uint8"):
            open_volume(f"{base}/d.zarr", "raw")
        with pytest.raises(InputError, match=r"a\.zarr has no dataset 'raww'"):
            open_volume(f"{base}/a.zarr", "raww")
        with pytest.raises(InputError, match="correct the path, or the credentials if it is priv"):
            open_volume(f"{base}/nothing.zarr")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
