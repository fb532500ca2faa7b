"""The operators' side of the control socket: find the cluster, say a line, wait for the answer."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from sharedcluster.control.protocol import ControlError, check_name, decode, encode, runtime_folder
from sharedcluster.errors import ConfigError, UserError

CONNECT_TIMEOUT: Final = 2.0


class NotRunningError(UserError):
    """There is no such cluster."""

    exit_code = 1


def sockets(folder: Path | None = None) -> list[Path]:
    """The control sockets in the runtime folder, those of dead primaries among them."""
    folder = folder or runtime_folder()
    return sorted(folder.glob("*.sock"), key=lambda path: path.stem) if folder.is_dir() else []


def find(name: str = "", control: str = "") -> Path:
    """The control socket of the cluster that is meant: by its path, by its name, or the only one that runs.

    Raises:
        NotRunningError: There is none.
        ConfigError: Several run and none was named.
    """
    if control:
        return Path(control)
    if name:
        path = runtime_folder() / f"{check_name(name)}.sock"
        if not is_running(path):
            running = ", ".join(p.stem for p in sockets() if is_running(p)) or "none"
            raise NotRunningError(f"No cluster named {name!r} is running.", fact=f"Running: {running}.")
        return path
    running_paths = [path for path in sockets() if is_running(path)]
    if not running_paths:
        raise NotRunningError("No cluster is running.", advice="Start one: sharedcluster run APP")
    if len(running_paths) > 1:
        names = ", ".join(path.stem for path in running_paths)
        raise ConfigError(f"Several clusters are running: {names}.", advice="Name one: --name NAME")
    return running_paths[0]


def is_running(path: Path) -> bool:
    """Whether a primary answers there."""
    try:
        with closing(_connect(path)):
            return True
    except OSError:
        return False


def _connect(path: Path) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    end.settimeout(CONNECT_TIMEOUT)
    try:
        end.connect(os.fspath(path))
    except OSError:
        end.close()
        raise
    return end


def call(path: Path, command: str, *, timeout: float | None = 10.0, **arguments: Any) -> dict[str, Any]:
    """Give a command and return its reply.

    Args:
        path: The control socket.
        command: Its name.
        timeout: Seconds to wait for the reply; None waits as long as it takes.
        **arguments: What goes with the command.

    Raises:
        ControlError: The cluster refused the command or went away before it answered.
        NotRunningError: Nobody listens there.
    """
    for reply in converse(path, command, timeout=timeout, **arguments):
        if "progress" not in reply:
            return reply
    raise ControlError("the cluster went away before it answered")


def converse(path: Path, command: str, *, timeout: float | None = 10.0, **arguments: Any) -> Iterator[dict[str, Any]]:
    """Give a command and yield each line of its answer until the cluster closes or answers for good."""
    try:
        end = _connect(path)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NotRunningError(f"No cluster answers at {path}.") from error
    with closing(end), end.makefile("rb") as lines:
        end.settimeout(timeout)
        end.sendall(encode({"command": command, **arguments}))
        try:
            for line in lines:
                reply = decode(line)
                if reply.get("ok") is False:
                    raise ControlError(str(reply.get("error")), int(reply.get("exit_code", 1)))
                yield reply
                if "progress" not in reply:
                    return
        except TimeoutError as error:
            raise ControlError(f"no answer within {timeout:g} s") from error
        except ConnectionResetError as error:
            raise ControlError("the cluster went away before it answered") from error
