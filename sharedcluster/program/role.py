"""Which process this is. Read once, when somebody first asks; the entry of a worker says it before the script runs."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from typing import Final

VARIABLE: Final = "SHAREDCLUSTER_CHANNEL"
"""How a new process learns what it is; removed from the environment at once, so that its children are nobody."""

BLOCKED_AT_START: Final = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM)
"""Signals that a worker is started with as blocked, and unblocks when it can handle them."""


@dataclass(frozen=True, slots=True)
class WorkerRole:
    """What the primary tells a worker it starts. The numbers that end in `_fd` are open descriptors."""

    id: int
    slot: int
    wire_fd: int
    messages_fd: int
    board_fd: int
    row: int
    serialization: str
    graceful_timeout: float
    exec: str


@dataclass(frozen=True, slots=True)
class ChildRole:
    """What `child_process.fork` tells the program it starts."""

    messages_fd: int
    serialization: str
    parent_pid: int


def as_variable(role: WorkerRole | ChildRole) -> str:
    """The text for the new process's environment."""
    return json.dumps([type(role).__name__, asdict(role)])


def take_from_environment() -> WorkerRole | ChildRole | None:
    """What this process was told to be; the second call finds nothing, and neither does a child of this process."""
    text = os.environ.pop(VARIABLE, "")
    if not text:
        return None
    name, fields = json.loads(text)
    return WorkerRole(**fields) if name == WorkerRole.__name__ else ChildRole(**fields)


def runs_under_the_command() -> bool:
    """Whether `sharedcluster run` loads the application in this process: a worker of its, its mold, or its check."""
    return "sharedcluster.cluster.loading" in sys.modules
