"""Standard output and standard error as log files that many processes append to.

Laws:

1. Nothing stands between a process and its log: a line is one `write(2)` to a descriptor opened with O_APPEND, which
   the kernel keeps whole among other writers. There is no pipe that a slow or dead reader could fill and no other
   process to wait for, so whoever reads, rotates or compresses the file cannot hold up a worker.
2. A line that cannot be written (no space, quota, an I/O error) is dropped and counted, never raised into the
   application; the next line that can be written is preceded by one that says how many were lost and why.
3. The file may be renamed at any time. A process writes on into the renamed file until it is told to `reopen`, so
   rotation loses nothing; whoever compresses must first see that no writer is left (`operating.rotation`).

A line is `2026-11-20 09:12:01.123 w0 out | text`, or a JSON object. What goes past Python (a library in C, a program
that the application starts, the stacks of a dead worker) has no such beginning but is in the file all the same.
"""

from __future__ import annotations

import atexit
import errno
import io
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from sharedcluster.errors import ConfigError

Stream = Literal["out", "err"]

LONGEST_PARTIAL: Final = 65536
"""Characters without a line end that are held back before they are written as a line of their own."""
_MODE: Final = 0o640


@dataclass(frozen=True, slots=True)
class LogFiles:
    """Where the two streams go; the same path twice merges them."""

    out: str
    err: str


class Sink:
    """One descriptor (1 or 2) on one file."""

    def __init__(self, path: str, number: int) -> None:
        self.path = path
        self.number = number
        self.lost = 0
        self._reported = 0
        self._why = ""
        self._torn = False
        self.reopen()

    def reopen(self) -> None:
        """Write to the file that has the path now; it is made if there is none.

        Raises:
            ConfigError: It cannot be opened; the stream stays where it was.
        """
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, _MODE)
        except OSError as error:
            raise ConfigError(
                f"Cannot open the log file {self.path}: {error.strerror}.",
                advice="Name another one: --out-file PATH, --error-file PATH",
            ) from error
        os.dup2(fd, self.number)
        if fd != self.number:
            os.close(fd)

    def write(self, line: bytes, note: bytes = b"") -> None:
        """Append a whole line; `note` comes before it when lines were lost."""
        data = note + line
        if self._torn:
            data = b"\n" + data
        try:
            written = os.write(self.number, data)
        except OSError as error:
            self._failed(error)
            return
        if written != len(data):  # the disk filled up in the middle of the line
            self._torn = True
            self._failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            return
        self._torn = False
        if note:
            self._reported = self.lost

    def _failed(self, error: OSError) -> None:
        self.lost += 1
        self._why = error.strerror or str(error)

    @property
    def unreported(self) -> str:
        """What has to be said about lost lines, if anything."""
        count = self.lost - self._reported
        return f"{count} lines before this one were lost: {self._why}" if count else ""


class LineStream(io.TextIOBase):
    """What replaces `sys.stdout` or `sys.stderr`: text in, stamped lines out.

    Args:
        sink: Where lines go.
        stream: Which of the two it is.
        role: Who writes: `primary`, `w0`, ...
        style: `text` or `json`.
        stamped: Whether each line gets time and role; a logger whose lines have them writes through one that does not.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, sink: Sink, stream: Stream, role: str, style: str, *, stamped: bool = True) -> None:
        super().__init__()
        self.sink = sink
        self.buffer = _Bytes(self)
        self._stream = stream
        self._role = role
        self._style = style
        self._stamped = stamped
        self._partial = ""
        self._second = -1
        self._clock = ""

    def write(self, text: str) -> int:
        """Write every line that is complete; keep the rest until its end comes."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._emit(line)
        if len(self._partial) > LONGEST_PARTIAL:
            self._end_partial()
        return len(text)

    def _end_partial(self) -> None:
        partial, self._partial = self._partial, ""
        if partial:
            self._emit(partial)

    def _emit(self, line: str) -> None:
        note = self.sink.unreported
        self.sink.write(self._line(line, self._stamped), self._line(note, stamped=True) if note else b"")

    def _line(self, text: str, stamped: bool) -> bytes:
        if not stamped:
            line = text
        elif self._style == "json":
            now = time.time()
            moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
            line = json.dumps(
                {"time": f"{moment}.{int(now % 1 * 1000):03d}Z", "role": self._role, "stream": self._stream,
                 "message": text}
            )  # fmt: skip
        else:
            line = f"{self._now()} {self._role} {self._stream} | {text}"
        return line.encode("utf-8", "backslashreplace") + b"\n"

    def _now(self) -> str:
        now = time.time()
        second = int(now)
        if second != self._second:  # strftime once a second: it costs more than the write
            self._second = second
            self._clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        return f"{self._clock}.{int((now - second) * 1000):03d}"

    def flush(self) -> None:
        """Complete lines have left already; the beginning of a line waits for its end, or for `close`."""

    def close(self) -> None:
        """Write what has no line end yet. The descriptor stays open: it is the process's own."""
        self._end_partial()

    def fileno(self) -> int:
        """The real descriptor, for programs that the application starts."""
        return self.sink.number

    def writable(self) -> bool:
        """Always."""
        return True

    def isatty(self) -> bool:
        """Never."""
        return False

    def __del__(self) -> None:
        # IOBase would close a replaced stream when it is collected, in a forked child too, and so write its
        # parent's partial line again.
        pass


class _Bytes(io.RawIOBase):
    """`sys.stdout.buffer`: bytes are text in UTF-8 here."""

    def __init__(self, text: LineStream) -> None:
        super().__init__()
        self._text = text

    def write(self, data: Any) -> int:
        whole = bytes(data)
        self._text.write(whole.decode("utf-8", "backslashreplace"))
        return len(whole)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._text.fileno()

    def close(self) -> None:
        pass


_installed: list[LineStream] = []
_owner: tuple[int, str] = (0, "")


def install(files: LogFiles, role: str, style: str) -> LineStream:
    """Make the two streams of this process log files; called again in the same process, reopen them.

    Returns:
        Where loggers write: lines that have time and role already if `style` is `json`, else lines without.

    Raises:
        ConfigError: A file cannot be opened.
    """
    global _owner
    if _installed and _owner == (os.getpid(), role):
        for stream in _installed[:2]:
            stream.sink.reopen()
        return _installed[2]
    out, err = Sink(files.out, 1), Sink(files.err, 2)
    _installed[:] = [
        LineStream(out, "out", role, style),
        LineStream(err, "err", role, style),
        LineStream(err, "err", role, style, stamped=style != "json"),
    ]
    _owner = (os.getpid(), role)
    sys.stdout, sys.stderr = _installed[:2]
    for stream in _installed:
        atexit.register(stream.close)
    return _installed[2]


def lost_lines() -> int:
    """How many lines this process could not write."""
    return sum(sink.lost for sink in _sinks(_installed[:2]))


def _sinks(streams: Iterable[LineStream]) -> Iterable[Sink]:
    return (stream.sink for stream in streams)
