"""What a stranger on the same machine tries on ports: to be a client of dask, or a browser.

Run as a program with a user id and ports, it prints what answers: one line "PORT WAY ANSWER" each.
"""

import asyncio
import contextlib
import os
import ssl
import subprocess
import sys
from collections.abc import Coroutine

import psutil
from distributed import Client
from distributed.core import rpc
from distributed.security import Security

NOBODY = 65534


def listening() -> set[int]:
    """Return the TCP ports on which this process and its children listen."""
    this = psutil.Process()
    found = set()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            connections = process.net_connections("tcp")
            found |= {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def attack(ports: set[int], uid: int) -> list[str]:
    """Let a user try ports; return what answers."""
    script = [sys.executable, __file__, *map(str, (uid, *sorted(ports)))]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


async def _dask(port: int, security: Security | None = None) -> str:
    address = f"{'tls' if security else 'tcp'}://127.0.0.1:{port}"
    client = Client(address, timeout=1, asynchronous=True, security=security)
    try:
        await client
        return f"client {client}"
    finally:
        await client.close()


async def _identity(port: int) -> str:
    async with rpc(f"tcp://127.0.0.1:{port}", timeout=1) as server:
        return f"rpc {(await asyncio.wait_for(server.identity(), 1))['type']}"


async def _page(port: int, context: ssl.SSLContext | None) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(40), 1)
    writer.close()
    if not answer.startswith(b"HTTP"):
        raise OSError("no page")
    return f"page {answer!r}"


async def _main(uid: int, ports: list[int]) -> None:
    own = Security.temporary()
    anything = ssl.create_default_context()
    anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE
    if uid != os.getuid():  # not before: this Python may be readable by its owner only
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)

    async def one(port: int, way: Coroutine[None, None, str]) -> None:
        try:
            print(port, await asyncio.wait_for(way, 3), flush=True)
        except (OSError, TimeoutError):
            pass
        except Exception as error:  # an answer too, though not the one wanted
            print(port, type(error).__name__, flush=True)

    def ways(port: int) -> list[Coroutine[None, None, str]]:
        pages = [_page(port, None), _page(port, anything)]
        return [_dask(port), _dask(port, own), _identity(port), *pages]

    await asyncio.gather(*(one(port, way) for port in ports for way in ways(port)))


if __name__ == "__main__":
    first, *others = map(int, sys.argv[1:])
    asyncio.run(_main(first, others))
