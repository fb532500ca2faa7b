"""The message socket between the primary and one worker: SEQPACKET, so framing does not exist.

One `sendmsg` is one message and carries at most one descriptor (SCM_RIGHTS). Both ends are non-blocking; whoever
waits does so in its own loop (a selector in the primary, libev in the worker), on `fileno()`.

SEQPACKET on AF_UNIX exists on Linux; that is the platform sharedcluster runs on.
"""

from __future__ import annotations

import _socket
import array
import errno
import posix  # its close is not gevent's, which waits for a turn of the loop
import socket
from typing import Final

from sharedcluster.cluster.messages import MAX_MESSAGE, Message, decode, encode
from sharedcluster.errors import PeerError

_FD_BYTES: Final = array.array("i").itemsize
_ANCILLARY: Final = socket.CMSG_SPACE(_FD_BYTES)
_BUFFER: Final = 1 << 20
"""Socket buffer: heartbeats of a worker must never fill it while the primary is paused for a while."""


class ChannelClosed(PeerError):  # noqa: N818 - it is an event, not a fault
    """The other end is gone."""


class MessageSocket:
    """One end of the pair. Not shared by two processes: each closes the other's end after the fork."""

    __slots__ = ("socket",)

    def __init__(self, end: _socket.socket) -> None:
        end.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        self.socket = end

    @classmethod
    def pair(cls) -> tuple[MessageSocket, MessageSocket]:
        """Both ends: the primary's and the worker's."""
        first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(first), cls(second)

    def fileno(self) -> int:
        """What a loop watches."""
        return self.socket.fileno()

    def close(self) -> None:
        """Close this end; the other end reads the end of the stream."""
        self.socket.close()

    def send(self, message: Message, fd: int | None = None) -> bool:
        """Send one message, with a descriptor if one is given (the sender's copy stays open).

        Returns:
            False if it cannot be sent right now (buffers full, too many descriptors on their way).

        Raises:
            ChannelClosed: The other end is gone.
        """
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (fd,)))]
        try:
            self.socket.sendmsg((encode(message),), rights)
        except (BlockingIOError, InterruptedError):
            return False
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed("the other end of the message socket is gone") from error
        except OSError as error:
            # ETOOMANYREFS: more descriptors are in flight between processes than RLIMIT_NOFILE allows.
            if error.errno in (errno.ENOBUFS, errno.ETOOMANYREFS, errno.ENOMEM):
                return False
            raise
        return True

    def receive(self) -> tuple[Message, int | None] | None:
        """Take one message off the socket.

        Returns:
            The message and the descriptor that came with it. None if there is nothing to read right now. A message
            that should carry a descriptor and comes without one lost it on the way: this process is at its limit of
            descriptors (MSG_CTRUNC). The receiver answers `Returned`.

        Raises:
            ChannelClosed: The other end is gone and everything it sent has been read.
            ValueError: The datagram is no message.
        """
        try:
            data, ancillary, _, _ = self.socket.recvmsg(MAX_MESSAGE, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return None
        except ConnectionResetError as error:
            raise ChannelClosed("the other end of the message socket is gone") from error
        if not data:
            raise ChannelClosed("the other end of the message socket is gone")
        fd = _descriptor(ancillary)
        try:
            return decode(data), fd
        except ValueError:
            if fd is not None:
                posix.close(fd)
            raise


def _descriptor(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS and len(data) >= _FD_BYTES:
            fds = array.array("i")
            fds.frombytes(data[: len(data) - len(data) % _FD_BYTES])
            return fds[0]
    return None
