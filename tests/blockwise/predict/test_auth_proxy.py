"""The proxy in front of daisy: those that know the token get through, nothing else does."""

import contextlib
import selectors
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from distributed.security import Security

from agq.blockwise.predict import auth_proxy
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
        while len(got) < len(sent) and (piece := connection.recv(1 << 16)):
            got += piece
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
            other.sendall(message)
            other.shutdown(socket.SHUT_WR)
            assert b"AGQ" not in everything(other)
    # It still serves those that know the token.
    assert connect("127.0.0.1", proxy.port, TOKEN) > 0


def everything(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while piece := sock.recv(4096):
            data += piece
    return data


@pytest.mark.parametrize("knows", [False, True], ids=["no certificate", "another certificate"])
def test_nobody_gets_through_tls_without_the_key(echo, knows, tmp_path):
    """A client that takes any certificate of the proxy, as an attacker would."""
    proxy = AuthProxy("127.0.0.1", echo, TOKEN)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if knows:
        own = Security.temporary()
        (tmp_path / "own.pem").write_text(own.tls_client_cert + own.tls_client_key)
        context.load_cert_chain(tmp_path / "own.pem")
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as plain,
        context.wrap_socket(plain) as tls,
    ):
        assert tls.version() == "TLSv1.3"
        with contextlib.suppress(OSError):
            tls.sendall(b"take a block")
        assert everything(tls) == b""


def test_what_workers_say_is_encrypted(echo):
    """Between worker and proxy lies a network that reads along."""
    proxy = AuthProxy("127.0.0.1", echo, TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as network, contextlib.ExitStack() as stack:
        seen: list[bytes] = []

        def carry(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    seen.append(data)
                    sink.sendall(data)

        def read_along() -> None:
            worker, _ = network.accept()
            there = socket.create_connection(("127.0.0.1", proxy.port))
            for pair in ((worker, there), (there, worker)):
                stack.enter_context(pair[0])
                threading.Thread(target=carry, args=pair, daemon=True).start()

        threading.Thread(target=read_along, daemon=True).start()
        port = connect("127.0.0.1", network.getsockname()[1], TOKEN)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"take a block")
            assert connection.recv(12, socket.MSG_WAITALL) == b"take a block"
    assert b"take a block" not in b"".join(seen)
    assert TOKEN.encode() not in b"".join(seen)


def test_a_worker_finds_out_an_impostor(echo):
    impostor = AuthProxy("127.0.0.1", echo, "cd" * 32)
    with pytest.raises(AuthError, match="another token"):
        connect("127.0.0.1", impostor.port, TOKEN)
    server = socket.create_server(("127.0.0.1", 0))

    def pretend() -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
            everything(connection)

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(AuthError, match="something else listens there"):
        connect("127.0.0.1", server.getsockname()[1], TOKEN)
    thread.join()
    server.close()


class Crowd:
    """Connections without a token: idle ones, and ones that send a byte a second; all come back.

    Parameters
    ----------
    count
        How many at a time.
    """

    def __init__(self, port: int, count: int) -> None:
        self._address = ("127.0.0.1", port)
        self._selector = selectors.DefaultSelector()
        self._over = threading.Event()
        self.reopened = 0
        for _ in range(count):
            self._open()
        self._thread = threading.Thread(target=self._run)

    def _open(self) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(self._address)
        self._selector.register(sock, selectors.EVENT_READ)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._over.is_set():
            for key, _ in self._selector.select(0.05):
                with contextlib.suppress(OSError):
                    if key.fileobj.recv(4096):
                        continue
                self._selector.unregister(key.fileobj)
                key.fileobj.close()
                self._open()
                self.reopened += 1
            if time.monotonic() - last > 1:
                last = time.monotonic()
                for key in list(self._selector.get_map().values())[::2]:
                    with contextlib.suppress(OSError):
                        key.fileobj.send(b"\x16")

    def __enter__(self) -> "Crowd":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()


@pytest.mark.parametrize(
    ("places", "crowd", "workers"),
    [
        (64, 300, 20),
        pytest.param(256, 1000, 100, marks=pytest.mark.slow),
        pytest.param(1024, 1000, 100, marks=pytest.mark.slow),
    ],
)
def test_a_crowd_without_a_token_keeps_no_worker_out(echo, monkeypatch, places, crowd, workers):
    monkeypatch.setattr(auth_proxy, "_MAX_NEWCOMERS", places)
    proxy = AuthProxy("127.0.0.1", echo, TOKEN)  # which also lets this process open enough files
    with Crowd(proxy.port, crowd) as attack, ThreadPoolExecutor(workers) as pool:
        while places < crowd and not attack.reopened:
            time.sleep(0.01)
        # `connect` gives up after 10 s.
        ports = list(pool.map(lambda _: connect("127.0.0.1", proxy.port, TOKEN), range(workers)))
    assert len(set(ports)) == workers


def test_it_goes_on_when_no_file_is_left(tmp_path):
    """A process of its own, whose hard limit is low too."""
    program = """
import resource, socket, sys, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (120, 120))
from agq.blockwise.predict.auth_proxy import AuthProxy
target = socket.create_server(("127.0.0.1", 0), backlog=100)
proxy = AuthProxy("127.0.0.1", target.getsockname()[1], sys.argv[1])
held = [open("/dev/null") for _ in range(int(sys.argv[2]))]
print(proxy.port, flush=True)
sys.stdin.read(1)
del held
sys.stdin.read()
"""
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", program, TOKEN, "104"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    try:
        port = int(child.stdout.readline())
        with Crowd(port, 50):
            time.sleep(0.3)
            child.stdin.write("x")
            child.stdin.flush()
            assert connect("127.0.0.1", port, TOKEN) > 0
        assert child.poll() is None
    finally:
        child.communicate()
    log_lines = (tmp_path / "log").read_text().splitlines()
    assert any("Too many open files" in line for line in log_lines)
    assert len(log_lines) < 5


def test_workers_beyond_the_files_of_the_process_are_refused(echo, monkeypatch):
    monkeypatch.setattr(auth_proxy, "_raise_file_limit", lambda: 96)
    proxy = AuthProxy("127.0.0.1", echo, TOKEN)  # 24 newcomers, 64 other files, 8 left
    for _ in range(2):
        connect("127.0.0.1", proxy.port, TOKEN)
    monkeypatch.setattr(auth_proxy, "_JOIN_S", 0.5)
    with pytest.raises(AuthError, match="no answer"):
        connect("127.0.0.1", proxy.port, TOKEN)


def test_nothing_listens_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(AuthError, match="refused"):
        connect("127.0.0.1", port, TOKEN)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_it_never_listens_on_every_interface(host):
    with pytest.raises(ValueError, match="never on all"):
        AuthProxy(host, 1, TOKEN)
