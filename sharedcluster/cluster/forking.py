"""Forking a worker: what crosses the fork, and how the child stops being the primary."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NoReturn

from sharedcluster.cluster.ipc import MessageSocket
from sharedcluster.cluster.signals import INTENTS
from sharedcluster.config import BindAddress, Config

EXIT_BUG: Final = 70
"""EX_SOFTWARE of sysexits(3): the child fell out of its entry with an exception."""


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a worker gets from the primary when it is forked."""

    id: int
    slot: int
    generation: int
    channel: MessageSocket
    config: Config
    addresses: tuple[BindAddress, ...]
    redis_url: str
    primary_pid: int


WorkerMain = Callable[[WorkerContext], int]


def fork_worker(
    context: WorkerContext, worker_main: WorkerMain, close_in_child: Callable[[], None], ours: MessageSocket
) -> int:
    """Fork a process that runs `worker_main(context)` and exits with what it returns; returns its pid.

    Args:
        context: What the child gets; its channel is closed here, in the parent.
        worker_main: The child's entry.
        close_in_child: Drops the parent's descriptors and signal handlers, in the child.
        ours: The parent's end of the channel, closed in the child.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal that reached the child before it has given up our handlers would be written into our pipe.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, INTENTS)
    pid = os.fork()
    if pid == 0:
        _be_child(context, worker_main, close_in_child, ours, mask)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    context.channel.close()
    return pid


def _be_child(
    context: WorkerContext,
    worker_main: WorkerMain,
    close_in_child: Callable[[], None],
    ours: MessageSocket,
    mask: set[int | signal.Signals],
) -> NoReturn:
    code = EXIT_BUG
    try:
        close_in_child()
        ours.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the primary, which tells us to drain
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = worker_main(context)
        atexit._run_exitfuncs()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
