"""Where workers come from: a fork of the primary, or a fork of a mold that has loaded the application.

A mold is a child of the primary in which gevent is patched, the application is imported and the heap is frozen
(`gc.freeze`), so that the workers forked from it share its memory (`--preload`). There is one mold per generation: a
reload makes a new one, so preloading never serves stale code, and the primary stays clean.

Laws:

1. The primary is a subreaper (PR_SET_CHILD_SUBREAPER, prctl(2)): the mold forks twice and its child's parent leaves,
   so every worker becomes a child of the primary, which reaps it itself. A dead mold takes no worker with it.
2. `spawn` returns 0 while the process is not known yet, and None while the mold still loads: nothing was started
   then, and `reconcile` asks again.
3. A mold that dies or stands still before it is ready has failed like one whose application raised: a reload must
   end, one way or the other. Only one that was killed from outside is tried again, as a worker would be. After a
   failure the next attempt waits, longer each time.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from sharedcluster.cluster.forking import MoldContext, MoldMain, WorkerContext, WorkerMain, fork_child
from sharedcluster.cluster.ipc import ChannelClosed, MessageSocket
from sharedcluster.cluster.messages import Forked, ForkWorker, LoadFailed, MoldReady
from sharedcluster.cluster.supervision import DELAY_FACTOR, FIRST_DELAY, MAX_DELAY, speaks_against_new_code
from sharedcluster.log import logger

_PR_SET_CHILD_SUBREAPER: Final = 36


class Nursery(Protocol):
    """What starts workers."""

    def spawn(self, context: WorkerContext, ours: MessageSocket) -> int | None:
        """Start a worker: its pid, 0 if that comes later, None if no worker can be started yet."""

    def reaped(self, pid: int, status: int) -> bool:
        """A child ended: whether it was one of the nursery's own, and no worker."""

    def look(self, now: float) -> None:
        """End what takes too long to come up."""

    def discard(self, generation: int) -> None:
        """What should have started a worker of that generation does not answer."""

    def retire(self, serving_generation: int) -> None:
        """Workers of older generations are not needed any more."""

    def close(self) -> None:
        """The cluster stops."""

    def close_in_child(self) -> None:
        """In a forked process: drop the descriptors."""


class Direct:
    """Forks the primary itself, which has loaded nothing."""

    def __init__(self, worker_main: WorkerMain, close_in_child: Callable[[], None]) -> None:
        self._worker_main = worker_main
        self._close_in_child = close_in_child

    def spawn(self, context: WorkerContext, ours: MessageSocket) -> int | None:
        """Fork; the child is the worker."""
        return fork_child(
            self._worker_main, context, channel=context.channel, ours=ours, close_in_child=self._close_in_child
        )

    def reaped(self, pid: int, status: int) -> bool:
        """It has no children of its own."""
        return False

    def look(self, now: float) -> None:
        """Nothing comes up but workers."""

    def discard(self, generation: int) -> None:
        """A fork is done at once, so nothing stands between."""

    def retire(self, serving_generation: int) -> None:
        """Nothing to retire."""

    def close(self) -> None:
        """Nothing to close."""

    def close_in_child(self) -> None:
        """Nothing to close."""


class Mold:
    """The primary's view of one mold."""

    def __init__(self, generation: int, pid: int, channel: MessageSocket) -> None:
        self.generation = generation
        self.pid = pid
        self.channel = channel
        self.started_at = time.monotonic()
        self.is_ready = False
        self.has_failed = False


class Molds:
    """One mold a generation, started when a worker of that generation is wanted.

    Args:
        mold_main: A mold's entry, called in the forked child.
        make_context: What a mold gets, by its generation and its end of the channel.
        selector: The primary's; it watches the molds' channels.
        close_in_child: Drops the primary's descriptors, in the child.
        on_forked: Told the id and the process of a worker.
        on_failed: Told the generation, what was wrong, and the application's traceback.
        boot_timeout: Seconds a mold may take to load the application.
    """

    def __init__(
        self,
        mold_main: MoldMain,
        make_context: Callable[[int, MessageSocket], MoldContext],
        selector: selectors.BaseSelector,
        close_in_child: Callable[[], None],
        on_forked: Callable[[int, int], None],
        on_failed: Callable[[int, str, str], None],
        boot_timeout: float = 60.0,
    ) -> None:
        self._mold_main = mold_main
        self._make_context = make_context
        self._selector = selector
        self._close_in_child = close_in_child
        self._on_forked = on_forked
        self._on_failed = on_failed
        self._boot_timeout = boot_timeout
        self._molds: dict[int, Mold] = {}
        self._failures = 0
        self._start_at = 0.0
        become_subreaper()

    def spawn(self, context: WorkerContext, ours: MessageSocket) -> int | None:
        """Ask the mold of the generation; start that mold if there is none."""
        mold = self._molds.get(context.generation)
        if mold is None:
            if time.monotonic() >= self._start_at:
                self._start(context.generation)
            return None
        if not mold.is_ready:
            return None
        request = ForkWorker(context.id, context.slot, context.row.number)
        try:
            sent = mold.channel.send(request, context.channel.fileno())
        except ChannelClosed:
            return None  # it is reaped in a moment
        if not sent:
            return None
        context.channel.close()
        return 0

    def _start(self, generation: int) -> None:
        ours, theirs = MessageSocket.pair()
        try:
            context = self._make_context(generation, theirs)
            pid = fork_child(self._mold_main, context, channel=theirs, ours=ours, close_in_child=self._close_in_child)
        except OSError:
            ours.close()
            theirs.close()
            raise
        mold = self._molds[generation] = Mold(generation, pid, ours)
        self._selector.register(ours, selectors.EVENT_READ, lambda _mask: self._read(mold))

    def _read(self, mold: Mold) -> None:
        try:
            # What a message leads to may drop the mold, and with it the channel.
            while self._is_ours(mold) and (received := mold.channel.receive()) is not None:
                message = received[0]
                if isinstance(message, MoldReady):
                    mold.is_ready = True
                    self._failures = 0
                elif isinstance(message, Forked):
                    self._on_forked(message.id, message.pid)
                elif isinstance(message, LoadFailed):
                    self._failed(mold, message.what, message.traceback)
        except ChannelClosed:
            # How it ended is known in a moment, when it is reaped.
            with suppress(KeyError):
                self._selector.unregister(mold.channel)
        except ValueError as error:
            logger.error("the mold of generation %d sent what is no message: %s", mold.generation, error)

    def _is_ours(self, mold: Mold) -> bool:
        return self._molds.get(mold.generation) is mold

    def _failed(self, mold: Mold, what: str, trace: str) -> None:
        mold.has_failed = True
        self._wait_before_the_next()
        self._on_failed(mold.generation, what, trace)

    def _wait_before_the_next(self) -> None:
        self._start_at = time.monotonic() + min(FIRST_DELAY * DELAY_FACTOR**self._failures, MAX_DELAY)
        self._failures += 1

    def look(self, now: float) -> None:
        """End a mold that does not come to an end of loading."""
        for mold in tuple(self._molds.values()):
            if not mold.is_ready and not mold.has_failed and now - mold.started_at >= self._boot_timeout:
                self._failed(
                    mold, f"The application was not loaded within {self._boot_timeout:g} s (--boot-timeout).", ""
                )
                self.discard(mold.generation)

    def discard(self, generation: int) -> None:
        """KILL the mold: it does not answer. The next worker that is wanted gets a new one."""
        mold = self._molds.get(generation)
        if mold is not None:
            with suppress(ProcessLookupError):
                os.kill(mold.pid, signal.SIGKILL)
            self._drop(mold)

    def reaped(self, pid: int, status: int) -> bool:
        """A mold that ended is started again when the next worker is wanted."""
        mold = next((m for m in self._molds.values() if m.pid == pid), None)
        if mold is None:
            return False
        self._read(mold)
        if self._is_ours(mold):
            self._drop(mold)
            if not mold.is_ready and not mold.has_failed:
                code = os.waitstatus_to_exitcode(status)
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                what = f"Loading the application did not come to an end: the process {how}."
                if speaks_against_new_code(code, self._failures):
                    self._failed(mold, what, "")
                else:
                    logger.warning("%s It is tried again.", what)
                    self._wait_before_the_next()
        return True

    def _drop(self, mold: Mold) -> None:
        if self._is_ours(mold):
            del self._molds[mold.generation]
            with suppress(KeyError):
                self._selector.unregister(mold.channel)
            mold.channel.close()  # the end of the stream is its order to leave
            if not mold.is_ready:  # it cannot hear that while it loads
                with suppress(ProcessLookupError):
                    os.kill(mold.pid, signal.SIGKILL)

    def retire(self, serving_generation: int) -> None:
        """Molds of other generations leave."""
        self._failures, self._start_at = 0, 0.0
        for mold in tuple(self._molds.values()):
            if mold.generation != serving_generation:
                self._drop(mold)

    def close(self) -> None:
        """All molds leave."""
        for mold in tuple(self._molds.values()):
            self._drop(mold)

    def close_in_child(self) -> None:
        """In a forked process: drop the descriptors."""
        for mold in self._molds.values():
            mold.channel.close()


def become_subreaper() -> None:
    """Have orphans below this process given to it instead of to process 1 (prctl(2), Linux 3.4)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(error)}")
