"""Our own clients as processes: start one, tell it to go, read what it saw."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from typing import Any, Final, NoReturn

from benchmarks import ROOT
from benchmarks.load.outcome import Outcome
from benchmarks.load.plan import Plan

READY_DEADLINE: Final = 40.0
"""Seconds to connect everybody: ten thousand connections take five on a machine that does nothing else."""


class Started:
    """A client that has connected and waits for the word.

    Raises:
        RuntimeError: It could not connect, in time or at all; with the last thing it said.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", f"benchmarks.load.{module}", *arguments]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        in_time = select.select([self._process.stdout], [], [], READY_DEADLINE)[0]
        if not in_time:
            self.end()
            raise RuntimeError(f"the load client was not connected within {READY_DEADLINE:.0f} s")
        if self._process.stdout.readline().strip() != "READY":
            self._fail(self._process.communicate(timeout=10)[1])

    def go(self) -> None:
        """Let it run."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self, timeout: float) -> dict[str, Any]:
        """Wait until it is done."""
        output, errors = self._process.communicate(timeout=timeout)
        if self._process.returncode:
            self._fail(errors)
        seen: dict[str, Any] = json.loads(output)
        return seen

    def _fail(self, errors: str) -> NoReturn:
        last = (errors.strip() or "it said nothing").splitlines()[-1]
        raise RuntimeError(f"the load client failed: {last[:200]}")

    def end(self) -> None:
        """End it, whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


def start(plan: Plan) -> Started:
    """A client of `load/client.py` that is ready."""
    return Started("client", plan.dumps())


def finish(client: Started, plan: Plan) -> Outcome:
    """Its outcome, after `go`."""
    return Outcome(**client.result(plan.seconds + 30))
