"""Start a server for a measurement and be sure that it serves; end it, with everything it started."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks import ROOT, processes
from benchmarks.install import NODE
from benchmarks.peers import Peer, Place

START_DEADLINE: Final = 40.0
STOP_DEADLINE: Final = 8.0


class CannotServeError(Exception):
    """A server did not come up or does not answer as it must; the message says which and what it wrote."""


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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

    @property
    def pid(self) -> int:
        """Its first process."""
        assert self._process is not None
        return self._process.pid

    def start(self, *, ready: bool = True) -> Server:
        """Start it; wait until every worker it was asked for has had the time to answer."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SHAREDCLUSTER_", "GRANIAN_"))}
        environment |= {
            "PYTHONPATH": str(ROOT), "PORT": str(self.port), "WORKERS": str(self.place.workers),
            "BENCH_REDIS_URL": self.place.redis_url, "PM2_HOME": str(self.folder / "pm2"),
            "SHAREDCLUSTER_RUNTIME_DIR": str(self.folder / "run"), **self.peer.environment,
        }  # fmt: skip
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.peer.command(self.place), env=environment, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        if ready and not wait_for(self.answers, START_DEADLINE):
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
        environment = os.environ | {"PM2_HOME": str(self.folder / "pm2")}
        program = str(NODE / "node_modules" / ".bin" / how[0])
        subprocess.run([program, *how[1:]], env=environment, capture_output=True, check=True, timeout=60)

    def tail(self) -> str:
        """The end of what it wrote."""
        return self.log.read_text(errors="replace")[-1500:]

    def stop(self) -> None:
        """TERM, then KILL for whatever is left of its family."""
        if self._process is None:
            return
        members = [stat.pid for stat in processes.family(processes.all_stats(), self.pid)]
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_DEADLINE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        alive = {stat.pid for stat in processes.all_stats()}
        for pid in members:
            if pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        shutil.rmtree(self.folder, ignore_errors=True)


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
            self.program,
            "--bind",
            "127.0.0.1",
            "--port",
            str(port),
            "--save",
            "",
            "--appendonly",
            "no",
            "--loglevel",
            "warning",
        ]
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
