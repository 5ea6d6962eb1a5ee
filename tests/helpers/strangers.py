"""What a stranger on the same machine tries on a port: to be a client of dask, or a browser.

Run as a program with addresses, it prints what answers: one line "USER ADDRESS WAY ANSWER" each.
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


def listening(pid: int | None = None) -> set[str]:
    """Return the addresses HOST:PORT on which a process (None: this) and its children listen."""
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        for process in (first, *first.children(recursive=True)):
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    host = one.laddr.ip.replace("0.0.0.0", "127.0.0.1")
                    found.add(f"{host.replace('::', '127.0.0.1')}:{one.laddr.port}")
    return found


def attack(addresses: set[str]) -> list[str]:
    """Try addresses as this user, and as another one too if it is root; return what answers."""
    script = [sys.executable, __file__, *sorted(addresses)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


async def _dask(address: str, security: Security | None = None) -> str:
    scheme = "tls" if security else "tcp"
    client = Client(f"{scheme}://{address}", timeout=0.5, asynchronous=True, security=security)
    try:
        await client
        return f"client {client}"
    finally:
        await client.close()


async def _identity(address: str) -> str:
    async with rpc(f"tcp://{address}", timeout=0.5) as server:
        return f"rpc {(await asyncio.wait_for(server.identity(), 0.5))['type']}"


async def _page(address: str, context: ssl.SSLContext | None) -> str:
    reader, writer = await asyncio.open_connection(*address.split(":"), ssl=context)
    writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(40), 0.5)
    writer.close()
    if not answer.startswith(b"HTTP"):
        raise OSError("no page")
    return f"page {answer!r}"


async def _main(addresses: list[str]) -> None:
    own = Security.temporary()
    anything = ssl.create_default_context()
    anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE

    async def one(address: str, way: Coroutine[None, None, str]) -> None:
        try:
            print(os.getuid(), address, await asyncio.wait_for(way, 3), flush=True)
        except (OSError, TimeoutError):
            pass
        except Exception as error:  # an answer too, though not the one wanted
            print(os.getuid(), address, type(error).__name__, flush=True)

    def ways(address: str) -> list[Coroutine[None, None, str]]:
        pages = [_page(address, None), _page(address, anything)]
        return [_dask(address), _dask(address, own), _identity(address), *pages]

    await asyncio.gather(*(one(address, way) for address in addresses for way in ways(address)))


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
    if os.getuid() == 0:  # not before: this Python may be readable by its owner only
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        asyncio.run(_main(sys.argv[1:]))
