"""Telling systemd how we are: sd_notify(3), the protocol of one datagram a state."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress


class Notifier:
    """Sends states to `$NOTIFY_SOCKET`, or nowhere if there is none. A failure to tell is never ours to fail on."""

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        watchdog = os.environ.pop("WATCHDOG_USEC", "")
        is_ours = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.interval = int(watchdog) / 2e6 if watchdog.isdigit() and is_ours else 0.0
        self._next = 0.0

    def ready(self, workers: int) -> None:
        """Serving; also the end of a reload, and the take-over of a primary that was replaced (hence MAINPID)."""
        self._send(f"READY=1\nMAINPID={os.getpid()}\nSTATUS={workers} workers serve")

    def reloading(self) -> None:
        """A reload begins (Type=notify-reload needs the time)."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The drain begins."""
        self._send("STOPPING=1")

    def beat(self, now: float) -> None:
        """The watchdog: the primary's loop turns. Sent at half the interval systemd waits."""
        if self.interval and now >= self._next:
            self._next = now + self.interval
            self._send("WATCHDOG=1")

    def environment(self) -> dict[str, str]:
        """What a program needs that takes our place."""
        watchdog = {"WATCHDOG_USEC": str(int(self.interval * 2e6))} if self.interval else {}
        return {"NOTIFY_SOCKET": self._address, **watchdog} if self._address else {}

    def _send(self, state: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
            end.sendto(state.encode(), address)
