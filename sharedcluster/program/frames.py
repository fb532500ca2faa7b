"""User messages as bytes on a stream: a head of eleven bytes, then the payload. Pure: no socket, no clock.

Laws:

1. What a frame is stands in its head, never in its payload: a payload that looks like a message of ours is a payload.
2. Bytes that are no frame are skipped up to the next head and reported, and the frames behind them are read: somebody
   who writes to the wrong descriptor costs a line in the log, not the channel.
3. JSON carries what JSON has. What it has not (NaN, bytes, a set) fails at the sender, where the mistake is.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sharedcluster.errors import ConfigError

MAX_PAYLOAD: Final = 64 << 20
"""Bytes of one message; more belongs into a file, or into the shared state."""
MESSAGE: Final = 1
"""A message whose sender wants to know when it has been taken."""
NOTE: Final = 2
"""A message whose sender wants to know only if it has not been taken."""
TAKEN: Final = 3
"""The other side's handlers were called for message `seq` (payload 1), or there were none (payload 0)."""

_MAGIC: Final = b"\xc5\x9d"
_HEAD: Final = struct.Struct("!2sBII")  # magic, kind, seq, length of the payload


@dataclass(frozen=True, slots=True)
class Frame:
    """A message, or the word that one was taken; `seq` counts the sender's messages."""

    kind: int
    seq: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Garbage:
    """Bytes that were no frame; `sample` is how they began."""

    count: int
    sample: bytes


def write(frame: Frame) -> bytes:
    """The bytes of a frame."""
    return _HEAD.pack(_MAGIC, frame.kind, frame.seq, len(frame.payload)) + frame.payload


class Reader:
    """Takes bytes as they come, in any pieces, and gives frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skipped = 0
        self._sample = b""

    def feed(self, data: bytes) -> list[Frame | Garbage]:
        """Everything that is complete now."""
        self._buffer += data
        found: list[Frame | Garbage] = []
        while (frame := self._next()) is not None:
            if self._skipped:
                found.append(self._report())
            found.append(frame)
        if self._skipped:
            found.append(self._report())
        return found

    def _next(self) -> Frame | None:
        buffer = self._buffer
        while len(buffer) >= _HEAD.size:
            magic, kind, seq, length = _HEAD.unpack_from(buffer)
            if magic != _MAGIC or kind not in (MESSAGE, NOTE, TAKEN) or length > MAX_PAYLOAD:
                self._skip_to_next_head()
                continue
            end = _HEAD.size + length
            if len(buffer) < end:
                return None
            frame = Frame(kind, seq, bytes(memoryview(buffer)[_HEAD.size : end]))
            del buffer[:end]
            return frame
        return None

    def _skip_to_next_head(self) -> None:
        buffer = self._buffer
        found = buffer.find(_MAGIC, 1)
        # The last byte may be the first half of a head.
        end = found if found >= 0 else len(buffer) - (buffer[-1:] == _MAGIC[:1])
        self._sample = self._sample or bytes(buffer[: min(end, 40)])
        self._skipped += end
        del buffer[:end]

    def _report(self) -> Garbage:
        garbage = Garbage(self._skipped, self._sample)
        self._skipped, self._sample = 0, b""
        return garbage


# -- what a payload is -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Serialization:
    """How a Python value becomes a payload and back. `loads` raises ValueError for what it cannot read."""

    name: str
    dumps: Callable[[Any], bytes]
    loads: Callable[[bytes], Any]


def serialization(name: str) -> Serialization:
    """`json`, or `msgpack`, which also carries bytes and times and is faster for large messages.

    Raises:
        ConfigError: There is no such one, or its package is missing.
    """
    if name == "json":
        return Serialization(name, _json, json.loads)
    if name == "msgpack":
        return _msgpack()
    raise ConfigError(f"{name!r} is no serialization.", advice="Use json or msgpack.")


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _msgpack() -> Serialization:
    try:
        import msgspec.msgpack  # an extra
    except ImportError as error:
        raise ConfigError(
            "serialization=msgpack needs msgspec, which is not installed.",
            advice='Install it: pip install "sharedcluster[fast]"',
        ) from error

    def loads(payload: bytes) -> Any:
        try:
            return msgspec.msgpack.decode(payload)
        except msgspec.DecodeError as error:
            raise ValueError(str(error)) from error

    return Serialization("msgpack", msgspec.msgpack.encode, loads)
