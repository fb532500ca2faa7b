"""What a process writes whose output is taken (`silent`): read as it comes, told as bytes."""

from __future__ import annotations

import os
from collections.abc import Callable

from sharedcluster.program.loops import Loop


class Output:
    """One pipe; it is read to its end even if nobody listens, so that the writer never blocks."""

    def __init__(self, loop: Loop, fd: int, tell: Callable[[bytes], object]) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._tell = tell
        self._is_open = True
        self._watch = loop.watch(fd, self._on_readable)

    def read_rest(self) -> None:
        """The writer has ended: tell what is left."""
        while self._is_open and self._read():
            pass

    def _on_readable(self) -> None:
        self._read()

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return False
        if not data:
            self._is_open = False
            self._watch.close()
            return False
        self._tell(data)
        return True
