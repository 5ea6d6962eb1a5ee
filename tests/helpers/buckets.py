"""An S3 server on loopback with one bucket, ``em-data``, named in the environment."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class Bucket:
    """The bucket, through a client of its own."""

    def __init__(self, endpoint: str) -> None:
        import boto3

        # Servers of one process share what they hold.
        urllib.request.urlopen(f"{endpoint}/moto-api/reset", data=b"").close()
        self.client: Any = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        self.client.create_bucket(Bucket="em-data")

    def upload(self, folder: Path, prefix: str) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{prefix}/{file.relative_to(folder)}", file.read_bytes())

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket="em-data", Key=key, Body=data)

    def listed(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket="em-data").get("Contents", [])
        return [entry["Key"] for entry in found]

    def remove(self, key: str) -> None:
        self.client.delete_object(Bucket="em-data", Key=key)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    yield Bucket(f"http://{host}:{port}")
    server.stop()
    from agq.blockwise.volumes import location

    location._object_store.cache_clear()
