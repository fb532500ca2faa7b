"""rediss:// with real certificates: whom a worker believes, and what it says when it does not."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharedcluster.errors import RedisNeededError
from sharedcluster.state import SharedState, StateSettings
from sharedcluster.state.checks import check_server
from sharedcluster.state.wire import Address
from tests.redis_process import RedisProcess, find_redis_server, free_port
from tests.state.browser import Browser
from tests.waiting import wait_until

PASSWORD = "topsecret"


def openssl(folder: Path, *arguments: str) -> None:
    """Run openssl in a folder."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on PATH")
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def make_authority(folder: Path, name: str) -> None:
    """NAME.pem and NAME.key: an authority, as RFC 5280 4.2.1.3 wants it, which Python checks from 3.13 on."""
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    options += ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    openssl(folder, "req", "-x509", *options, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")


def make_certificate(folder: Path, authority: str) -> None:
    """server.pem and server.key, for `localhost` and for nothing else."""
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=localhost"]
    openssl(folder, "req", *options, "-keyout", "server.key", "-out", "server.csr")
    (folder / "names").write_text("subjectAltName=DNS:localhost\nauthorityKeyIdentifier=keyid\n")
    signed_by = ["-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial"]
    made = ["-days", "2", "-extfile", "names", "-out", "server.pem"]
    openssl(folder, "x509", "-req", "-in", "server.csr", *signed_by, *made)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authority that signed the server's certificate, and a stranger."""
    folder = tmp_path_factory.mktemp("tls")
    make_authority(folder, "ours")
    make_authority(folder, "stranger")
    make_certificate(folder, "ours")
    return folder


@pytest.fixture(scope="module")
def tls_port(certificates: Path) -> Iterator[int]:
    """A server with a password whose TLS port has the certificate."""
    port = free_port()
    files = ("--tls-cert-file", "server.pem", "--tls-key-file", "server.key", "--tls-ca-cert-file", "ours.pem")
    paths = [str(certificates / each) if each.endswith((".pem", ".key")) else each for each in files]
    options = ("--tls-port", str(port), *paths, "--tls-auth-clients", "no", "--requirepass", PASSWORD)
    server = RedisProcess(find_redis_server(), *options)
    try:
        server.start()
        yield port
    finally:
        server.close()


def url_of(port: int, host: str, authority: Path) -> str:
    """As an operator writes it."""
    return f"rediss://:{PASSWORD}@{host}:{port}/0?ssl_ca_certs={authority}"


def refusal(url: str) -> str:
    """What a user reads when this URL does not work; the password is never in it."""
    with pytest.raises(RedisNeededError) as caught:
        check_server(Address(url, StateSettings(connect_timeout=5)), "app")
    assert PASSWORD not in str(caught.value)
    return str(caught.value)


def test_sessions_and_messages_over_tls(certificates: Path, tls_port: int) -> None:
    """With the right authority all is as without TLS: sessions on two workers, and what one hears of the other."""
    url = url_of(tls_port, "localhost", certificates / "ours.pem")
    first, second = (SharedState(url, "tls", StateSettings(connect_timeout=5, socket_timeout=5)) for _ in range(2))
    try:
        for state in (first, second):
            state.start()
            assert state.wait_ready(15)
        assert first.check() == []
        browser = Browser()
        browser.set(first, a=1, text="x" * 10_000)
        assert browser.get(second, "text") == "x" * 10_000
        assert first.cache.set("k", 1)
        assert second.cache.get("k") == 1
        first.cache.delete("k")
        wait_until(lambda: second.cache.get("k") is None, "the deletion was heard")
        assert PASSWORD not in first.facts().url
    finally:
        first.close()
        second.close()


def test_a_stranger_is_not_trusted(certificates: Path, tls_port: int) -> None:
    """Signed by somebody else, or by an authority nobody named: refused, and the words say what to type."""
    for url in (
        url_of(tls_port, "localhost", certificates / "stranger.pem"),
        f"rediss://:{PASSWORD}@localhost:{tls_port}/0",
    ):
        text = refusal(url)
        assert "The certificate of Redis at rediss://:***@localhost:" in text
        assert "is not trusted" in text
        assert "ssl_ca_certs=" in text


def test_a_certificate_for_another_name(certificates: Path, tls_port: int) -> None:
    """The right authority does not help where the name is not in the certificate; the advice is about the name."""
    text = refusal(url_of(tls_port, "127.0.0.1", certificates / "ours.pem"))
    assert "is for another host name" in text
    assert "ssl_ca_certs=/path" not in text


def test_plain_redis_on_a_tls_port(tls_port: int) -> None:
    """redis:// where TLS is spoken: the connection fails at once and in words."""
    text = refusal(f"redis://:{PASSWORD}@localhost:{tls_port}/0")
    assert f"localhost:{tls_port}" in text
