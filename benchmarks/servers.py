"""Start a server for a measurement and be sure that it serves; end it, with everything it started."""

from __future__ import annotations

import http.client
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from benchmarks import ROOT, processes
from benchmarks.install import NODE
from benchmarks.peers import Peer, Place

START_DEADLINE: Final = 30.0
STOP_DEADLINE: Final = 8.0


class CannotServeError(Exception):
    """A server did not come up or does not answer as it must; the message says which and what it wrote."""


_PORTS: Final = itertools.count(random.randrange(20_000, 30_000))
"""Below the range of outgoing connections: ten thousand of those may not sit on a server's port."""


def free_port() -> int:
    """A port that nobody has now, and another one each time."""
    for port in _PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise AssertionError("counting has no end")


def wait_for(condition: Callable[[], bool], deadline: float, pause: float = 0.02) -> bool:
    """Wait until `condition` holds; False if `deadline` seconds were not enough."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


class Server:
    """One peer, running. Its first process is the root of everything that is accounted to it."""

    def __init__(self, peer: Peer, place: Place) -> None:
        self.peer = peer
        self.place = place
        self.port = place.port
        self.folder = Path(tempfile.mkdtemp(prefix="sc-bench-"))
        self.log = self.folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._members: set[int] = set()

    @property
    def pid(self) -> int:
        """Its first process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> Server:
        """Start it and wait until it answers."""
        return self.launch().ready()

    def launch(self) -> Server:
        """Start it; wait for nothing."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SHAREDCLUSTER_", "GRANIAN_"))}
        environment |= {
            "PYTHONPATH": str(ROOT), "PORT": str(self.port), "WORKERS": str(self.place.workers),
            "BENCH_REDIS_URL": self.place.redis_url, "BENCH_SITE": self.place.site,
            "PM2_HOME": str(self.folder / "pm2"), "SHAREDCLUSTER_RUNTIME_DIR": str(self.folder / "run"),
            **self.peer.environment,
        }  # fmt: skip
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.peer.command(self.place), env=environment, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return self

    def ready(self) -> Server:
        """Wait until a request is answered.

        Raises:
            CannotServeError: It ended, or does not answer in time.
        """
        if not wait_for(self.answers, START_DEADLINE):
            raise CannotServeError(f"{self.peer.name} did not answer in {START_DEADLINE:.0f} s:\n{self.tail()}")
        return self

    def answers(self) -> bool:
        """Whether a request is answered, with whatever status."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise CannotServeError(f"{self.peer.name} ended with {self._process.returncode}:\n{self.tail()}")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        else:
            return True
        finally:
            connection.close()

    def reload(self) -> None:
        """Tell it to replace its workers, and return at once."""
        how = self.peer.reload
        if isinstance(how, str):
            os.kill(self.pid, signal.Signals[f"SIG{how}"])
            return
        environment = os.environ | {"PM2_HOME": str(self.folder / "pm2"), **self.peer.environment}
        program = str(NODE / "node_modules" / ".bin" / how[0])
        subprocess.run([program, *how[1:]], env=environment, capture_output=True, check=True, timeout=60)

    def tail(self) -> str:
        """The end of what it wrote."""
        return self.log.read_text(errors="replace")[-1500:]

    def terminate(self) -> None:
        """TERM, without waiting: several servers end at the same time."""
        if self._process is not None and self._process.poll() is None:
            self._members |= processes.cpu_by_process(self.pid).keys()  # who has lost its parent is not found later
            self._process.terminate()

    def stop(self) -> None:
        """TERM, then KILL for whatever is left of its family; its folder is removed."""
        self.terminate()
        if self._process is not None:
            self._members |= processes.cpu_by_process(self.pid).keys()
            try:
                self._process.wait(STOP_DEADLINE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            for pid in self._members - {self._process.pid}:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def terminate_all(servers: Iterable[Server]) -> None:
    """Tell all of them to end, before any of them is waited for."""
    for server in servers:
        server.terminate()


class Redis:
    """The one Redis that all peers of a run share: no disk, a free port."""

    def __init__(self) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        self.program = program
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Redis:
        """Start it, if there is one on PATH."""
        if self.program is None:
            return self
        port = free_port()
        command = [
            self.program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no",
            "--loglevel", "warning",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/")

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        if not wait_for(listens, 5):
            raise CannotServeError("redis-server did not start")
        self.url = f"redis://127.0.0.1:{port}/0"
        return self

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(5)
