"""TLS: the handshake, tickets that every worker opens, and clients that do it wrong."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sharedcluster.errors import ConfigError
from sharedcluster.http.tls import TICKET_KEY, make_context
from tests.integration.http.conftest import Served, get, post, read_all, status_of

Serve = Callable[..., Served]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    return make_certificate(folder, "localhost")


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Let openssl make one."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={name}"
    names = f"subjectAltName=DNS:{name},IP:127.0.0.1"
    try:
        subprocess.run(
            [*command.split(), "-addext", names, "-keyout", key, "-out", cert], check=True, capture_output=True
        )
    except FileNotFoundError:
        if os.environ.get("CI"):
            raise
        pytest.skip("openssl is not installed")
    return cert, key


@pytest.fixture
def secure(serve: Serve, certificate: tuple[Path, Path]) -> Served:
    """An engine that speaks TLS."""
    return serve(head_timeout=1.0, certfile=str(certificate[0]), keyfile=str(certificate[1]))


def trusting(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    """A client's context that trusts the certificate."""
    return ssl.create_default_context(cafile=str(certificate[0]))


def wrap(served: Served, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLSocket:
    """A TLS connection."""
    raw = served.connect()
    return context.wrap_socket(raw, server_hostname="localhost", session=session, suppress_ragged_eofs=False)


def test_requests_and_large_bodies(secure: Served, certificate: tuple[Path, Path]) -> None:
    """Keep-alive, pipelining, large bodies both ways, and close_notify at the end."""
    with wrap(secure, trusting(certificate)) as sock:
        sock.sendall(get("/plain", close=False) + get("/echo", close=False))
        answer = b""
        while not answer.endswith(b"}}"):
            answer += sock.recv(65536)
        assert b'"wsgi.url_scheme": "https"' in answer
        body = os.urandom(1 << 20)
        sock.sendall(post("/read?-1", body))
        assert everything(sock).endswith(b"\r\n\r\n" + body)
    with wrap(secure, trusting(certificate)) as sock:
        sock.sendall(get("/file"))
        assert everything(sock).endswith(b"0123456789" * 500000)


def everything(sock: ssl.SSLSocket) -> bytes:
    """All until close_notify; a cut without it raises."""
    data = b""
    while piece := sock.recv(1 << 20):
        data += piece
    return data


def test_version_is_at_least_12(secure: Served, certificate: tuple[Path, Path]) -> None:
    """1.3 and 1.2 are spoken, older ones refused; ALPN says http/1.1."""
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = trusting(certificate)
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2", "http/1.1"])
        with wrap(secure, context) as sock:
            assert sock.version() == version.name.replace("_", ".")
            assert sock.selected_alpn_protocol() == "http/1.1"
    context = trusting(certificate)
    with pytest.warns(DeprecationWarning, match="TLS"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, OSError)):
        wrap(secure, context)


def shake_hands(tls: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, sock: socket.socket) -> None:
    """The handshake by hand, every byte sent for itself."""
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            for byte in outgoing.read():
                sock.send(bytes([byte]))
            incoming.write(sock.recv(65536))
        else:
            return


def test_handshake_split_at_every_byte(secure: Served, certificate: tuple[Path, Path]) -> None:
    """A ClientHello that comes one byte at a time still becomes a connection."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trusting(certificate).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with secure.connect() as sock:
        shake_hands(tls, incoming, outgoing, sock)
        tls.write(get("/plain"))
        sock.sendall(outgoing.read())
        incoming.write(read_all(sock))
        assert tls.read(1000).endswith(b"ok")


def test_plain_http_is_told(secure: Served) -> None:
    """A client that speaks plain HTTP to a TLS port reads a 400, in plain."""
    with secure.connect() as sock:
        sock.sendall(get("/plain"))
        assert status_of(read_all(sock)) == 400


def test_silent_handshake_ends(secure: Served) -> None:
    """A client that does not shake hands has head_timeout, not keep_alive."""
    with secure.connect() as sock:
        started = time.monotonic()
        assert sock.recv(100) == b""
        assert time.monotonic() - started < 3


def test_garbage_is_dropped(secure: Served) -> None:
    """Nonsense ends the connection, and the server lives."""
    with secure.connect() as sock:
        sock.sendall(b"\x16\x03\x01\x00\x05nonsense that is no hello")
        read_all(sock)
    with secure.connect() as sock:
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b""


RESUME = """
import socket, ssl, sys
from sharedcluster.http.tls import make_context
cert, key, ticket = sys.argv[1:]
context = make_context(cert, key, ticket_key=bytes.fromhex(ticket) or None)
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    with server.accept()[0] as raw, context.wrap_socket(raw, server_side=True) as sock:
        sock.recv(1)
        sock.sendall(b"x")
"""


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tickets_open_in_every_process_that_has_the_key(
    certificate: tuple[Path, Path], version: ssl.TLSVersion
) -> None:
    """A session begun with one process resumes with another that was given the same ticket key, and only then."""
    key = os.urandom(TICKET_KEY).hex()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RESUME, certificate[0], certificate[1], ticket], stdout=subprocess.PIPE, text=True
        )
        for ticket in (key, key, os.urandom(TICKET_KEY).hex())
    ]
    try:
        ports = [int(process.stdout.readline()) for process in processes if process.stdout]
        context = trusting(certificate)
        context.minimum_version = context.maximum_version = version
        session: ssl.SSLSession | None = None
        resumed = []
        for port in ports:
            raw = socket.create_connection(("127.0.0.1", port))
            with context.wrap_socket(raw, server_hostname="localhost", session=session) as sock:
                sock.sendall(b"x")
                sock.recv(1)
                resumed.append(sock.session_reused)
                session = session or sock.session
        assert resumed == [False, True, False]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_wrong_files_are_errors_at_the_start(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    """A missing file, one that is no PEM, and a key of another certificate say what to do."""
    other = make_certificate(tmp_path, "other")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    with pytest.raises(ConfigError, match="cannot be read"):
        make_context(str(tmp_path / "missing.pem"))
    with pytest.raises(ConfigError, match="cannot be used"):
        make_context(str(nonsense))
    with pytest.raises(ConfigError, match="does not belong to the certificate"):
        make_context(str(certificate[0]), str(other[1]))
