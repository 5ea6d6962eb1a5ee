"""A proxy in front of daisy's server that lets in workers of other machines by the run's token.

daisy's protocol has no authentication, and one malformed message ends its server. So daisy listens
on the loopback interface only. The proxy listens on one address of the cluster's network and passes
on what comes through TLS 1.3 from those that know the token of the run (in ``session.json``, which
only its owner can read). Worker and proxy derive one key and one certificate from the token, and
each takes no other certificate: so both prove that they know the token without sending it, and
what they say afterwards is encrypted and signed.

Whoever has not yet proven it is a *newcomer*, has a few seconds for it, and can lock nobody out:
when there are too many, the oldest of the address that has most of them is dropped, but not before
a worker would have answered. Those that come faster wait in the kernel's queue, first come, first
served.

A worker connects daisy's client to a loopback port that takes one connection and only from its own
user.
"""

import asyncio
import contextlib
import functools
import hmac
import logging
import os
import random
import resource
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from agq.blockwise.threads import start_aside, start_vital

_WELCOME = b"AGQ2"
_HANDSHAKE_S = 3.0
_SHUTDOWN_S = 3.0
_JOIN_S = 10.0
_RETRY_S = 0.2
_TELL_S = 10.0
_NO_FILES_S = 0.1
_PIECE = 1 << 16

_BACKLOG = 4096
_MAX_NEWCOMERS = 1024
_GRACE_S = 0.25
# Of the files that the process may open: other than for connections.
_OTHER_FILES = 64
# Two in the proxy and one in daisy's server, which is in the same process.
_FILES_PER_WORKER = 3

_logger = logging.getLogger(__name__)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class AuthError(OSError):
    """No proxy listens there, or one side does not know the token."""


class AuthProxy:
    """Lets authenticated connections through to a port of this machine.

    Raises the number of files that this process may open as far as the system allows.

    Parameters
    ----------
    host
        Address to listen on; a name is resolved. Never a wildcard.
    target
        Port on the loopback interface.
    """

    def __init__(self, host: str, target: int, token: str) -> None:
        if host in ("", "0.0.0.0", "::", "*"):  # noqa: S104
            raise ValueError("the proxy listens on one address, never on all")
        self._target = target
        self._context = _tls_context(token, ssl.PROTOCOL_TLS_SERVER)
        files = _raise_file_limit()
        self._max_newcomers = min(_MAX_NEWCOMERS, files // 4)
        self._max_members = (files - self._max_newcomers - _OTHER_FILES) // _FILES_PER_WORKER
        # By address, the tasks of the newcomers and when they came, the oldest first.
        self._newcomers: dict[str, dict[asyncio.Task[None], float]] = {}
        self._members: set[asyncio.Task[None]] = set()
        self._refused = 0
        self._tell_at = 0.0
        self._socket = socket.create_server((host, 0), backlog=_BACKLOG)
        self.port: int = self._socket.getsockname()[1]
        start_vital("auth-proxy", self._main)

    def _main(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        self._socket.setblocking(False)
        while True:
            await self._make_room()
            try:
                sock, (address, _) = await loop.sock_accept(self._socket)
            except OSError as error:
                # The process or the machine has no file left; the next one may get in.
                self._note_refused(f"none could be taken: {error}")
                self._drop_newcomer(grace_s=0.0)
                await asyncio.sleep(_NO_FILES_S)
                continue
            task = loop.create_task(self._connection(sock, address))
            self._newcomers.setdefault(address, {})[task] = loop.time()
            # One at a time: those that have come must get their answer meanwhile.
            await asyncio.sleep(0)

    async def _make_room(self) -> None:
        """Wait until one more newcomer may come; drop one if none leaves."""
        while sum(map(len, self._newcomers.values())) >= self._max_newcomers:
            await asyncio.sleep(self._drop_newcomer(_GRACE_S) and 0.01)

    def _drop_newcomer(self, grace_s: float) -> float:
        """Drop the oldest newcomer of the fullest address; return for how long it still may stay.

        That is 0 if it was dropped, or if there is none.
        """
        if not self._newcomers:
            return 0.0
        address = max(self._newcomers, key=lambda name: len(self._newcomers[name]))
        task, came = next(iter(self._newcomers[address].items()))
        left = came + grace_s - asyncio.get_running_loop().time()
        if left > 0:
            return left
        self._forget_newcomer(address, task)
        task.cancel()
        return 0.0

    def _forget_newcomer(self, address: str, task: asyncio.Task[None]) -> None:
        of_address = self._newcomers.get(address, {})
        of_address.pop(task, None)
        if not of_address:
            self._newcomers.pop(address, None)

    async def _connection(self, sock: socket.socket, address: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        # Nothing that the other side sends, and no worker that dies, may end the proxy.
        try:
            try:
                outer = await self._handshake(sock)
            finally:
                self._forget_newcomer(address, task)
            self._members.add(task)
            async with _closing(outer):
                if len(self._members) > self._max_members:
                    self._note_refused(f"{address}: no more files may be open here (ulimit -Hn)")
                    return
                inner = await asyncio.open_connection("127.0.0.1", self._target)
                async with _closing(inner):
                    outer[1].write(_WELCOME)
                    await _pass_both_ways(outer, inner)
        except ssl.SSLError:
            self._note_refused(f"{address} does not know the token")
        except (OSError, asyncio.IncompleteReadError) as error:
            _logger.debug("connection from %s ended: %s", address, error)
        finally:
            self._members.discard(task)

    async def _handshake(self, sock: socket.socket) -> Streams:
        """Return the streams of a newcomer that knows the token."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            sock,
            ssl=self._context,
            ssl_handshake_timeout=_HANDSHAKE_S,
            ssl_shutdown_timeout=_SHUTDOWN_S,
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    def _note_refused(self, last: str) -> None:
        """Log now and then: an attacker must not fill the log."""
        self._refused += 1
        now = asyncio.get_running_loop().time()
        if now >= self._tell_at:
            _logger.warning("refused %d connections; the last: %s", self._refused, last)
            self._refused, self._tell_at = 0, now + _TELL_S


def connect(host: str, port: int, token: str) -> int:
    """Connect to a proxy; return the loopback port at which daisy's client finds the server.

    A proxy that has too many newcomers drops some: it is tried again for some seconds.

    Raises
    ------
    AuthError
        If nothing listens there any more, or what listens has another token.
    """
    joined: Future[int] = Future()

    def bridge() -> None:
        try:
            asyncio.run(_bridge(host, port, token, joined))
        except BaseException as error:
            # After that daisy's client sees the end of its connection.
            if not joined.done():
                joined.set_exception(error)

    start_aside("to-proxy", bridge)
    return joined.result()


async def _bridge(host: str, port: int, token: str, joined: "Future[int]") -> None:
    """Join the proxy, and pass on the one connection of this user to a loopback port."""
    try:
        async with asyncio.timeout(_JOIN_S):
            outer = await _join(host, port, _tls_context(token, ssl.PROTOCOL_TLS_CLIENT))
        listener = socket.create_server(("127.0.0.1", 0), backlog=1)
    except ssl.SSLCertVerificationError as error:
        raise AuthError(f"proxy {host}:{port}: it has another token") from error
    except ssl.SSLError as error:
        raise AuthError(f"proxy {host}:{port}: something else listens there") from error
    except TimeoutError as error:
        raise AuthError(f"proxy {host}:{port}: no answer for {_JOIN_S:g} s") from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise AuthError(f"proxy {host}:{port}: {reason}") from error
    async with _closing(outer):
        with listener:
            joined.set_result(listener.getsockname()[1])
            async with asyncio.timeout(_JOIN_S):
                inner = await _accept_own(listener)
        async with _closing(inner):
            await _pass_both_ways(outer, inner)


async def _join(host: str, port: int, context: ssl.SSLContext) -> Streams:
    while True:
        try:
            outer = await asyncio.open_connection(
                host,
                port,
                ssl=context,
                ssl_handshake_timeout=_JOIN_S,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            )
            try:
                await outer[0].readexactly(len(_WELCOME))
            except BaseException:
                await _close(outer)
                raise
            return outer
        except ConnectionRefusedError:
            raise
        # It was dropped: others have taken all places for a moment.
        except (ConnectionError, ssl.SSLEOFError, asyncio.IncompleteReadError):
            await asyncio.sleep(random.uniform(0.5, 1.0) * _RETRY_S)  # noqa: S311


async def _accept_own(listener: socket.socket) -> Streams:
    """Take one connection of this user."""
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    while True:
        sock, (_, port) = await loop.sock_accept(listener)
        if _is_same_user(port, listener.getsockname()[1]):
            return await asyncio.open_connection(sock=sock)
        sock.close()


@contextlib.asynccontextmanager
async def _closing(streams: Streams) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await _close(streams)


async def _close(streams: Streams) -> None:
    streams[1].close()
    with contextlib.suppress(OSError):
        await streams[1].wait_closed()


async def _pass_both_ways(one: Streams, other: Streams) -> None:
    """Pass bytes on until one side ends; then both end."""
    await asyncio.gather(_copy(one[0], other[1]), _copy(other[0], one[1]))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(_PIECE):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


def _is_same_user(port: int, to: int) -> bool:
    """Tell whether a loopback connection is of this process's user; only Linux can say."""
    table = Path("/proc/net/tcp")
    if not table.exists():
        return True
    wanted = f"0100007F:{port:04X}", f"0100007F:{to:04X}"
    for line in table.read_text().splitlines()[1:]:
        fields = line.split()
        if (fields[1], fields[2]) == wanted:
            return int(fields[7]) == os.geteuid()
    return False


@functools.lru_cache(maxsize=4)
def _tls_context(token: str, protocol: int) -> ssl.SSLContext:
    """Return a context of one side that accepts only those that know the token."""
    # Same token, same key, same certificate, byte for byte: Ed25519 signs without chance.
    key = Ed25519PrivateKey.from_private_bytes(hmac.digest(token.encode(), b"agq tls 1", "sha256"))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "agq run")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        # It lives as long as its token; the clocks of nodes may differ.
        .not_valid_before(datetime(2000, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(9999, 1, 1, tzinfo=UTC))
        .sign(key, None)
        .public_bytes(serialization.Encoding.PEM)
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The certificate names no host: who has its key is of this run.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certificate.decode())
    # OpenSSL takes keys from files only; this one has mode 600.
    with tempfile.NamedTemporaryFile() as file:
        file.write(certificate + secret)
        file.flush()
        context.load_cert_chain(file.name)
    return context


def _raise_file_limit() -> int:
    """Let this process open as many files as it may; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft
