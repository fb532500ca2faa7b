"""What turns in a process that is not patched by gevent: one selector, in the main thread.

A Node program stays alive for as long as its event loop has something to wait for. So here: the loop runs when the
script calls `cluster.run()`, or at the interpreter's exit if it did not, and it ends when nothing holds it: no worker,
no child, no timer. Handlers are called in the loop, one after the other; nothing of this runs in another thread.

`gevent_loop` offers the same for patched processes (`Loop` is what both are).
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, Final, Protocol

from sharedcluster.errors import Bug, ClusterStoppingError, ConfigError
from sharedcluster.log import logger

Job = Callable[[], None]
OnExit = Callable[[int | None, str | None], None]
"""Called with the exit code, or None and the name of the signal that ended the process."""

EXIT_POLL: Final = 0.05
"""Seconds between two looks at a process where the kernel has no pidfd."""
_LONG: Final = 60.0


class Watch(Protocol):
    """A descriptor that is watched."""

    def reads(self, wanted: bool) -> None:
        """Call `on_readable` when there is something to read, or do not."""

    def writes(self, on_writable: Job | None) -> None:
        """Call this when there is room to write; None stops it."""

    def close(self) -> None:
        """Watch no more; the descriptor stays open."""


class Timer(Protocol):
    """A call that is to come."""

    def cancel(self) -> None:
        """It does not come; cancelling twice, or after it came, does nothing."""


class Loop(Protocol):
    """What channels and processes need of a loop."""

    def watch(self, fd: int, on_readable: Job) -> Watch:
        """Watch a descriptor, for reading at first."""

    def call_soon(self, job: Callable[..., object], *arguments: object) -> None:
        """Call it in the next turn."""

    def call_later(self, seconds: float, job: Callable[..., object], *arguments: object) -> Timer:
        """Call it once, so many seconds from now."""

    def when_exited(self, process: subprocess.Popen[bytes], then: OnExit) -> None:
        """Reap a process and tell how it ended."""

    def line(self) -> Callable[[Job], None]:
        """A line of jobs that run one after the other, where they may wait if the loop is gevent's."""

    def hold(self, more: int) -> None:
        """One thing more (1) or less (-1) to stay alive for."""

    def run_until(self, is_over: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait for a condition; False if `timeout` seconds passed first."""


def how_it_ended(returncode: int) -> tuple[int | None, str | None]:
    """An exit code, or the name of a signal, from what `subprocess` says."""
    if returncode >= 0:
        return returncode, None
    try:
        return None, signal.Signals(-returncode).name
    except ValueError:
        return None, f"SIG{-returncode}"


class _Watch:
    """One registration in the selector."""

    def __init__(self, selector: selectors.BaseSelector, fd: int, on_readable: Job) -> None:
        self._selector = selector
        self._fd = fd
        self._on_readable = on_readable
        self._on_writable: Job | None = None
        self._events = 0
        self.reads(True)

    def reads(self, wanted: bool) -> None:
        self._set(self._events | selectors.EVENT_READ if wanted else self._events & ~selectors.EVENT_READ)

    def writes(self, on_writable: Job | None) -> None:
        self._on_writable = on_writable
        self._set(self._events | selectors.EVENT_WRITE if on_writable else self._events & ~selectors.EVENT_WRITE)

    def close(self) -> None:
        self._set(0)
        self._fd = -1

    def _set(self, events: int) -> None:
        if events == self._events or self._fd < 0:
            return
        if not self._events:
            self._selector.register(self._fd, events, self._on_ready)
        elif events:
            self._selector.modify(self._fd, events, self._on_ready)
        else:
            self._selector.unregister(self._fd)
        self._events = events

    def _on_ready(self, mask: int) -> None:
        if mask & self._events & selectors.EVENT_WRITE and self._on_writable:
            self._on_writable()
        if mask & self._events & selectors.EVENT_READ:
            self._on_readable()


class _Timer:
    def __init__(self, loop: SelectorLoop, job: Callable[..., object], arguments: tuple[object, ...]) -> None:
        self._loop = loop
        self._job: Callable[..., object] | None = job
        self._arguments = arguments

    def cancel(self) -> None:
        if self._job is not None:
            self._job = None
            self._loop.hold(-1)

    def fire(self) -> None:
        job = self._job
        if job is not None:
            self.cancel()
            self._loop.guarded(job, *self._arguments)


class SelectorLoop:
    """`Loop` of a plain process; one per process, made by `current_loop`.

    `before_wait` are asked before each wait for how long it may last; `after_wait` are called after it.
    """

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.before_wait: list[Callable[[float], float]] = []
        self.after_wait: list[Job] = []
        self.when_leaving: list[Callable[[bool], None]] = []
        """Called when the process is to end while the loop is held: by a signal or by an exception (False), and by a
        second signal (True): now."""
        self._timers: list[tuple[float, int, _Timer]] = []
        self._count = itertools.count()
        self._soon: deque[tuple[Callable[..., object], tuple[object, ...]]] = deque()
        self._held = 0
        self._is_running = False
        self._is_leaving = False
        self._was_left = False
        self._exit_code: int | None = None
        self._signals = _Signals(self)
        _at_exit(self)

    # -- what `Loop` promises --------------------------------------------------------------------------------------

    def watch(self, fd: int, on_readable: Job) -> Watch:
        """See `Loop`."""
        return _Watch(self.selector, fd, on_readable)

    def call_soon(self, job: Callable[..., object], *arguments: object) -> None:
        """See `Loop`."""
        self._soon.append((job, arguments))

    def call_later(self, seconds: float, job: Callable[..., object], *arguments: object) -> Timer:
        """See `Loop`."""
        timer = _Timer(self, job, arguments)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._count), timer))
        self.hold(1)
        return timer

    def when_exited(self, process: subprocess.Popen[bytes], then: OnExit) -> None:
        """See `Loop`."""
        self.hold(1)

        def reap() -> bool:
            if process.poll() is None:
                return False
            self.hold(-1)
            then(*how_it_ended(process.returncode))
            return True

        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            self._poll(reap)
            return
        watch: list[Watch] = []

        def on_readable() -> None:
            if process.poll() is not None:
                watch.pop().close()
                os.close(pidfd)
                reap()

        watch.append(self.watch(pidfd, on_readable))

    def _poll(self, reap: Callable[[], bool]) -> None:
        if not reap():
            self.call_later(EXIT_POLL, self._poll, reap)

    def line(self) -> Callable[[Job], None]:
        """See `Loop`."""
        return lambda job: self.guarded(job)

    def hold(self, more: int) -> None:
        """See `Loop`."""
        self._held += more
        if self._held < 0:
            raise Bug("the loop was let go of more often than it was held")

    # -- running ---------------------------------------------------------------------------------------------------

    def guarded(self, job: Callable[..., object], *arguments: object) -> None:
        """Call what belongs to the user: what it raises is logged and ends nothing, SystemExit excepted."""
        try:
            job(*arguments)
        except ClusterStoppingError as error:
            logger.debug("%s", error)  # a timer that forks, on the way out
        except Exception:
            logger.exception("a handler failed")

    @property
    def is_held(self) -> bool:
        """Whether there is anything to wait for."""
        return bool(self._held or self._soon)

    def run(self) -> None:
        """Turn until nothing holds it. SystemExit raised by a handler passes through."""
        self.run_until(lambda: not self.is_held)

    def run_until(self, is_over: Callable[[], bool], timeout: float | None = None) -> bool:
        """See `Loop`."""
        if self._is_running:
            raise RuntimeError("The loop runs already: it called the handler you are in.")
        end = None if timeout is None else time.monotonic() + timeout
        self._is_running = True
        self._signals.install()
        try:
            while not is_over():
                if end is not None and time.monotonic() >= end:
                    return False
                self._turn(end)
        except SystemExit:  # a handler's sys.exit(): the process goes, and does not turn again at its exit
            self._was_left = True
            raise
        finally:
            self._is_running = False
            self._signals.restore()
        return True

    def _turn(self, end: float | None) -> None:
        for job, arguments in [self._soon.popleft() for _ in range(len(self._soon))]:
            self.guarded(job, *arguments)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2].fire()
        wait = min((limit(now) for limit in self.before_wait), default=_LONG)
        wait = min(wait, self._timers[0][0] - now if self._timers else _LONG, _LONG if end is None else end - now)
        # With nothing held this turn is the last: what came by itself is taken, nothing is waited for.
        for key, mask in self.selector.select(0 if self._soon or not self._held else max(0.0, wait)):
            key.data(mask)
        for job in self.after_wait:
            job()

    def on_signal(self, number: signal.Signals) -> None:
        """TERM, INT or QUIT, for which the script has no handler of its own."""
        if not self.when_leaving:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)  # as if the loop had not been there
        at_once = self._is_leaving or number is signal.SIGQUIT
        self._leave(at_once)

    def _leave(self, at_once: bool) -> None:
        self._is_leaving = True
        for job in self.when_leaving:
            job(at_once)

    # -- the end of the script -------------------------------------------------------------------------------------

    def at_exit(self) -> None:
        """The script's last line was reached, or it raised: turn on for as long as there is something to wait for."""
        if not self.is_held or self._is_running or self._was_left:
            return
        try:
            # The interpreter leaves the exception that ended the script there, whatever excepthook is installed.
            if getattr(sys, "last_value", None) is not None:
                self._leave(at_once=False)
            self.run()
        except SystemExit as stop:
            self._exit_code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException as error:
            self._exit_code = 1
            sys.excepthook(type(error), error, error.__traceback__)

    def last_of_all(self) -> None:
        """An exit handler cannot change the exit code of the interpreter, so that is done by hand."""
        if self._exit_code is not None:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            os._exit(self._exit_code)


class _Signals:
    """TERM, INT and others while the loop runs: they wake it, and what they mean happens between two turns.

    A handler that the script installed with `signal.signal` is called in the loop, not in the middle of it. Where the
    script has none, TERM and INT mean what they mean to `sharedcluster run`: drain, and the second one: stop.
    """

    def __init__(self, loop: SelectorLoop) -> None:
        self._loop = loop
        self._previous: dict[signal.Signals, Any] = {}
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watch: Watch | None = None
        self._wakeup = -1

    def install(self) -> None:
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._watch = self._loop.watch(self._read, self._on_readable)
        for number in _OURS:
            handler = signal.getsignal(number)
            is_default = handler in (signal.SIG_DFL, signal.default_int_handler)
            if callable(handler) or (is_default and number in _ENDING):
                self._previous[number] = handler
                signal.signal(number, _wake)

    def restore(self) -> None:
        if self._watch is not None:
            self._watch.close()
        for number, handler in self._previous.items():
            if signal.getsignal(number) is _wake:  # or a handler of the script's has been installed meanwhile
                signal.signal(number, handler)
        self._previous.clear()
        with suppress(ValueError):
            signal.set_wakeup_fd(self._wakeup)

    def _on_readable(self) -> None:
        with suppress(BlockingIOError):
            for byte in os.read(self._read, 4096):
                self._call(byte)

    def _call(self, byte: int) -> None:
        handler = self._previous.get(signal.Signals(byte)) if byte in _KNOWN else None
        if handler is None:
            return
        if callable(handler) and handler is not signal.default_int_handler:
            self._loop.guarded(handler, byte, None)
        else:
            self._loop.on_signal(signal.Signals(byte))


_ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_OURS: Final = (*_ENDING, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_KNOWN: Final = frozenset(int(number) for number in signal.Signals)


def _wake(_number: int, _frame: FrameType | None) -> None:
    """Let the wake-up descriptor do the work."""


def _at_exit(loop: SelectorLoop) -> None:
    """Run the loop at the interpreter's exit. Exit handlers are called last in, first out."""
    atexit.register(loop.last_of_all)
    atexit.register(loop.at_exit)


# -- the loop of this process ------------------------------------------------------------------------------------

_current: list[Loop] = []


def current_loop() -> Loop:
    """The one loop of this process: gevent's hub where gevent has patched it, a selector elsewhere."""
    if not _current:
        monkey = sys.modules.get("gevent.monkey")
        if monkey is not None and monkey.is_module_patched("socket"):
            from sharedcluster.program.gevent_loop import GeventLoop  # only where gevent is loaded anyway

            _current.append(GeventLoop())
        else:
            _current.append(SelectorLoop())
    return _current[0]


def selector_loop() -> SelectorLoop:
    """The loop of a primary."""
    loop = current_loop()
    if not isinstance(loop, SelectorLoop):
        raise ConfigError(
            "This process is patched by gevent, and a primary is a plain process.",
            advice="Leave monkey.patch_all() out: workers are patched before the first line of your script.",
        )
    return loop
