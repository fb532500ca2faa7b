"""The parent of the generator: forks the processes, shows how far they are, and merges what they saw."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from sharedcluster.errors import UserError
from sharedcluster.load.client import Generator
from sharedcluster.load.plan import Plan, Tally

Progress = Callable[[int, int, float], None]
"""Called with the answers and errors so far, and the seconds."""


class LoadError(UserError):
    """The test could not be run."""

    exit_code = 1


@dataclass(slots=True)
class Outcome:
    """What a load test came to. `machine_busy` is the share of all CPUs of this machine that was in use."""

    plan: Plan
    tally: Tally
    machine_busy: float
    is_local: bool
    interrupted: bool = False


@dataclass(slots=True)
class _Child:
    pid: int
    fd: int
    unread: bytes = b""
    answered: int = 0
    errors: int = 0
    tally: Tally | None = None
    failure: str = ""
    open: bool = field(default=True)


def run(plan: Plan, progress: Progress) -> Outcome:
    """Run a load test to its end, or until Ctrl+C, which ends it early and keeps what was seen.

    Raises:
        LoadError: The target's name is unknown, or nobody listens there, or a process of the generator died.
    """
    address = _resolve(plan)
    _probe(plan, address)
    before = _machine_times()
    children = [_fork(plan, index, address) for index in range(plan.processes)]
    interrupted = _attend(children, progress)
    busy = _busy_share(before, _machine_times())
    total = Tally()
    for child in children:
        with suppress(ChildProcessError):
            os.waitpid(child.pid, 0)
        if child.tally is None:
            raise LoadError("A process of the generator died.", fact=child.failure)
        total.merge(child.tally)
    return Outcome(plan, total, busy, _is_local(address), interrupted)


def _resolve(plan: Plan) -> tuple[int, tuple[object, ...]]:
    target = plan.target
    try:
        family, _, _, _, address = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise LoadError(f"{target.host} is unknown: {error.strerror}.") from error
    return family, address


def _probe(plan: Plan, address: tuple[int, tuple[object, ...]]) -> None:
    """One connection, so that a wrong port is said at once and not a thousand times."""
    with socket.socket(address[0], socket.SOCK_STREAM) as probe:
        probe.settimeout(plan.timeout)
        try:
            probe.connect(address[1])
        except OSError as error:
            where = f"{plan.target.host}:{plan.target.port}"
            raise LoadError(f"Nobody answers at {where}: {error.strerror or error}.") from error


def _fork(plan: Plan, index: int, address: tuple[int, tuple[object, ...]]) -> _Child:
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _generate(plan, index, address, write)
    os.close(write)
    return _Child(pid, read)


def _generate(plan: Plan, index: int, address: tuple[int, tuple[object, ...]], pipe: int) -> NoReturn:
    def say(**facts: object) -> None:
        data = json.dumps(facts).encode() + b"\n"
        while data:
            data = data[os.write(pipe, data) :]

    code = 1
    try:
        generator = Generator(plan, index, address, lambda answered, errors: say(answered=answered, errors=errors))
        signal.signal(signal.SIGINT, lambda _number, _frame: generator.stop())
        say(tally=generator.run().to_json())
        code = 0
    except BaseException:
        say(failure=traceback.format_exc())
    finally:
        os._exit(code)


def _attend(children: list[_Child], progress: Progress) -> bool:
    """Read what the processes say until all are done; returns whether Ctrl+C ended it."""
    began = time.monotonic()
    interrupted = False
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.fd, selectors.EVENT_READ, child)
        while any(child.open for child in children):
            try:
                for key, _ in selector.select(0.5):
                    _read(key.data, selector)
                progress(
                    sum(c.answered for c in children), sum(c.errors for c in children), time.monotonic() - began
                )  # fmt: skip
            except KeyboardInterrupt:
                interrupted = True
                for child in children:  # the terminal told them too, but not a `kill -INT` of us alone
                    with suppress(ProcessLookupError):
                        os.kill(child.pid, signal.SIGINT)
    return interrupted


def _read(child: _Child, selector: selectors.BaseSelector) -> None:
    data = os.read(child.fd, 1 << 20)
    if not data:
        selector.unregister(child.fd)
        os.close(child.fd)
        child.open = False
        return
    *lines, child.unread = (child.unread + data).split(b"\n")
    for line in lines:
        facts = json.loads(line)
        if "tally" in facts:
            child.tally = Tally.from_json(facts["tally"])
            child.answered, child.errors = child.tally.answered, child.tally.errors.total()
        elif "failure" in facts:
            child.failure = facts["failure"]
        else:
            child.answered, child.errors = facts["answered"], facts["errors"]


# -- the machine -------------------------------------------------------------------------------------------------


def _machine_times() -> tuple[float, float]:
    """Idle and total time of all CPUs (proc_stat(5)); equal numbers where that cannot be read."""
    try:
        numbers = [float(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0.0, 0.0
    return numbers[3] + numbers[4], sum(numbers)


def _busy_share(before: tuple[float, float], after: tuple[float, float]) -> float:
    total = after[1] - before[1]
    return 1.0 - (after[0] - before[0]) / total if total > 0 else 0.0


def _is_local(address: tuple[int, tuple[object, ...]]) -> bool:
    host = str(address[1][0])
    return host.startswith("127.") or host == "::1"
