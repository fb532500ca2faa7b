"""The process under test: the engine behind plain listening sockets, with an application that misbehaves on request.

Started as `python -m tests.integration.http.served '{"settings": {...}}'`. It prints one line of JSON: the TCP port
and the path of a unix socket of type SEQPACKET. On that one every send of the client is one read of the server, so a
test decides exactly how a message is split, with no sleep and no luck.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import _socket  # noqa: E402 - nothing may be imported before the patch
import gc  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402

from sharedcluster.http.server import Server  # noqa: E402
from sharedcluster.http.settings import HttpSettings, ListenerFacts, ReleasedConnection  # noqa: E402
from sharedcluster.http.tls import make_context  # noqa: E402

StartResponse = Callable[..., Any]
Environ = dict[str, Any]
TEXT = ("Content-Type", "text/plain")
closed: list[str] = []
server: Server


def echo(environ: Environ, start: StartResponse) -> list[bytes]:
    """What the application saw, as JSON."""
    try:
        body = environ["wsgi.input"].read().decode("latin-1")
    except OSError as error:
        body = f"!{type(error).__name__}"
        start("400 Bad Request", [TEXT])
        return [body.encode()]
    seen = {key: value for key, value in environ.items() if isinstance(value, str)}
    answer = json.dumps({"body": body, "environ": seen}).encode()
    start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
    return [answer]


def plain(environ: Environ, start: StartResponse) -> list[bytes]:
    """The smallest answer; reads no body."""
    start("200 OK", [TEXT, ("Content-Length", "2")])
    return [b"ok"]


def read_some(environ: Environ, start: StartResponse) -> list[bytes]:
    """Reads as many bytes as the query says, and no more."""
    data = environ["wsgi.input"].read(int(environ["QUERY_STRING"]))
    start("200 OK", [TEXT])
    return [data]


class Closing:
    """An iterable that notes when it is closed."""

    def __init__(self, name: str, pieces: Iterable[bytes]) -> None:
        self.name = name
        self.pieces = iter(pieces)

    def __iter__(self) -> Iterator[bytes]:
        return self.pieces

    def close(self) -> None:
        """Leave a note for /closed."""
        closed.append(self.name)


def stream(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    """Pieces of unknown total length."""
    start("200 OK", [TEXT])
    return Closing("stream", (b"piece%d;" % number for number in range(3)))


def huge(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    """More than any buffer holds: as many MiB as the query says."""
    start("200 OK", [TEXT])
    return Closing("huge", (b"x" * 65536 for _ in range(16 * int(environ["QUERY_STRING"]))))


def events(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    """An event stream that waits for ever after its first event."""
    start("200 OK", [("Content-Type", "text/event-stream")])

    def run() -> Iterator[bytes]:
        try:
            yield b"data: 1\n\n"
            gevent.sleep(1000)
        finally:
            closed.append("events")

    return run()


def late_events(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    """An event stream whose first event comes after as many seconds as the query says, and no second one."""
    start("200 OK", [("Content-Type", "text/event-stream")])

    def run() -> Iterator[bytes]:
        try:
            gevent.sleep(float(environ["QUERY_STRING"]))
            yield b"data: 1\n\n"
            gevent.sleep(1000)
        finally:
            closed.append("late events")

    return run()


def endless(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    """A body without an end, made without ever waiting; its Content-Length is what the query says, if anything."""
    length = environ["QUERY_STRING"]
    start("200 OK", [TEXT, ("Content-Length", length)] if length else [TEXT])
    return Closing("endless", itertools.repeat(b"x" * 1000))


def nothing(environ: Environ, start: StartResponse) -> list[bytes]:
    """No body, and not a word about its length: what a framework gives a server for HEAD."""
    start("200 OK", [TEXT])
    return []


def slow(environ: Environ, start: StartResponse) -> list[bytes]:
    """Waits as long as the query says, without blocking the loop."""
    gevent.sleep(float(environ["QUERY_STRING"]))
    return plain(environ, start)


def deaf(environ: Environ, start: StartResponse) -> list[bytes]:
    """Keeps the loop from turning until the file that the query names is gone, after having made it."""
    path = environ["QUERY_STRING"]
    open(path, "x").close()
    for _ in range(2000):
        if not os.path.exists(path):
            break
        monkey.get_original("time", "sleep")(0.005)
    return plain(environ, start)


def fields(environ: Environ, start: StartResponse) -> list[bytes]:
    """A response whose status and fields are the client's choice: JSON in the body."""
    wish = json.loads(environ["wsgi.input"].read())
    start(wish["status"], [(name, value) for name, value in wish.get("fields", [])])
    return [piece.encode("latin-1") for piece in wish.get("body", ["ok"])]


class ClosingList(list[bytes]):
    """A list that notes when it is closed."""

    def close(self) -> None:
        """Leave a note for /closed."""
        closed.append("closing list")


def closing_list(environ: Environ, start: StartResponse) -> list[bytes]:
    """A list of one piece that can be closed; with a query its fields cannot be sent."""
    start("200 OK", [TEXT, ("X", "a\nb")] if environ["QUERY_STRING"] else [TEXT])
    return ClosingList([b"ok"])


def crash(environ: Environ, start: StartResponse) -> list[bytes]:
    """Raises before it has said anything."""
    raise RuntimeError("on purpose")


def crash_late(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    """Raises after the first piece has left."""
    start("200 OK", [TEXT])
    yield b"first"
    raise RuntimeError("on purpose, late")


def error_page(environ: Environ, start: StartResponse) -> list[bytes]:
    """Changes its mind before anything was sent (exc_info)."""
    start("200 OK", [TEXT])
    try:
        int("no number")
    except ValueError:
        start("503 Service Unavailable", [TEXT], sys.exc_info())
    return [b"sorry"]


def twice(environ: Environ, start: StartResponse) -> list[bytes]:
    """Calls start_response twice without exc_info."""
    start("200 OK", [TEXT])
    start("200 OK", [TEXT])
    return [b"never"]


def never(environ: Environ, start: StartResponse) -> list[bytes]:
    """Does not call start_response."""
    return [b"never"]


def write(environ: Environ, start: StartResponse) -> list[bytes]:
    """Uses PEP 3333's write."""
    put = start("200 OK", [TEXT])
    put(b"one ")
    put(b"two ")
    return [b"three"]


def crash_after_write(environ: Environ, start: StartResponse) -> list[bytes]:
    """Raises after what it wrote has left."""
    start("200 OK", [TEXT])(b"first")
    raise RuntimeError("on purpose, after write")


def crash_in_close(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    """Raises when its body, all of which was sent, is closed."""
    start("200 OK", [TEXT])

    class Raising(Closing):
        def close(self) -> None:
            super().close()
            raise RuntimeError("on purpose, in close")

    return Raising("crash in close", [b"whole"])


def too_late(environ: Environ, start: StartResponse) -> list[bytes]:
    """Changes its mind when the head has left: PEP 3333 wants the exception raised again."""
    start("200 OK", [TEXT])(b"first")
    try:
        int("no number")
    except ValueError:
        start("503 Service Unavailable", [TEXT], sys.exc_info())
    return [b"never"]


def lazy(environ: Environ, start: StartResponse) -> Iterator[bytes]:
    """A generator that calls start_response when it is first asked."""
    start("200 OK", [TEXT])
    yield b""
    yield b"lazy"


def file(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    """A file of 5000000 bytes through wsgi.file_wrapper, from an offset if the query says so."""
    source = tempfile.TemporaryFile()  # noqa: SIM115 - the server closes it through the wrapper
    source.write(b"0123456789" * 500000)
    source.seek(int(environ["QUERY_STRING"] or 0))
    start("200 OK", [TEXT])
    wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](source)
    return wrapped


def notes(environ: Environ, start: StartResponse) -> list[bytes]:
    """What was closed so far, and the counters."""
    stats = server.stats()
    answer = {
        "closed": closed,
        "in_flight": stats.in_flight,
        "connections": stats.connections,
        "requests": stats.requests,
    }
    start("200 OK", [TEXT])
    return [json.dumps(answer).encode()]


def control(environ: Environ, start: StartResponse) -> list[bytes]:
    """Tell the engine to drain or close, as the query says."""
    if environ["QUERY_STRING"] == "hand-over":
        server.release_when_idle(serve_again)
        server.drain()
    elif environ["QUERY_STRING"] == "drain":
        server.drain()
    elif environ["QUERY_STRING"] == "close":
        gevent.spawn(server.close)
    return plain(environ, start)


def serve_again(one: ReleasedConnection) -> None:
    """What another worker would do."""
    gevent.get_hub().loop.run_callback(server.serve, one.fd, one.listener, one.peer, one.proxied)


def migrate(environ: Environ, start: StartResponse) -> list[bytes]:
    """Release every idle connection and serve it again, as another worker would."""
    released = server.release_idle()
    for one in released:
        serve_again(one)
    start("200 OK", [TEXT])
    return [str(len(released)).encode()]


def make_websocket_app() -> Callable[..., Any]:
    """A Flask application with an echo over WebSocket, as flask-sock's users write it."""
    from flask import Flask
    from flask_sock import Sock

    app = Flask("websocket")
    sock = Sock(app)

    @sock.route("/ws")  # type: ignore[untyped-decorator]  # flask-sock ships no types
    def talk(ws: Any) -> None:
        closed.append("ws opened")
        try:
            while True:
                ws.send(ws.receive())
        finally:
            closed.append("ws closed")

    return app


def ignore_upgrade(environ: Environ, start: StartResponse) -> list[bytes]:
    """Sees the socket, and does not touch it."""
    start("200 OK", [TEXT])
    return [str("werkzeug.socket" in environ).encode()]


kept: list[Any] = []


def keep_socket(environ: Environ, start: StartResponse) -> list[bytes]:
    """Keeps a socket it was promised, and tries to use the one kept before."""
    kept.append(environ["werkzeug.socket"])
    start("200 OK", [TEXT])
    try:
        kept[0].sendall(b"stolen") if len(kept) > 1 else None
    except OSError:
        return [b"refused"]
    return [b"ok"]


def garbage(environ: Environ, start: StartResponse) -> list[bytes]:
    """How many objects only the cyclic collector could free; it does not run by itself from now on."""
    found = gc.collect()
    gc.disable()
    start("200 OK", [TEXT])
    return [str(found).encode()]


def take_raw(environ: Environ, start: StartResponse) -> list[bytes]:
    """Takes the socket as a library of its own would: echoes one message, what was sent ahead included."""
    sock = environ["werkzeug.socket"]
    sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n")
    data = b""
    while not data.endswith(b"."):
        data += sock.recv(100)
    sock.sendall(data)
    return [b"this is dropped"]


APPS: dict[str, Callable[..., Any]] = {
    "/echo": echo, "/plain": plain, "/read": read_some, "/stream": stream, "/huge": huge, "/events": events,
    "/slow": slow, "/fields": fields, "/crash": crash, "/crash-late": crash_late, "/error-page": error_page,
    "/twice": twice, "/never": never, "/write": write, "/lazy": lazy, "/file": file, "/notes": notes,
    "/control": control, "/migrate": migrate, "/ignore-upgrade": ignore_upgrade, "/raw": take_raw,
    "/keep-socket": keep_socket, "/garbage": garbage, "/late-events": late_events, "/endless": endless,
    "/nothing": nothing, "/crash-after-write": crash_after_write, "/crash-in-close": crash_in_close,
    "/too-late": too_late, "/deaf": deaf, "/closing-list": closing_list,
}  # fmt: skip


def application(environ: Environ, start: StartResponse) -> Iterable[bytes]:
    """Route by path; anything unknown is echoed."""
    if environ["PATH_INFO"] == "/ws" and "/ws" not in APPS:
        APPS["/ws"] = make_websocket_app()
    answer: Iterable[bytes] = APPS.get(environ["PATH_INFO"], echo)(environ, start)
    return answer


def accept_on(sock: socket.socket, index: int) -> None:
    """Hand every connection of `sock` to the engine, as a worker does."""
    raw = _socket.socket(sock.family, sock.type, 0, sock.fileno())
    raw.setblocking(False)

    def on_acceptable() -> None:
        try:
            fd, peer = raw._accept()  # type: ignore[attr-defined]  # what socket.accept is made of
        except BlockingIOError:
            return
        server.serve(fd, index, (peer[0], peer[1]) if isinstance(peer, tuple) else None)

    watcher = gevent.get_hub().loop.io(sock.fileno(), 1)
    watcher.start(on_acceptable)
    watchers.append((raw, watcher))


watchers: list[Any] = []


def main() -> None:
    """Serve until the standard input ends: that is when the test has gone."""
    global server
    options = json.loads(sys.argv[1])
    logging.basicConfig(level=options.get("log_level", "CRITICAL"))
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in options["settings"].items()
    }
    if settings.get("access_log") == "stderr":
        settings["access_log"] = lambda line: print(line, file=sys.stderr, flush=True)
    server = Server(application, HttpSettings(**settings))
    tls = None
    if "certfile" in options:
        tls = make_context(options["certfile"], options["keyfile"])
    tcp = socket.create_server(("127.0.0.1", 0), backlog=1024)
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if "send_buffer" in options:  # every connection inherits it
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options["send_buffer"])
    folder = tempfile.mkdtemp(prefix="served-")
    packets = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    packets.bind(f"{folder}/packets")
    packets.listen(1024)
    port = tcp.getsockname()[1]
    server.add_listener(0, ListenerFacts("127.0.0.1", port, tls=tls))
    server.add_listener(1, ListenerFacts(unix_path=f"{folder}/packets"))
    accept_on(tcp, 0)
    accept_on(packets, 1)
    print(json.dumps({"port": port, "packets": f"{folder}/packets", "pid": os.getpid()}), flush=True)
    while os.read(0, 1) if gevent.select.select([0], [], [])[0] else True:
        time.sleep(0.01)
    os.unlink(f"{folder}/packets")
    os.rmdir(folder)


if __name__ == "__main__":
    main()
