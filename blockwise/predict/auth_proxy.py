"""A proxy in front of daisy's server that asks workers of other machines for the run's token.

daisy's protocol has no authentication, and one malformed message ends its server. So daisy listens
on the loopback interface only. The proxy listens on one address of the cluster's network, accepts
those that know the token of the run (in ``session.json``, which only its owner can read), and
passes bytes on. Both sides prove that they know the token without sending it::

    proxy  -> worker   "AGQ1", 32 random bytes
    worker -> proxy    32 random bytes, HMAC(token, "worker", both)
    proxy  -> worker   HMAC(token, "gate", both)

A worker connects daisy's client to a loopback port that takes one connection and only from its own
user. What follows the handshake is neither encrypted nor signed: docs/cluster.md says what remains.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import socket
import threading
from pathlib import Path

from agq.blockwise.threads import start_vital

_MAGIC = b"AGQ1"
_PROXY, _WORKER = b"gate", b"worker"
_NONCE = 32
_HANDSHAKE_S = 10.0
_CONNECT_S = 10.0
_MAX_UNAUTHENTICATED = 256
_PIECE = 1 << 16

_logger = logging.getLogger(__name__)


class AuthError(OSError):
    """No proxy listens there, or one side does not know the token."""


class AuthProxy:
    """Lets authenticated connections through to a port of this machine.

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
        self._token = token.encode()
        self._unauthenticated = 0
        self._socket = socket.create_server((host, 0), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        start_vital("auth-proxy", self._main)

    def _main(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, sock=self._socket)
        async with server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        try:
            if self._unauthenticated >= _MAX_UNAUTHENTICATED:
                return
            self._unauthenticated += 1
            try:
                async with asyncio.timeout(_HANDSHAKE_S):
                    proven = await self._handshake(reader, writer)
            finally:
                self._unauthenticated -= 1
            if not proven:
                _logger.warning("refused a connection from %s: wrong token", peer)
                return
            inner = await asyncio.open_connection("127.0.0.1", self._target)
            try:
                await asyncio.gather(_copy(reader, inner[1]), _copy(inner[0], writer))
            finally:
                inner[1].close()
        # Nothing that the other side sends, and no worker that dies, may end the proxy.
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            _logger.debug("connection from %s ended: %s", peer, error)
        finally:
            writer.close()

    async def _handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        ours = secrets.token_bytes(_NONCE)
        writer.write(_MAGIC + ours)
        answer = await reader.readexactly(_NONCE + hashlib.sha256().digest_size)
        theirs, proof = answer[:_NONCE], answer[_NONCE:]
        if not hmac.compare_digest(proof, _proof(self._token, _WORKER, ours, theirs)):
            return False
        writer.write(_proof(self._token, _PROXY, ours, theirs))
        await writer.drain()
        return True


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on until the sender ends; then both ways end."""
    try:
        while data := await reader.read(_PIECE):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


def connect(host: str, port: int, token: str) -> int:
    """Connect to a proxy; return the loopback port at which daisy's client finds the server.

    Raises
    ------
    AuthError
        If nothing listens there any more, or what listens has another token.
    """
    try:
        outer = socket.create_connection((host, port), timeout=_CONNECT_S)
    except OSError as error:
        raise AuthError(f"proxy {host}:{port}: {error}") from error
    try:
        _prove(outer, token.encode())
        outer.settimeout(None)
        outer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener = socket.create_server(("127.0.0.1", 0), backlog=1)
    except OSError as error:
        outer.close()
        raise AuthError(f"proxy {host}:{port}: {error or 'no answer'}") from error
    threading.Thread(target=_pass_one, args=(listener, outer), name="to-proxy", daemon=True).start()
    return int(listener.getsockname()[1])


def _prove(outer: socket.socket, token: bytes) -> None:
    hello = _receive(outer, len(_MAGIC) + _NONCE)
    if not hello.startswith(_MAGIC):
        raise AuthError("something else listens there")
    theirs, ours = hello[len(_MAGIC) :], secrets.token_bytes(_NONCE)
    outer.sendall(ours + _proof(token, _WORKER, theirs, ours))
    proof = _receive(outer, hashlib.sha256().digest_size)
    if not hmac.compare_digest(proof, _proof(token, _PROXY, theirs, ours)):
        raise AuthError("it does not know the token of this run")


def _receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise AuthError("it ended the connection (another token, or too many connections)")
        data += piece
    return data


def _proof(token: bytes, role: bytes, proxy_nonce: bytes, worker_nonce: bytes) -> bytes:
    return hmac.digest(token, role + proxy_nonce + worker_nonce, "sha256")


def _pass_one(listener: socket.socket, outer: socket.socket) -> None:
    """Take one connection of this user and join it with the one to the proxy."""
    with outer:
        with listener:
            listener.settimeout(_CONNECT_S)
            try:
                inner, peer = listener.accept()
                while not _is_same_user(peer[1], listener.getsockname()[1]):
                    inner.close()
                    inner, peer = listener.accept()
            except OSError:
                return
        with inner:
            inner.settimeout(None)
            inner.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=_pump, args=(outer, inner), daemon=True)
            back.start()
            _pump(inner, outer)
            back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_PIECE):
            sink.sendall(data)
    # Wakes the other direction too.
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


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
