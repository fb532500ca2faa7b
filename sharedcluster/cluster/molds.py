"""Where workers come from: a fork of the primary, or a fork of a mold that has loaded the application.

A mold is a child of the primary in which gevent is patched, the application is imported and the heap is frozen
(`gc.freeze`), so that the workers forked from it share its memory (`--preload`). There is one mold per generation: a
reload makes a new one, so preloading never serves stale code, and the primary stays clean.

Laws:

1. The primary is a subreaper (PR_SET_CHILD_SUBREAPER, prctl(2)): the mold forks twice and its child's parent leaves,
   so every worker becomes a child of the primary, which reaps it itself. A dead mold takes no worker with it.
2. `spawn` returns 0 while the process is not known yet, and None while the mold still loads: nothing was started
   then, and `reconcile` asks again.
"""

from __future__ import annotations

import ctypes
import os
import selectors
from collections.abc import Callable
from typing import Final, Protocol

from sharedcluster.cluster.forking import MoldContext, MoldMain, WorkerContext, WorkerMain, fork_child
from sharedcluster.cluster.ipc import ChannelClosed, MessageSocket
from sharedcluster.cluster.messages import Forked, ForkWorker, LoadFailed, MoldReady
from sharedcluster.log import logger

_PR_SET_CHILD_SUBREAPER: Final = 36


class Nursery(Protocol):
    """What starts workers."""

    def spawn(self, context: WorkerContext, ours: MessageSocket) -> int | None:
        """Start a worker: its pid, 0 if that comes later, None if no worker can be started yet."""

    def reaped(self, pid: int) -> bool:
        """A child ended: whether it was one of the nursery's own, and no worker."""

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

    def reaped(self, pid: int) -> bool:
        """It has no children of its own."""
        return False

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
        self.is_ready = False


class Molds:
    """One mold a generation, started when a worker of that generation is wanted."""

    def __init__(
        self,
        mold_main: MoldMain,
        make_context: Callable[[int, MessageSocket], MoldContext],
        selector: selectors.BaseSelector,
        close_in_child: Callable[[], None],
        on_forked: Callable[[int, int], None],
        on_failed: Callable[[int, str, str], None],
    ) -> None:
        self._mold_main = mold_main
        self._make_context = make_context
        self._selector = selector
        self._close_in_child = close_in_child
        self._on_forked = on_forked
        self._on_failed = on_failed
        self._molds: dict[int, Mold] = {}
        become_subreaper()

    def spawn(self, context: WorkerContext, ours: MessageSocket) -> int | None:
        """Ask the mold of the generation; start that mold if there is none."""
        mold = self._molds.get(context.generation)
        if mold is None:
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
        context = self._make_context(generation, theirs)
        pid = fork_child(self._mold_main, context, channel=theirs, ours=ours, close_in_child=self._close_in_child)
        mold = self._molds[generation] = Mold(generation, pid, ours)
        self._selector.register(ours, selectors.EVENT_READ, lambda _mask: self._read(mold))

    def _read(self, mold: Mold) -> None:
        if self._molds.get(mold.generation) is not mold:
            return  # dropped earlier in the same turn
        try:
            while (received := mold.channel.receive()) is not None:
                message = received[0]
                if isinstance(message, MoldReady):
                    mold.is_ready = True
                elif isinstance(message, Forked):
                    self._on_forked(message.id, message.pid)
                elif isinstance(message, LoadFailed):
                    self._on_failed(mold.generation, message.what, message.traceback)
        except ChannelClosed:
            self._drop(mold)
        except ValueError as error:
            logger.error("the mold of generation %d sent what is no message: %s", mold.generation, error)

    def reaped(self, pid: int) -> bool:
        """A mold that ended is started again when the next worker is wanted."""
        for mold in tuple(self._molds.values()):
            if mold.pid == pid:
                self._read(mold)
                self._drop(mold)
                return True
        return False

    def _drop(self, mold: Mold) -> None:
        if self._molds.get(mold.generation) is mold:
            del self._molds[mold.generation]
            self._selector.unregister(mold.channel)
            mold.channel.close()  # the end of the stream is its order to leave

    def retire(self, serving_generation: int) -> None:
        """Molds of other generations leave."""
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
