"""A mold: the process that workers are forked from, so that they share what is expensive to make.

Like `worker`, this module is imported only in a process that was forked for it: importing it patches for gevent. The
mold never runs gevent's loop and serves nobody. It waits, in one system call, for the primary's next wish.

What a fork must not share is made after it: the loop (`gevent.reinit`), the Redis clients (each `SharedState` is
built on first use and checks its process), the seeds (Python seeds `random` anew in a forked child).
"""

from __future__ import annotations

# isort: on
import _socket
import gc
import os
import posix  # its close is not gevent's, which waits for a turn of the loop
import signal
import sys
from contextlib import suppress
from typing import Final

import gevent
from gevent import monkey

from sharedcluster.cluster.forking import MoldContext, WorkerContext, be_child
from sharedcluster.cluster.ipc import ChannelClosed, MessageSocket
from sharedcluster.cluster.loading import LoadedApp, load
from sharedcluster.cluster.messages import Forked, ForkWorker, LoadFailed, MoldReady, cut_to_fit

# isort: off - importing this patches, so it comes first
from sharedcluster.cluster.worker import EXIT_LOAD_FAILED, ignore_the_terminal, set_environment
from sharedcluster.cluster.worker import main as be_worker
from sharedcluster.errors import AppLoadError
from sharedcluster.log import logger, set_up

_fork: Final = monkey.get_original("os", "fork")
_waitpid: Final = monkey.get_original("os", "waitpid")


def main(context: MoldContext) -> int:
    """Load what is shared, then fork workers until the primary closes the channel."""
    config = context.config
    set_up("mold", level=config.log_level, style=config.log_format, files=config.log_files())
    ignore_the_terminal()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    channel = context.channel
    channel.socket.setblocking(True)
    set_environment(context.redis_url)
    try:
        loaded = load(context.config.app)
    except AppLoadError as error:
        channel.send(LoadFailed(str(error), cut_to_fit(error.traceback)))
        return EXIT_LOAD_FAILED
    _warn_of_threads()
    gc.collect()
    gc.freeze()  # what is here stays for ever: the collector must not write to its pages in every worker
    channel.send(MoldReady())
    try:
        while True:
            received = channel.receive()
            if received is None or not isinstance(received[0], ForkWorker) or received[1] is None:
                continue
            _fork_worker(context, received[0], received[1], loaded)
    except ChannelClosed:
        return 0


def _fork_worker(context: MoldContext, wish: ForkWorker, fd: int, loaded: LoadedApp) -> None:
    """Fork twice: the one in between tells us the worker's pid and leaves, and the primary inherits the worker."""
    read, write = os.pipe()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    between = _fork()
    if between == 0:
        pid = _fork()
        if pid != 0:
            os.write(write, b"%d" % pid)
            os._exit(0)
        posix.close(read)
        posix.close(write)
        be_child(lambda: _be_worker(context, wish, fd, loaded))
    posix.close(fd)
    posix.close(write)
    pid = int(os.read(read, 32) or b"0")
    posix.close(read)
    _waitpid(between, 0)
    context.channel.send(Forked(wish.id, pid))


def _be_worker(context: MoldContext, wish: ForkWorker, fd: int, loaded: LoadedApp) -> int:
    context.channel.close()
    gevent.reinit()
    return be_worker(
        WorkerContext(
            id=wish.id,
            slot=wish.slot,
            generation=context.generation,
            # The C class, not Python's: that one is gevent's in here, and would wait in the loop.
            channel=MessageSocket(_socket.socket(fileno=fd)),
            config=context.config,
            addresses=context.addresses,
            redis_url=context.redis_url,
            row=context.board.row(wish.row),
            ticket_key=context.ticket_key,
            listener_fds=context.listener_fds,
        ),
        loaded,
    )


def _warn_of_threads() -> None:
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        logger.warning(
            "the application started %d threads on import; they do not exist in the workers forked from the mold",
            threads - 1,
        )
