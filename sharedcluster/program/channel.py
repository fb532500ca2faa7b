"""User messages between two processes: a stream socket, frames, an outbox with a mark, and an answer to each message.

Laws:

1. Order: what one side sends arrives in that order. Nothing is dropped without being said: a message is taken by the
   other side's handlers, or its sender is told why not.
2. Back pressure both ways. `send` returns False once more than `HIGH_WATER` bytes wait to leave, and refuses beyond
   `LIMIT`. A receiver whose handlers are slower than its sender stops reading at `UNTAKEN_LIMIT` bytes, so the bytes
   stay with the sender, where `send` shows it.
3. Neither side can hurt the other's connections: they travel on another socket (`cluster.ipc`).
"""

from __future__ import annotations

import _socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from sharedcluster.errors import PeerError
from sharedcluster.log import logger
from sharedcluster.program.frames import (
    MAX_PAYLOAD,
    MESSAGE,
    NOTE,
    TAKEN,
    Frame,
    Garbage,
    Reader,
    Serialization,
    write,
)
from sharedcluster.program.loops import Loop

HIGH_WATER: Final = 128 << 10
"""Bytes waiting to leave from which on `send` returns False (Node's figure)."""
LIMIT: Final = 64 << 20
"""Bytes waiting to leave at which `send` refuses: a sender that never looks must not eat the memory."""
UNTAKEN_LIMIT: Final = 1 << 20
"""Bytes that wait for a handler, from which on the receiver stops reading."""
READ: Final = 256 << 10

OnSent = Callable[[Exception | None], object]
"""Called with None when the other side's handlers were called with the message, else with what went wrong."""


class NotDeliveredError(PeerError):
    """The message did not reach a handler: the channel is closed, or nobody listens on the other side."""


class Channel:
    """One end. `on_message` gets each message and a function to be called when it has been taken.

    Args:
        end: A connected stream socket; the channel owns it.
        loop: What turns in this process.
        how: What a payload is.
        on_message: Called in the loop with the message and `taken(by_somebody)`.
        on_closed: Called once in the loop, when the other side is gone and everything it sent has been read.
    """

    def __init__(
        self,
        end: _socket.socket,
        loop: Loop,
        how: Serialization,
        on_message: Callable[[Any, Callable[[bool], None]], None],
        on_closed: Callable[[], None],
    ) -> None:
        end.setblocking(False)
        self._socket = end
        self._loop = loop
        self._how = how
        self._on_message = on_message
        self._on_closed = on_closed
        self._reader = Reader()
        self._outbox: deque[memoryview] = deque()
        self._waiting = 0
        self._untaken = 0
        self._seq = 0
        self._callbacks: dict[int, OnSent] = {}
        self._is_writing = False
        self._is_finishing = False
        self.is_open = True
        self.on_error: Callable[[Exception], object] = _log
        """Called with what went wrong with a message that was sent without a callback."""
        self._watch = loop.watch(end.fileno(), self._on_readable)

    # -- sending ---------------------------------------------------------------------------------------------------

    def send(self, message: Any, callback: OnSent | None = None) -> bool:
        """Send a message.

        Returns:
            True if it was sent or will be at once; False if too much is waiting already (it is still sent: wait for
            a callback before the next one), or if the channel is closed.

        Raises:
            TypeError, ValueError: It cannot be written; nothing was sent.
            BufferError: More than `LIMIT` bytes are waiting; nothing was sent.
        """
        if not self.is_open or self._is_finishing:
            self._fail(callback, NotDeliveredError("the channel is closed"))
            return False
        payload = self._how.dumps(message)
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"a message of {len(payload)} bytes is too long; the limit is {MAX_PAYLOAD}")
        if self._waiting + len(payload) > LIMIT:
            raise BufferError(
                f"{self._waiting} bytes are waiting for the other side already; stop when send() returns False"
            )
        self._seq = (self._seq + 1) & 0xFFFFFFFF
        if callback is not None:
            self._callbacks[self._seq] = callback
        self._put(Frame(NOTE if callback is None else MESSAGE, self._seq, payload))
        return self._waiting < HIGH_WATER

    def _put(self, frame: Frame) -> None:
        data = write(frame)
        self._outbox.append(memoryview(data))
        self._waiting += len(data)
        if not self._is_writing:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._outbox:
                data = self._outbox[0]
                sent = self._socket.send(data)
                self._waiting -= sent
                if sent < len(data):
                    self._outbox[0] = data[sent:]
                    continue
                self._outbox.popleft()
        except (BlockingIOError, InterruptedError):
            if not self._is_writing:
                self._is_writing = True
                self._watch.writes(self._flush)
            return
        except OSError:
            self._outbox.clear()  # the end of the stream is read in a moment; it tells whoever waits
            self._waiting = 0
        if self._is_writing:
            self._is_writing = False
            self._watch.writes(None)
        self._finish_if_idle()

    @property
    def is_idle(self) -> bool:
        """Whether everything that was sent has left this process, and every answer has come."""
        return not self._outbox and not self._callbacks

    def finish(self) -> None:
        """Close as soon as it is idle; nothing more can be sent."""
        self._is_finishing = True
        self._finish_if_idle()

    def _finish_if_idle(self) -> None:
        if self._is_finishing and self.is_open and self.is_idle:
            self._loop.call_soon(self.close)  # not in the middle of somebody's handler

    # -- receiving -------------------------------------------------------------------------------------------------

    def read_rest(self) -> None:
        """Read all there is, although the handlers may be behind: the other side is dead and says no more."""
        while self.is_open and self._read():
            pass

    def _on_readable(self) -> None:
        self._read()

    def _read(self) -> bool:
        try:
            data = self._socket.recv(READ)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            data = b""
        if not data:
            self.close()
            return False
        for found in self._reader.feed(data):
            if isinstance(found, Garbage):
                logger.error("%d bytes on the message channel are no message, skipped: %r", found.count, found.sample)
            elif found.kind == TAKEN:
                self._answered(found)
            else:
                self._received(found)
        return True

    def _received(self, frame: Frame) -> None:
        try:
            message = self._how.loads(frame.payload)
        except (ValueError, RecursionError) as error:
            logger.error("a message on the channel cannot be read, skipped: %s: %r", error, frame.payload[:80])
            self._answer(frame, False)
            return
        size = len(frame.payload)
        self._untaken += size
        if self._untaken > UNTAKEN_LIMIT:
            self._watch.reads(False)

        def taken(by_somebody: bool) -> None:
            self._untaken -= size
            if self._untaken <= UNTAKEN_LIMIT:
                self._watch.reads(self.is_open)
            self._answer(frame, by_somebody)

        self._on_message(message, taken)

    def _answer(self, frame: Frame, by_somebody: bool) -> None:
        if self.is_open and (frame.kind == MESSAGE or not by_somebody):
            self._put(Frame(TAKEN, frame.seq, b"\1" if by_somebody else b"\0"))

    def _answered(self, frame: Frame) -> None:
        callback = self._callbacks.pop(frame.seq, None)
        if frame.payload == b"\1":
            if callback is not None:
                self._loop.call_soon(callback, None)
        else:
            self._fail(callback, NotDeliveredError("nobody listens to messages on the other side"))
        self._finish_if_idle()

    def _fail(self, callback: OnSent | None, error: Exception) -> None:
        if callback is not None:
            self._loop.call_soon(callback, error)
        else:
            self._loop.call_soon(self.on_error, error)

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close this end; who waits for an answer is told that none comes."""
        if not self.is_open:
            return
        self.is_open = False
        self._watch.close()
        self._socket.close()
        callbacks, self._callbacks = self._callbacks, {}
        for callback in callbacks.values():
            self._fail(callback, NotDeliveredError("the other side ended before it took the message"))
        self._on_closed()


def _log(error: Exception) -> None:
    logger.warning("a message was not delivered: %s", error)
