"""Signals to the primary: what each means, and the pipe by which they reach its loop.

A handler does nothing; Python's wake-up descriptor writes the signal's number into a pipe that the loop watches, so
a signal is an ordinary event, handled between two others and never in the middle of one.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any, Final

INTENTS: Final[dict[signal.Signals, tuple[str, str]]] = {
    signal.SIGTERM: ("drain", "drain and stop"),
    signal.SIGINT: ("interrupt", "drain and stop; the second one stops now"),
    signal.SIGQUIT: ("stop_now", "stop now"),
    signal.SIGHUP: ("reload", "rolling reload: a new generation first, then the old one drains"),
    signal.SIGTTIN: ("scale_up", "one worker more"),
    signal.SIGTTOU: ("scale_down", "one worker fewer"),
    signal.SIGUSR1: ("reopen_logs", "open the log files anew"),
    signal.SIGUSR2: ("upgrade", "replace the primary's program on the same sockets, without a gap"),
    signal.SIGCHLD: ("reap", "a child ended"),
}
"""Signal -> the name of the primary's handler (`on_<name>`) and what an operator reads about it."""


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Let the wake-up descriptor do the work."""


class SignalPipe:
    """The read end is watched by the loop; `read` tells which signals came."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous: dict[signal.Signals, Any] = {}

    def fileno(self) -> int:
        """What the loop watches."""
        return self._read

    def install(self) -> None:
        """Take over the process's signals."""
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in INTENTS:
            self._previous[number] = signal.signal(number, _ignore)

    def restore(self) -> None:
        """Give them back, as a child that the primary forks needs them."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def read(self) -> list[signal.Signals]:
        """The signals since the last reading, in order."""
        with suppress(BlockingIOError):
            return [signal.Signals(number) for number in os.read(self._read, 4096) if number in _KNOWN]
        return []

    def close(self) -> None:
        """Close both ends."""
        os.close(self._read)
        os.close(self._write)


_KNOWN: Final = frozenset(int(number) for number in INTENTS)


def as_table() -> str:
    """The table for --help and the docs."""
    rows = [f"  {number.name[3:]:<6} {text}" for number, (name, text) in INTENTS.items() if name != "reap"]
    return "\n".join(rows)
