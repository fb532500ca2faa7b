"""`child_process.fork`: start any Python program with a message channel to it, as people do beside `cluster` in Node.

    from sharedcluster import child_process

    child = child_process.fork("resize.py", ["photo.jpg"])
    child.on("message", print)
    child.send({"width": 640})

and in resize.py:

    parent = child_process.parent
    parent.on("message", lambda wish: parent.send(resize(wish)))

It works in a plain process (a primary, a script: the loop runs at its end, or in `child.wait()`) and in one that
gevent has patched (a worker: nothing there stops while a child works). The rest of Node's child_process is Python's
own `subprocess`, which in a worker is gevent's; docs/from-node.md shows each of its ways.
"""

from __future__ import annotations

import _socket
import os
import signal as signals
import socket
import stat
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from sharedcluster.log import logger
from sharedcluster.program.channel import Channel, OnSent
from sharedcluster.program.emitter import Events
from sharedcluster.program.frames import serialization as by_name
from sharedcluster.program.loops import current_loop
from sharedcluster.program.output import Output
from sharedcluster.program.role import VARIABLE, ChildRole, as_variable, take_from_environment

if TYPE_CHECKING:
    parent: Parent | None
    """Who started this process with `fork`, or None."""

__all__ = ["ChildProcess", "Parent", "fork", "parent"]


def fork(
    module: str | os.PathLike[str],
    args: Sequence[str] = (),
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    exec_argv: Sequence[str] | None = None,
    silent: bool = False,
    serialization: str = "json",
) -> ChildProcess:
    """Start a Python program in a process of its own, with a channel for messages both ways.

    Args:
        module: A file, or `-m package.module`.
        args: Its arguments.
        env: Variables on top of this process's.
        cwd: Its folder.
        exec_argv: Options of the interpreter; None takes this one's.
        silent: Take what it writes, as events `stdout` and `stderr` (bytes), instead of passing it through.
        serialization: `json`, or `msgpack` (extra `fast`).

    Raises:
        OSError: The process cannot be started.
        ConfigError: The serialization is unknown, or its package is missing.
    """
    how = by_name(serialization)
    name = os.fspath(module)
    start = ["-m", name[len("-m ") :].strip()] if name.startswith("-m ") else [name]
    options = subprocess._args_from_interpreter_flags() if exec_argv is None else exec_argv  # type: ignore[attr-defined]
    ours, theirs = socket.socketpair()
    taken = subprocess.PIPE if silent else None
    with theirs:
        role = ChildRole(theirs.fileno(), serialization, os.getpid())
        process = subprocess.Popen(
            [sys.executable, *options, *start, *args], env={**os.environ, **(env or {}), VARIABLE: as_variable(role)},
            cwd=cwd, stdout=taken, stderr=taken, pass_fds=(role.messages_fd,),
        )  # fmt: skip
    return ChildProcess(process, _socket.socket(fileno=ours.detach()), how)


class ChildProcess(Events):
    """A child, as `fork` returns it. Events: message, disconnect, exit (code, signal), error, stdout, stderr.

    Attributes:
        pid: Its process.
        exit_code: None while it lives, and if a signal ended it.
        signal_code: The name of the signal that ended it, or None.
    """

    EVENTS = ("message", "disconnect", "exit", "error", "stdout", "stderr")

    def __init__(self, process: subprocess.Popen[bytes], end: _socket.socket, how: Any) -> None:
        super().__init__()
        self.pid = process.pid
        self.exit_code: int | None = None
        self.signal_code: str | None = None
        self._process = process
        self._loop = current_loop()
        self._line = self._loop.line()
        self._is_dead = False
        self._channel = Channel(end, self._loop, how, self._on_message, self._on_closed)
        self._channel.on_error = self._on_error
        self._outputs = [
            Output(self._loop, pipe.fileno(), partial(self._emit, name))
            for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr))
            if pipe is not None
        ]
        self._loop.when_exited(process, self._on_exit)

    def __repr__(self) -> str:
        return f"<child pid={self.pid}>"

    def send(self, message: Any, callback: OnSent | None = None) -> bool:
        """Send a message; see `cluster.worker.send`."""
        return self._channel.send(message, callback)

    def is_connected(self) -> bool:
        """Whether messages can go both ways."""
        return self._channel.is_open

    def is_dead(self) -> bool:
        """Whether it has ended."""
        return self._is_dead

    def disconnect(self) -> None:
        """Close the channel when what was sent has left; a child that only waits for messages ends then."""
        self._channel.finish()

    def kill(self, signal: str | int = "SIGTERM") -> bool:
        """Send it a signal; False if it has ended already."""
        number = signals.Signals[signal] if isinstance(signal, str) else signals.Signals(signal)
        if self._is_dead:
            return False
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until it has ended and its events were told.

        Returns:
            Its exit code; None if a signal ended it (`signal_code` says which).

        Raises:
            TimeoutError: `timeout` seconds passed first.
        """
        if not self._loop.run_until(lambda: self._is_dead, timeout):
            raise TimeoutError(f"the child with pid {self.pid} has not ended within {timeout} s")
        return self.exit_code

    def _emit(self, event: str, *arguments: object) -> None:
        self._line(lambda: self.emit(event, *arguments))

    def _on_message(self, message: Any, taken: Callable[[bool], None]) -> None:
        def deliver() -> None:
            heard = self.has_observer("message")
            self.emit("message", message)
            taken(heard)

        self._line(deliver)

    def _on_closed(self) -> None:
        self._emit("disconnect")

    def _on_error(self, error: Exception) -> None:
        if self.has_observer("error"):
            self._emit("error", error)
        else:
            logger.warning("a message to the child with pid %d was not delivered: %s", self.pid, error)

    def _on_exit(self, code: int | None, signal: str | None) -> None:
        self._channel.read_rest()
        self._channel.close()
        for output in self._outputs:
            output.read_rest()

        def tell() -> None:
            self.exit_code, self.signal_code, self._is_dead = code, signal, True
            self.emit("exit", code, signal)

        self._line(tell)


class Parent(Events):
    """The process that started this one. Events: message, disconnect, error.

    Who listens to `message` or `disconnect` stays alive after its last line until the parent disconnects or ends; in a
    process patched by gevent, where the last line is the end, `wait` does that.
    """

    EVENTS = ("message", "disconnect", "error")

    def __init__(self, told: ChildRole) -> None:
        super().__init__()
        self._loop = current_loop()
        self._line = self._loop.line()
        self._early: deque[tuple[Any, Callable[[bool], None]]] = deque()
        self._holds = False
        end = _socket.socket(fileno=told.messages_fd)
        self._channel = Channel(end, self._loop, by_name(told.serialization), self._on_message, self._on_closed)
        self._channel.on_error = lambda error: self.emit("error", error)

    def send(self, message: Any, callback: OnSent | None = None) -> bool:
        """Send a message; see `cluster.worker.send`."""
        return self._channel.send(message, callback)

    def is_connected(self) -> bool:
        """Whether messages can go both ways."""
        return self._channel.is_open

    def disconnect(self) -> None:
        """Close the channel when what was sent has left."""
        self._channel.finish()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, with handlers being called, until the channel is closed; False after `timeout` seconds."""
        return self._loop.run_until(lambda: not self._channel.is_open, timeout)

    def _observed(self, event: str) -> None:
        if event in ("message", "disconnect") and not self._holds and self._channel.is_open:
            self._holds = True
            self._loop.hold(1)
        while event == "message" and self._early:
            self._on_message(*self._early.popleft())

    def _on_message(self, message: Any, taken: Callable[[bool], None]) -> None:
        if not self.has_observer("message"):
            self._early.append((message, taken))  # the program may not have come that far yet
            return

        def deliver() -> None:
            if self.has_observer("message"):
                self.emit("message", message)
                taken(True)
            else:  # `once` has had its message: the others wait for the next observer
                self._early.append((message, taken))

        self._line(deliver)

    def _on_closed(self) -> None:
        if self._holds:
            self._holds = False
            self._loop.hold(-1)
        self._line(lambda: self.emit("disconnect"))


@cache
def _parent() -> Parent | None:
    told = take_from_environment()
    if not isinstance(told, ChildRole) or told.parent_pid != os.getppid():
        return None  # a stranger's: a program in between has passed its environment on
    with suppress(OSError):
        if stat.S_ISSOCK(os.fstat(told.messages_fd).st_mode):
            os.set_inheritable(told.messages_fd, False)
            return Parent(told)
    return None


def __getattr__(name: str) -> Any:
    """`parent` is found out on first use."""
    if name == "parent":
        return _parent()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
