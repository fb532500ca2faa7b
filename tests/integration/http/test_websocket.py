"""WebSocket through environ["werkzeug.socket"], with flask-sock on one side and a real client on the other."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from simple_websocket import Client, ConnectionClosed

from tests.integration.http.conftest import Served, get, read_all, status_of
from tests.integration.http.test_tls import certificate  # noqa: F401 - a fixture
from tests.waiting import wait_until

UPGRADE = ("Connection: Upgrade", "Upgrade: raw")


@pytest.fixture(params=["ws", "wss"])
def talk(request: pytest.FixtureRequest, serve: Callable[..., Served]) -> tuple[Served, Callable[[], Any]]:
    """A server, and what connects a client to it, in the clear and encrypted."""
    if request.param == "ws":
        served = serve(drain_linger=0.5)
        return served, lambda: Client(f"ws://127.0.0.1:{served.port}/ws")
    cert: tuple[Path, Path] = request.getfixturevalue("certificate")
    served = serve(drain_linger=0.5, certfile=str(cert[0]), keyfile=str(cert[1]))
    context = ssl.create_default_context(cafile=str(cert[0]))
    context.check_hostname = False
    return served, lambda: Client(f"wss://127.0.0.1:{served.port}/ws", ssl_context=context)


def test_echo(talk: tuple[Served, Callable[[], Any]]) -> None:
    """Messages of every size go both ways, several connections at once, while requests are served beside them."""
    served, connect = talk
    clients = [connect() for _ in range(3)]
    for size in (0, 1, 125, 126, 65535, 65536, 300000):
        for client in clients:
            client.send("x" * size)
        for client in clients:
            assert client.receive(timeout=10) == "x" * size
    assert status_of(served.ask(get("/plain"))) == 200
    for client in clients:
        client.close()
        client.thread.join(10)  # which may still write to a descriptor that would be given out again
    wait_until(lambda: served.notes()["closed"].count("ws closed") == 3, "the handlers ended")
    wait_until(lambda: served.notes()["connections"] == 1, "the connections closed")


def test_drain_closes_with_1001(talk: tuple[Served, Callable[[], Any]]) -> None:
    """A client learns of a drain by close code 1001, and the handler ends as when its client leaves."""
    served, connect = talk
    client = connect()
    client.send("hello")
    assert client.receive(timeout=10) == "hello"
    served.ask(get("/control?drain"))
    with pytest.raises(ConnectionClosed) as closed:
        client.receive(timeout=10)
    assert closed.value.reason == 1001
    client.thread.join(10)
    wait_until(lambda: "ws closed" in served.notes()["closed"], "the handler ended")
    wait_until(lambda: served.notes()["connections"] == 1, "the connection closed")


def test_socket_that_nobody_touches_changes_nothing(served: Served) -> None:
    """An Upgrade that the application ignores is a request like any other, and the connection lives on."""
    answer = served.ask(get("/ignore-upgrade", *UPGRADE, close=False) + get("/plain"))
    first, second = answer.split(b"HTTP/1.1 200 OK")[1:]
    assert first.endswith(b"True")
    assert second.endswith(b"ok")


def test_what_was_sent_ahead_comes_first(served: Served) -> None:
    """Bytes that a client sent behind its head, before the 101, are the library's first bytes."""
    with served.connect() as sock:
        sock.sendall(get("/raw", *UPGRADE, close=False) + b"ahead ")
        assert status_of(sock.recv(1000)) == 101
        sock.sendall(b"behind.")
        assert read_all(sock) == b"ahead behind."


def test_socket_of_a_request_that_is_over(served: Served) -> None:
    """Who keeps the promised socket beyond its request cannot take the connection from the next one."""
    answer = served.ask(get("/keep-socket", *UPGRADE, close=False) * 2 + get("/plain"))
    assert b"stolen" not in answer
    assert [part[-7:] for part in answer.split(b"HTTP/1.1 200")][2].endswith(b"refused")


def test_upgrade_without_connection_is_none(served: Served) -> None:
    """`Upgrade` counts only when `Connection` names it (RFC 9110 7.8)."""
    assert served.ask(get("/ignore-upgrade", "Upgrade: raw")).endswith(b"False")
