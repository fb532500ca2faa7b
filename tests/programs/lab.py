"""A program that is primary and worker and does what a test tells it, line by line.

The primary reads Python from stdin and writes one JSON line for every event and every answer. A worker does what the
primary passes on to it as a message. Nothing of the cluster itself is in here but its public names.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from sharedcluster import cluster
from sharedcluster.program.loops import current_loop

names: dict[str, Any] = {"cluster": cluster, "os": os, "sys": sys, "time": time}


def run(code: str) -> Any:
    """The value of an expression, or of `result` after statements; or how it failed."""
    try:
        try:
            compiled = compile(code, "<lab>", "eval")
        except SyntaxError:
            names["result"] = None
            exec(code, names)
            return names["result"]
        return eval(compiled, names)
    except Exception as error:
        return {"raised": type(error).__name__, "errno": getattr(error, "errno", None), "text": str(error)}


def say(**fact: Any) -> None:
    """One line for the test."""
    os.write(1, (json.dumps({"at": time.monotonic(), **fact}, default=str) + "\n").encode())


# -- the primary -------------------------------------------------------------------------------------------------


def lead() -> None:
    """Report every event, and do what stdin says."""
    for event in ("setup", "fork", "online", "listening", "disconnect", "exit"):
        cluster.on(event, reporter("cluster", event))
    cluster.on("message", on_message)
    names.update(fork=fork, at=at, say=say, tell=tell)
    buffer = bytearray()

    def on_stdin() -> None:
        data = os.read(0, 65536)
        if not data:
            watch.close()
            loop.hold(-1)
            return
        buffer.extend(data)
        while b"\n" in buffer:
            line, _, rest = bytes(buffer).partition(b"\n")
            buffer[:] = rest
            number, code = json.loads(line)
            answer = run(code)
            say(answer=number, result=answer)

    loop = current_loop()
    loop.hold(1)
    watch = loop.watch(0, on_stdin)
    say(started=os.getpid())


def reporter(level: str, event: str) -> Callable[..., None]:
    """Say that an event came, with the worker's state at that moment."""

    def report(*arguments: Any) -> None:
        about: dict[str, Any] = {"level": level, "event": event}
        rest = list(arguments)
        if level == "cluster" and event != "setup":
            worker = rest.pop(0)
            about |= {"id": worker.id, "state": worker.state, "asked": worker.exited_after_disconnect}
            about |= {"connected": worker.is_connected(), "dead": worker.is_dead()}
        say(**about, arguments=[list(vars_of(each)) for each in rest])

    return report


def vars_of(value: Any) -> list[Any]:
    """A value as JSON can carry it, with its type."""
    fields = {name: getattr(value, name) for name in getattr(value, "__slots__", ()) if not name.startswith("_")}
    return [type(value).__name__, fields or value]


def fork(count: int = 1, **env: str) -> list[int]:
    """Start workers that report at their own level too."""
    ids = []
    for _ in range(count):
        worker = cluster.fork({"LAB": "worker", **env})
        for event in ("fork", "online", "listening", "disconnect", "exit"):
            worker.on(event, reporter(f"worker {worker.id}", event))
        ids.append(worker.id)
    return ids


def at(id: int, number: int, code: str) -> bool:
    """Have a worker do something; its answer comes by message."""
    return cluster.workers[id].send({"lab": number, "code": code})


def tell(id: int, message: Any) -> bool:
    """Send a worker a message and say when it was taken."""
    return cluster.workers[id].send(message, lambda error: say(taken=id, error=error))


def on_message(worker: Any, message: Any) -> None:
    """An answer of a worker, or a message of the test's."""
    if isinstance(message, dict) and "lab" in message:
        say(answer=message["lab"], result=message["result"])
    else:
        shown = message if len(str(message)) < 1000 else {"long": len(str(message))}
        say(level="cluster", event="message", id=worker.id, message=shown)


# -- a worker ----------------------------------------------------------------------------------------------------


def work() -> None:
    """Do what comes by message; nothing is served until it says so."""
    names.update(serve=serve, heard=heard, servers=servers, sleep_in_c=sleep_in_c)
    cluster.worker.on("message", follow)
    cluster.worker.on("disconnect", lambda: say(level="inside", event="disconnect", id=cluster.worker.id))


heard: list[Any] = []
servers: list[Any] = []


def follow(message: Any) -> None:
    """A wish of the test's, or a message to be kept."""
    if isinstance(message, dict) and "lab" in message:
        try:
            result = json.loads(json.dumps(run(message["code"]), default=str))
        except SystemExit:
            raise
        except BaseException:
            result = traceback.format_exc()
        cluster.worker.send({"lab": message["lab"], "result": result})
    else:
        heard.append(message)


def serve(port: int = 0, **options: Any) -> Any:
    """Serve the lab's application; the port."""
    server = cluster.serve(application, port=port, **options)
    servers.append(server)
    return server.port or server.path


def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """`/` says who answers; /slow/S waits, /block/S stands in C, /exit/N ends the process."""
    what, _, value = environ["PATH_INFO"].strip("/").partition("/")
    if what in ("slow", "block"):
        say(level="inside", event="begun", id=environ["sharedcluster.worker"].id)
    if what == "slow":
        time.sleep(float(value))
    elif what == "block":
        sleep_in_c(float(value))
    elif what == "exit":
        os._exit(int(value))
    facts = environ["sharedcluster.worker"]
    body = json.dumps({"id": facts.id, "slot": facts.slot, "pid": os.getpid(), "peer": environ.get("REMOTE_ADDR")})
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body.encode()]


def sleep_in_c(seconds: float) -> None:
    """Stop the whole process."""
    from gevent import monkey

    monkey.get_original("time", "sleep")(seconds)


if cluster.is_primary:
    lead()
else:
    work()
