"""A program of its own for tests: `python PROGRAM` and what it says, and the lab, which does what it is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.cluster_process import ROOT, Answer, request
from tests.waiting import wait_until

PROGRAMS = ROOT / "tests" / "programs"


class Program:
    """A running script; everything it started is gone after `close`."""

    def __init__(
        self, *command: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT, interpreter: str = sys.executable
    ) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SHAREDCLUSTER_", "REDIS_"))}
        self.lines: list[str] = []
        self._seen: set[int] = set()
        self.process = subprocess.Popen(
            [interpreter, *command], cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=kept | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(env or {})}, start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.decode(errors="replace").rstrip("\n"))

    @property
    def output(self) -> str:
        """Everything it wrote."""
        return "\n".join(self.lines)

    def wait_for(self, text: str, deadline: float = 15.0) -> str:
        """Wait for a line with this text in it."""
        return wait_until(lambda: next((line for line in self.lines if text in line), ""), text, deadline=deadline)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.note_processes()
        self.process.send_signal(number)

    def wait(self, deadline: float = 20.0) -> int:
        """Its exit code."""
        self.note_processes()
        code = self.process.wait(deadline)
        self._reader.join(5)
        return code

    def note_processes(self) -> None:
        """Remember every process it has started, to be looked for afterwards."""
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        self._seen.update(child.pid for child in family)

    def left_over(self) -> list[int]:
        """Those that still live."""
        return [pid for pid in self._seen if is_alive(pid)]

    def close(self) -> None:
        """End whatever is left of it."""
        self.note_processes()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.left_over():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._reader.join(5)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Lab(Program):
    """tests/programs/lab.py: tell the primary or a worker what to do, look at the events."""

    program = str(PROGRAMS / "lab.py")
    interpreter = sys.executable

    def __init__(self, workers: int = 0, **options: Any) -> None:
        super().__init__(self.program, interpreter=self.interpreter, **options)
        self._number = 0
        self.wait_for('"started"')
        if workers:
            self.fork(workers)

    @property
    def facts(self) -> list[dict[str, Any]]:
        """Its lines, those that are JSON."""
        return [json.loads(line) for line in list(self.lines) if line.startswith("{")]

    def _ask(self, code: str) -> int:
        self._number += 1
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([self._number, code]).encode() + b"\n")
        self.process.stdin.flush()
        return self._number

    def _answer(self, number: int, deadline: float) -> Any:
        def found() -> list[dict[str, Any]]:
            return [fact for fact in self.facts if fact.get("answer") == number]

        return wait_until(found, f"answer {number}", deadline=deadline)[0]["result"]

    def wait_begun(self, count: int = 1) -> None:
        """Wait until the application has begun so many requests for /slow and /block."""
        wait_until(lambda: sum(fact.get("event") == "begun" for fact in self.facts) >= count, f"{count} have begun")

    def do(self, code: str, deadline: float = 10.0) -> Any:
        """Have the primary do something; the value."""
        return self._answer(self._ask(code), deadline)

    def at(self, id: int, code: str, deadline: float = 10.0) -> Any:
        """Have a worker do something; the value."""
        self._number += 1
        number = self._number
        self.do(f"at({id}, {number}, {json.dumps(code)})")
        return self._answer(number, deadline)

    def fork(self, count: int = 1, **env: str) -> list[int]:
        """Start workers and wait until they are online; their ids."""
        ids: list[int] = self.do(f"fork({count}, **{env!r})" if env else f"fork({count})")
        assert isinstance(ids, list), ids
        wait_until(lambda: set(ids) <= {fact["id"] for fact in self.events("online")}, f"{ids} are online")
        return ids

    def serve(self, *ids: int, port: int = 0, **options: Any) -> int:
        """Have workers serve on the same address; the port."""
        ports = {self.at(id, f"serve({port}, **{options!r})" if options else f"serve({port})") for id in ids}
        assert len(ports) == 1, ports
        found: int = ports.pop()
        assert isinstance(found, int), found
        return found

    def pid(self, id: int) -> int:
        """A worker's process."""
        found: int = self.do(f"cluster.workers[{id}].process.pid")
        return found

    def events(self, event: str, id: int | None = None, level: str = "cluster") -> list[dict[str, Any]]:
        """The events of a kind, of a worker or of all."""
        return [
            fact for fact in self.facts
            if fact.get("event") == event and fact["level"] == level and id in (None, fact.get("id"))
        ]  # fmt: skip

    def wait_event(
        self, event: str, id: int | None = None, level: str = "cluster", deadline: float = 15.0, count: int = 1
    ) -> dict[str, Any]:
        """Wait for an event; the last of them."""
        what = f"{count} x {event} of {id}"
        wait_until(lambda: len(self.events(event, id, level)) >= count, what, deadline=deadline)
        return self.events(event, id, level)[-1]

    def wait_exit(self, id: int, deadline: float = 15.0) -> tuple[int | None, str | None, bool]:
        """Wait for a worker's end: its code, its signal, and whether it had been asked to go."""
        fact = self.wait_event("exit", id, deadline=deadline)
        (_, code), (_, name) = fact["arguments"]
        return code, name, fact["asked"]


def who(port: int, path: str = "/", timeout: float = 10.0) -> dict[str, Any]:
    """Ask on a new connection who answers."""
    answer: Answer = request(port, "GET", path, timeout=timeout)
    assert answer.status == 200
    facts: dict[str, Any] = answer.json
    return facts


StartLab = Callable[..., Lab]
StartProgram = Callable[..., Program]
