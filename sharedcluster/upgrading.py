"""Replacing the primary's own program without a gap (USR2): a new one takes over the listening sockets.

    old                                    new
     |-- fork, exec with the sockets ------>|
     |                                      | loads, forks its workers; both accept for a moment
     |<------------- "ready" ---------------|
     | gives up control socket, stops       |
     | accepting, drains                    |
     |--------------- "go" ---------------->|
     | exits when its workers have left     | takes the control socket and the pid file

If the new one does not get ready, the old one has lost nothing and goes on. A private Redis stays: the new primary
inherits the lifeline, so its keeper sees that the cluster lives. The old primary's pid goes away, which ends a
container whose first process it is: there a reload (HUP) is the way.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Final, NoReturn

from sharedcluster.cluster import events
from sharedcluster.cluster.primary import Primary
from sharedcluster.config import BindAddress
from sharedcluster.log import logger

VARIABLE: Final = "SHAREDCLUSTER_UPGRADE"
PATIENCE: Final = 120.0
"""Seconds after which another USR2 gives up on a new program that has not said anything."""


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What the new program gets: descriptors by their numbers, and what they are."""

    name: str
    listeners: tuple[tuple[int, BindAddress], ...]
    channel_fd: int
    redis_url: str = ""
    lifeline_fd: int = -1

    def to_text(self) -> str:
        """As an environment variable holds it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> Inheritance | None:
        """What our predecessor left us; read once and removed, so that no worker takes it for its own."""
        text = os.environ.pop(VARIABLE, "")
        if not text:
            return None
        facts = json.loads(text)
        listeners = tuple((fd, BindAddress(**address)) for fd, address in facts["listeners"])
        heir = cls(facts["name"], listeners, facts["channel_fd"], facts["redis_url"], facts["lifeline_fd"])
        for fd in heir.descriptors:
            os.set_inheritable(fd, False)
        return heir

    @property
    def descriptors(self) -> list[int]:
        """Every descriptor that passes on."""
        return [fd for fd in (*(fd for fd, _ in self.listeners), self.channel_fd, self.lifeline_fd) if fd >= 0]


class Predecessor:
    """The side of the primary that is to be replaced. `lifeline_fd` is -1 without a private Redis."""

    def __init__(self, primary: Primary, redis_url: str, lifeline_fd: int) -> None:
        self._primary = primary
        self._redis_url = redis_url
        self._lifeline_fd = lifeline_fd
        self._channel: socket.socket | None = None
        self._pid = 0
        self._began_at = 0.0
        primary.events.on(events.UPGRADE, self.begin)
        primary.events.on(events.REAPED, self._reaped)

    def begin(self) -> None:
        """Start the new program."""
        if os.getpid() == 1:
            logger.error("this is process 1: the container would end with it. Use HUP to load new code")
            return
        if self._pid and time.monotonic() - self._began_at < PATIENCE:
            logger.warning("an upgrade is on its way (pid %d)", self._pid)
            return
        self._abandon()
        ours, theirs = socket.socketpair()
        listeners = self._primary.hand_off.listeners
        inheritance = Inheritance(
            name=self._primary.name,
            listeners=tuple((each.socket.fileno(), each.address) for each in listeners),
            channel_fd=theirs.fileno(),
            redis_url=self._redis_url,
            lifeline_fd=self._lifeline_fd,
        )
        for listener in listeners:
            listener.is_lent = True
        self._pid = self._start(inheritance)
        self._began_at = time.monotonic()
        theirs.close()
        self._channel = ours
        self._primary.watch(ours.fileno(), lambda _mask: self._heard())
        logger.info("upgrading: the new program is pid %d", self._pid)

    def _start(self, inheritance: Inheritance) -> int:
        environment = {**os.environ, **self._primary.notifier.environment(), VARIABLE: inheritance.to_text()}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        pid = os.fork()
        if pid == 0:
            self._become(inheritance, environment, mask)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid

    def _become(
        self, inheritance: Inheritance, environment: dict[str, str], mask: set[int | signal.Signals]
    ) -> NoReturn:
        try:
            for fd in inheritance.descriptors:
                os.set_inheritable(fd, True)
            signal.set_wakeup_fd(-1)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            # As we were started, with the interpreter that is there now: the point of it is that both may be newer.
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
        finally:
            os._exit(127)

    def _heard(self) -> None:
        assert self._channel is not None
        with suppress(OSError):
            if self._channel.recv(16).startswith(b"ready"):
                self._primary.hand_over()
                self._channel.sendall(b"go\n")
                self._forget()
                return
        self._abandon()

    def _reaped(self, pid: int, status: int) -> None:
        if pid == self._pid:
            code = os.waitstatus_to_exitcode(status)
            logger.error("the new program ended (%d) before it was ready; this one goes on", code)
            self._pid = 0
            self._forget()

    def _abandon(self) -> None:
        """End a new program that closed the channel or took too long; nothing has been given to it for good."""
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)
        self._forget()

    def _forget(self) -> None:
        if self._channel is not None:
            self._primary.unwatch(self._channel.fileno())
            self._channel.close()
            self._channel = None


class Successor:
    """The side of the primary that takes over; emits `TAKEN_OVER` once the old one has let go of its place."""

    def __init__(self, primary: Primary, channel_fd: int) -> None:
        self._primary = primary
        self._channel = socket.socket(fileno=channel_fd)
        primary.events.on(events.READY, self._ready)

    def _ready(self, _workers: int) -> None:
        with suppress(OSError):
            self._channel.sendall(b"ready\n")
        self._primary.watch(self._channel.fileno(), lambda _mask: self._heard())

    def _heard(self) -> None:
        with suppress(OSError):
            self._channel.recv(16)  # "go", or the end of the stream: the old one is gone, so its place is free too
        self._primary.unwatch(self._channel.fileno())
        self._channel.close()
        self._primary.events.emit(events.TAKEN_OVER)
