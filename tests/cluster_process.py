"""A real cluster for tests: `sharedcluster run` in a process of its own, with a private runtime folder."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sharedcluster.control import client
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: the status, the fields (names in lower case) and the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Cluster:
    """Starts on `start`, or is started by the `cluster` fixture; everything it started is gone after `close`."""

    def __init__(
        self,
        app: str = "tests.apps.plain:app",
        *options: str,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        prefix: tuple[str, ...] = (),
        bind: tuple[str, ...] = ("--port", "0"),
        python: bool = True,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sc-test-"))
        self.runtime = self.folder / "run"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SHAREDCLUSTER_", "REDIS_"))}
        self.env |= {"SHAREDCLUSTER_RUNTIME_DIR": str(self.runtime), "PYTHONUNBUFFERED": "1", **(env or {})}
        self.env.setdefault("PYTHONPATH", str(ROOT))
        interpreter = [sys.executable] if python else []
        self.command = [*prefix, *interpreter, "-m", "sharedcluster", "run", app, *bind, *options]
        self.cwd = cwd
        self.log = self.folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self._seen: set[int] = set()

    # -- its life --------------------------------------------------------------------------------------------------

    def start(self, *, ready: bool = True) -> Cluster:
        """Start it, and wait until all of its workers listen."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.env, cwd=self.cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        if ready:
            wait_until(self.is_ready, "all workers listen", deadline=30.0)
        return self

    def is_ready(self) -> bool:
        """Whether as many workers listen as there are; a process that has ended fails the test at once."""
        if self.process is not None and self.process.poll() is not None:
            raise RuntimeError(f"the cluster ended with {self.process.returncode}:\n{self.output()}")
        try:
            facts = self.status()
        except Exception:
            return False
        self._seen.update(worker["pid"] for worker in facts["workers"])
        return bool(facts["workers"]) and all(worker["state"] == "listening" for worker in facts["workers"])

    def has(self, workers: int, *, without: Collection[int] = ()) -> bool:
        """Whether exactly so many workers are there, all listening, and none of these processes is one of them."""
        rows = self.workers()
        self._seen.update(row["pid"] for row in rows)
        return (
            len(rows) == workers
            and all(row["state"] == "listening" for row in rows)
            and not {row["pid"] for row in rows} & set(without)
        )

    def signal(self, number: signal.Signals) -> None:
        """Send the primary a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, deadline: float = 30.0) -> int:
        """Wait for the primary's end; its exit code."""
        assert self.process is not None
        self.note_processes()
        return self.process.wait(deadline)

    def stop(self, deadline: float = 30.0) -> int:
        """TERM and wait; the exit code."""
        self.note_processes()
        self.signal(signal.SIGTERM)
        return self.wait(deadline)

    def close(self) -> None:
        """End whatever is left of it."""
        if self.process is not None:
            self.note_processes()
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        for pid in self.left_over():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        shutil.rmtree(self.folder, ignore_errors=True)

    def note_processes(self) -> None:
        """Remember every process of the cluster that lives now, to be looked for afterwards."""
        assert self.process is not None
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        self._seen.update(child.pid for child in family)

    def left_over(self) -> list[int]:
        """Those of the remembered processes that still live."""
        return [pid for pid in self._seen if _lives(pid)]

    def output(self) -> str:
        """What it wrote."""
        return self.log.read_text(errors="replace")

    # -- talking to it ---------------------------------------------------------------------------------------------

    @property
    def control(self) -> Path:
        """Its control socket."""
        found = sorted(self.runtime.glob("*.sock"))
        if not found:
            raise OSError("no control socket yet")
        return found[0]

    def status(self) -> dict[str, Any]:
        """What `status --json` says."""
        facts: dict[str, Any] = client.call(self.control, "status")["status"]
        return facts

    def workers(self) -> list[dict[str, Any]]:
        """The workers' rows."""
        rows: list[dict[str, Any]] = self.status()["workers"]
        return rows

    @property
    def port(self) -> int:
        """The port of its first listener."""
        return int(self.status()["listeners"][0]["address"].rpartition(":")[2])

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a `sharedcluster` command against it."""
        command = [sys.executable, "-m", "sharedcluster", *arguments]
        return subprocess.run(
            command, env=self.env, cwd=self.cwd, capture_output=True, text=True, timeout=60, check=False
        )

    def connect(self, timeout: float = 10.0) -> http.client.HTTPConnection:
        """A keep-alive connection."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def get(self, path: str, **options: Any) -> Answer:
        """One request on a connection of its own."""
        return request(self.port, "GET", path, **options)

    def post(self, path: str, **options: Any) -> Answer:
        """One request on a connection of its own."""
        return request(self.port, "POST", path, **options)


def request(
    port: int,
    method: str,
    path: str,
    *,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 10.0,
) -> Answer:
    """One request on a new connection, which is closed after it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body=body, headers=dict(headers or {}))
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def is_refused(port: int) -> bool:
    """Whether nobody listens on a port."""
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
