"""What the primary tells observers: setup, fork, online, listening, message, disconnect, exit, and more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Listener = Callable[..., Any]

FORK = "fork"
ONLINE = "online"
LISTENING = "listening"
DISCONNECT = "disconnect"
EXIT = "exit"
DRAIN = "drain"
READY = "ready"
RELOAD = "reload"
REAPED = "reaped"
UPGRADE = "upgrade"
TAKEN_OVER = "taken over"


class Emitter:
    """Calls functions by the name of an event, in the order in which they were added.

    An observer that raises does not stop the others or the emitter's owner; what it raised goes to `on_fault`.
    """

    def __init__(self, on_fault: Callable[[str, BaseException], None]) -> None:
        self._observers: dict[str, list[Listener]] = {}
        self._on_fault = on_fault

    def on(self, event: str, observer: Listener) -> Listener:
        """Call `observer` whenever `event` happens."""
        self._observers.setdefault(event, []).append(observer)
        return observer

    def off(self, event: str, observer: Listener) -> None:
        """Stop calling it."""
        self._observers.get(event, []).remove(observer)

    def emit(self, event: str, *arguments: object) -> None:
        """Tell everybody who asked for `event`."""
        for observer in tuple(self._observers.get(event, ())):
            try:
                observer(*arguments)
            except Exception as error:
                self._on_fault(event, error)
