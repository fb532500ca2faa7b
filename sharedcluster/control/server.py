"""The control socket inside the primary's loop: non-blocking, a few clients, one line each way at a time.

It acts through `Target`, which the primary satisfies, so control does not know the primary. A command that takes its
time (a reload, a stop) returns None and is answered later through the `Client` it came from.
"""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

from sharedcluster.control.protocol import MAX_LINE, ControlError, decode, encode
from sharedcluster.errors import ConfigError, UserError

MAX_CLIENTS: Final = 64
_BUFFER_LIMIT: Final = 4 << 20


class Target(Protocol):
    """What a command can be done to."""

    def commands(self) -> Mapping[str, Callable[[dict[str, Any], Client], dict[str, Any] | None]]:
        """Command -> what does it; the result is the reply, None means that the reply comes later."""


class Client:
    """One connection of an operator."""

    def __init__(self, server: ControlServer, end: socket.socket) -> None:
        self.server = server
        self.end = end
        self.received = b""
        self.to_send = b""

    def reply(self, message: dict[str, Any]) -> None:
        """Send a line; a client that is gone or does not read is dropped."""
        self.to_send += encode(message)
        self.server.flush(self)


class ControlServer:
    """Owns the socket file: it is made here, and removed when the server closes."""

    def __init__(self, path: Path, target: Target, selector: selectors.BaseSelector) -> None:
        self.path = path
        self._target = target
        self._selector = selector
        self._clients: set[Client] = set()
        self._socket = claim(path)
        self._inode = path.stat().st_ino

    def start(self) -> None:
        """Answer from now on."""
        self._selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def _accept(self, _mask: int) -> None:
        with suppress(OSError):
            end, _ = self._socket.accept()
            if len(self._clients) >= MAX_CLIENTS:
                end.close()
                return
            end.setblocking(False)
            client = Client(self, end)
            self._clients.add(client)
            self._selector.register(end, selectors.EVENT_READ, lambda mask: self._on_event(client, mask))

    def _on_event(self, client: Client, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self.flush(client)
        if mask & selectors.EVENT_READ and client in self._clients:
            self._read(client)

    def _read(self, client: Client) -> None:
        try:
            data = client.end.recv(MAX_LINE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        client.received += data
        if not data or len(client.received) > MAX_LINE:
            self._drop(client)
            return
        while b"\n" in client.received and client in self._clients:
            line, client.received = client.received.split(b"\n", 1)
            self._do(client, line)

    def _do(self, client: Client, line: bytes) -> None:
        reply: dict[str, Any] | None
        try:
            message = decode(line)
            reply = self._command(message)(message, client)
            if reply is not None:
                reply = {"ok": True, **reply}
        except UserError as error:
            reply = {"ok": False, "error": str(error), "exit_code": error.exit_code}
        except ControlError as error:
            reply = {"ok": False, "error": str(error), "exit_code": error.exit_code}
        if reply is not None:
            client.reply(reply)

    def _command(self, message: dict[str, Any]) -> Callable[[dict[str, Any], Client], dict[str, Any] | None]:
        name = str(message.get("command"))
        try:
            return self._target.commands()[name]
        except KeyError:
            raise ControlError(f"there is no command {name!r}", exit_code=2) from None

    def flush(self, client: Client) -> None:
        """Send what can be sent now and watch for the rest."""
        if client not in self._clients:
            return
        try:
            sent = client.end.send(client.to_send)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._drop(client)
            return
        client.to_send = client.to_send[sent:]
        if len(client.to_send) > _BUFFER_LIMIT:
            self._drop(client)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.to_send else 0)
        if self._selector.get_key(client.end).events != wanted:
            self._selector.modify(client.end, wanted, lambda mask: self._on_event(client, mask))

    def _drop(self, client: Client) -> None:
        self._clients.discard(client)
        self._selector.unregister(client.end)
        client.end.close()

    def close_in_child(self) -> None:
        """Close the descriptors that a forked child must not keep; the file stays."""
        self._socket.close()
        for client in self._clients:
            client.end.close()

    def close(self) -> None:
        """Stop answering and remove the socket file."""
        for client in tuple(self._clients):
            self._drop(client)
        with suppress(KeyError, ValueError):
            self._selector.unregister(self._socket)
        self._socket.close()
        with suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()


def claim(path: Path) -> socket.socket:
    """Bind the control socket; a file that a dead primary left behind is replaced.

    Raises:
        ConfigError: A living cluster has that name.
    """
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)  # the file is 0600 from its first moment on
    try:
        for attempt in (1, 2):
            try:
                end.bind(os.fspath(path))
                break
            except OSError as error:
                if attempt == 2 or is_alive(path):
                    end.close()
                    raise ConfigError(
                        f"Cannot make the control socket {path}.",
                        fact=f"{error.strerror}; a cluster of that name may be running.",
                        advice=(f"See it: sharedcluster status --name {path.stem}", "Or choose: --name NAME"),
                    ) from error
                with suppress(FileNotFoundError):
                    path.unlink()
    finally:
        os.umask(previous)
    end.listen(MAX_CLIENTS)
    end.setblocking(False)
    return end


def is_alive(path: Path) -> bool:
    """Whether somebody listens on a control socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True
