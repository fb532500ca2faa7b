"""What turns in a process that gevent has patched: the hub. Callbacks run in it; jobs of a line run in a greenlet."""

from __future__ import annotations

import subprocess
from collections import deque
from collections.abc import Callable
from typing import Any

import gevent
from gevent.event import Event

from sharedcluster.log import logger
from sharedcluster.program.loops import Job, OnExit, Timer, Watch, how_it_ended


class _Watch:
    def __init__(self, fd: int, on_readable: Job) -> None:
        loop = gevent.get_hub().loop
        self._read: Any = loop.io(fd, 1)
        self._write: Any = loop.io(fd, 2)
        self._on_readable = on_readable
        self._is_open = True
        self.reads(True)

    def reads(self, wanted: bool) -> None:
        if self._is_open and wanted != self._read.active:
            self._read.start(self._on_readable) if wanted else self._read.stop()

    def writes(self, on_writable: Job | None) -> None:
        self._write.stop()
        if self._is_open and on_writable is not None:
            self._write.start(on_writable)

    def close(self) -> None:
        self._is_open = False
        for watcher in (self._read, self._write):
            watcher.stop()
            watcher.close()


class _Timer:
    def __init__(self, greenlet: gevent.Greenlet) -> None:
        self._greenlet = greenlet

    def cancel(self) -> None:
        if not self._greenlet.started or self._greenlet is not gevent.getcurrent():
            self._greenlet.kill(block=False)


class GeventLoop:
    """`Loop` on gevent's hub, which lives as long as the main greenlet: nothing holds it."""

    def watch(self, fd: int, on_readable: Job) -> Watch:
        """See `Loop`."""
        return _Watch(fd, on_readable)

    def call_soon(self, job: Callable[..., object], *arguments: object) -> None:
        """See `Loop`."""
        gevent.spawn(_guarded, job, *arguments)

    def call_later(self, seconds: float, job: Callable[..., object], *arguments: object) -> Timer:
        """See `Loop`."""
        return _Timer(gevent.spawn_later(seconds, _guarded, job, *arguments))

    def when_exited(self, process: subprocess.Popen[bytes], then: OnExit) -> None:
        """See `Loop`."""
        # gevent's Popen, since the process is patched: waiting for it stops this greenlet only.
        gevent.spawn(lambda: _guarded(then, *how_it_ended(process.wait())))

    def line(self) -> Callable[[Job], None]:
        """See `Loop`."""
        return _Line().add

    def hold(self, more: int) -> None:
        """See `Loop`."""

    def run_until(self, is_over: Callable[[], bool], timeout: float | None = None) -> bool:
        """See `Loop`."""
        over = Event()
        with gevent.Timeout(timeout, False):
            while not is_over():
                over.wait(0.02)
        return is_over()


class _Line:
    """Jobs in a greenlet, one after the other; the greenlet ends when there are none."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._is_running = False

    def add(self, job: Job) -> None:
        self._jobs.append(job)
        if not self._is_running:
            self._is_running = True
            gevent.spawn(self._run)

    def _run(self) -> None:
        try:
            while self._jobs:
                _guarded(self._jobs.popleft())
        finally:
            self._is_running = False


def _guarded(job: Callable[..., object], *arguments: object) -> None:
    """Call what belongs to the user; SystemExit goes to the main greenlet, as gevent does with it."""
    try:
        job(*arguments)
    except Exception:
        logger.exception("a handler failed")
