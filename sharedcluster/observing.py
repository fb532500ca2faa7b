"""The primary's side of the observer: start it, feed it events, start it again if it dies.

Nothing here may stop the primary: an event that does not fit into the observer's socket is dropped, counted and said.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from sharedcluster.cluster import events
from sharedcluster.cluster.primary import Primary
from sharedcluster.cluster.worker_handle import ExitReason, WorkerHandle
from sharedcluster.config import Config
from sharedcluster.hooks import HookCluster, HookWorker, encode
from sharedcluster.log import logger

PATIENCE: Final = 5.0
"""Seconds the observer has for the last events."""
MIN_UPTIME: Final = 1.0
_ROOM: Final = 1 << 20


@contextmanager
def observing(config: Config, primary: Primary) -> Iterator[None]:
    """Feed `config.hooks` while the primary runs; nothing at all without that setting."""
    if not config.hooks:
        yield
        return
    observer = Observer(config.hooks, primary)
    try:
        yield
        observer.tell("stop")
    finally:
        observer.close()


class Observer:
    """The process that calls the hooks, as the primary sees it."""

    def __init__(self, module: str, primary: Primary) -> None:
        self._module = module
        self._cluster = HookCluster(primary.name, os.getpid())
        self._lost = 0
        self._channel, self._process, self._started_at = self._start()
        on = primary.events.on
        for event in (events.FORK, events.ONLINE, events.LISTENING, events.DRAIN, events.DISCONNECT):
            on(event, lambda worker, event=event: self.tell(event, worker))
        on(events.EXIT, self._exited)
        on(events.READY, lambda _workers: self.tell("ready"))
        on(events.RELOAD, lambda _generation: self.tell("reload"))
        on(events.REAPED, self._reaped)

    def _start(self) -> tuple[socket.socket, subprocess.Popen[bytes], float]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
        with theirs:
            command = [sys.executable, "-m", "sharedcluster.hooks", self._module]
            process = subprocess.Popen(command, stdin=theirs.fileno())
        return ours, process, time.monotonic()

    def tell(self, event: str, worker: WorkerHandle | None = None, *rest: object) -> None:
        """Pass an event on, if there is room for it."""
        about = None if worker is None else HookWorker(worker.id, worker.slot, worker.generation, worker.pid)
        try:
            self._channel.send(encode(event, self._cluster, about, *rest))
        except OSError:
            self._lost += 1
            if self._lost == 1:
                logger.warning("the hooks do not keep up, or their process is gone: events are lost")

    def _exited(self, worker: WorkerHandle, reason: ExitReason) -> None:
        self.tell("exit", worker, reason.code, signal.Signals(reason.signal).name if reason.signal else None)

    def _reaped(self, pid: int, _status: int) -> None:
        if pid != self._process.pid:
            return
        self._process.returncode = 0  # the primary has reaped it: nobody else has to
        if time.monotonic() - self._started_at < MIN_UPTIME:
            logger.error("the process that calls the hooks ended as soon as it had begun; it is not started again")
            return
        logger.error("the process that calls the hooks ended; it is started again")
        self._channel.close()
        self._channel, self._process, self._started_at = self._start()

    def close(self) -> None:
        """No more events; wait for those on their way to be handled."""
        self._channel.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
            return
        logger.warning("the hooks did not come to an end in time")
        self._process.kill()
        self._process.wait()
