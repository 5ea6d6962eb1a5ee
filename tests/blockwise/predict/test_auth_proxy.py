"""The proxy in front of daisy: those that know the token get through, nothing else does."""

import contextlib
import socket
import threading

import pytest

from agq.blockwise.predict.auth_proxy import AuthError, AuthProxy, connect

TOKEN = "ab" * 32


@pytest.fixture
def echo() -> int:
    """Port of a server that sends back what it gets."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(65536):
                    connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    # close() alone does not wake a thread in accept().
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def test_bytes_pass_both_ways_and_the_end_too(echo):
    proxy = AuthProxy("127.0.0.1", echo, TOKEN)
    sent = bytes(range(256)) * 5000
    with socket.create_connection(
        ("127.0.0.1", connect("127.0.0.1", proxy.port, TOKEN)), timeout=10
    ) as connection:
        connection.settimeout(10)
        threading.Thread(target=connection.sendall, args=(sent,), daemon=True).start()
        got = b""
        while len(got) < len(sent):
            got += connection.recv(1 << 16)
        assert got == sent
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_a_wrong_token_is_refused(echo):
    proxy = AuthProxy("127.0.0.1", echo, TOKEN)
    with pytest.raises(AuthError, match="another token"):
        connect("127.0.0.1", proxy.port, "cd" * 32)
    for message in (b"", b"x" * 64, b"GET / HTTP/1.1\r\n\r\n" + bytes(100)):
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as other:
            other.settimeout(10)
            assert other.recv(4, socket.MSG_WAITALL) == b"AGQ1"
            other.recv(32, socket.MSG_WAITALL)
            other.sendall(message)
            other.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert other.recv(1) == b""
    # It still serves those that know the token.
    assert connect("127.0.0.1", proxy.port, TOKEN) > 0


def test_a_worker_finds_out_an_impostor(echo):
    server = socket.create_server(("127.0.0.1", 0))

    def pretend() -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"AGQ1" + bytes(32))
            connection.recv(64, socket.MSG_WAITALL)
            connection.sendall(bytes(32))

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(AuthError, match="does not know the token"):
        connect("127.0.0.1", server.getsockname()[1], TOKEN)
    thread.join()
    server.close()


def test_nothing_listens_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(AuthError, match="refused"):
        connect("127.0.0.1", port, TOKEN)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_it_never_listens_on_every_interface(host):
    with pytest.raises(ValueError, match="never on all"):
        AuthProxy(host, 1, TOKEN)
