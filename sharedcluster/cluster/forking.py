"""Forking a worker: what crosses the fork, and how the child stops being the primary."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, NoReturn, TypeVar

from sharedcluster.cluster.board import Board, Row
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
    row: Row
    ticket_key: bytes = field(default=b"", repr=False)
    """What TLS session tickets are made with, the same for every worker of the cluster."""
    listener_fds: Mapping[int, int] = field(default_factory=dict)
    """The listening sockets, by index, of which workers accept themselves."""


@dataclass(frozen=True, slots=True)
class MoldContext:
    """What a mold gets: all that is the same for every worker of its generation."""

    generation: int
    channel: MessageSocket
    config: Config
    addresses: tuple[BindAddress, ...]
    redis_url: str
    board: Board
    ticket_key: bytes = field(default=b"", repr=False)
    listener_fds: Mapping[int, int] = field(default_factory=dict)


WorkerMain = Callable[[WorkerContext], int]
MoldMain = Callable[[MoldContext], int]
C = TypeVar("C")


def fork_child(
    main: Callable[[C], int],
    context: C,
    *,
    channel: MessageSocket,
    ours: MessageSocket,
    close_in_child: Callable[[], None],
) -> int:
    """Fork a process that runs `main(context)` and exits with what it returns; returns its pid.

    Args:
        main: The child's entry.
        context: What the child gets.
        channel: The child's end of the channel, closed here, in the parent.
        ours: The parent's end of it, closed in the child.
        close_in_child: Drops the parent's descriptors and signal handlers, in the child.
    """
    with suppress(OSError):  # a full disk under the log must not stop a fork
        sys.stdout.flush()
        sys.stderr.flush()
    # A signal that reached the child before it has given up our handlers would be written into our pipe.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, INTENTS)
    try:
        pid = os.fork()
    except OSError:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise
    if pid == 0:

        def live() -> int:
            close_in_child()
            ours.close()
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the primary, which tells us to drain
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return main(context)

        be_child(live)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    channel.close()
    return pid


def be_child(live: Callable[[], int]) -> NoReturn:
    """Run `live` as the whole rest of this forked process, and exit with what it returns."""
    code = EXIT_BUG
    try:
        code = live()
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
