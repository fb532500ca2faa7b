"""The live view on a real terminal and in a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.kept_apps import Desk
from tests.waiting import wait_until


@pytest.fixture
def desk() -> Iterator[Desk]:
    """A folder with a running application."""
    made = Desk()
    made.start("-w", "2")
    yield made
    made.close()


class Terminal:
    """A command on a terminal of 80 columns and 24 lines."""

    def __init__(self, desk: Desk, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.set_blocking(self.master, False)
        env = {**desk.env, "TERM": "xterm"}
        command = [sys.executable, "-m", "sharedcluster", *arguments]
        self.process = subprocess.Popen(command, cwd=desk.folder, env=env, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.seen = ""

    def read(self) -> str:
        """Everything that was shown so far."""
        with suppress(OSError):
            self.seen += os.read(self.master, 1 << 20).decode()
        return self.seen

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self.master, keys.encode())


def test_keys_on_a_terminal(desk: Desk) -> None:
    """It shows the workers, + adds one, r reloads, l shows the log, q ends it, and the terminal is put back."""
    screen = Terminal(desk, "monit", "shop")
    try:
        wait_until(lambda: "restarts" in screen.read() and "shop  online" in screen.read(), "it shows the workers")
        screen.press("+")
        wait_until(lambda: len(desk.status()["workers"]) == 3, "a third worker")
        screen.press("r")
        wait_until(lambda: screen.read() and desk.status()["counters"]["reloads"] == 1, "it was reloaded")
        screen.press("l")
        wait_until(lambda: "ready in" in screen.read(), "the log is shown")
        screen.press("q")
        wait_until(lambda: screen.read() and screen.process.poll() is not None, "it ends")
        assert screen.process.returncode == 0
        assert "\x1b[?1049l" in screen.read(), "the screen before it is back"
    finally:
        screen.process.kill()
        screen.process.wait()
        os.close(screen.master)


def test_a_line_a_second_in_a_pipe(desk: Desk) -> None:
    """No escape sequences; rates and percentiles of what happened."""
    lines = desk.cli("monit", "shop", "--count", "2").stdout.splitlines()
    assert len(lines) == 2
    assert all("req/s" in line and "p99" in line and line.isascii() for line in lines)
