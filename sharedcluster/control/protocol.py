"""What is said on a control socket: one JSON object a line, a command or its reply.

    -> {"command": "scale", "workers": "+2"}
    <- {"ok": true, "workers": 6}            or  {"ok": false, "error": "...", "exit_code": 2}

The folder is 0700 and the socket 0600: whoever may open it may operate the cluster.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, Final

from sharedcluster.errors import ConfigError, PeerError

SCHEMA: Final = 1
MAX_LINE: Final = 65536
NAME_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


class ControlError(PeerError):
    """The other side did not speak the protocol, or refused the command."""

    def __init__(self, what: str, exit_code: int = 1) -> None:
        super().__init__(what)
        self.exit_code = exit_code


def encode(message: dict[str, Any]) -> bytes:
    """One line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The object on a line.

    Raises:
        ControlError: It is none.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ControlError("a line is not JSON") from error
    if not isinstance(message, dict):
        raise ControlError("a line is not a JSON object")
    return message


def check_name(name: str) -> str:
    """A cluster's name becomes a file name, so it is letters, digits, `_`, `.` and `-`, at most 64 of them."""
    if not name or len(name) > 64 or not NAME_CHARACTERS.issuperset(name) or name.startswith((".", "-")):
        raise ConfigError(
            f"{name!r} cannot be the name of a cluster.",
            advice="A name is 1 to 64 letters, digits, '_', '.' or '-': --name shop",
        )
    return name


def runtime_folder(*, create: bool = False) -> Path:
    """Where control sockets are: `$SHAREDCLUSTER_RUNTIME_DIR`, `$XDG_RUNTIME_DIR/sharedcluster`, or one in /tmp.

    Raises:
        ConfigError: The folder is not ours alone, so a socket in it could be somebody else's.
    """
    if given := os.environ.get("SHAREDCLUSTER_RUNTIME_DIR"):
        folder = Path(given)
    elif base := os.environ.get("XDG_RUNTIME_DIR"):
        folder = Path(base) / "sharedcluster"
    else:
        folder = Path(f"/tmp/sharedcluster-{os.getuid()}")  # noqa: S108 - its owner and mode are checked below
    if create:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(folder, "SHAREDCLUSTER_RUNTIME_DIR")
    return folder


def check_private(folder: Path, variable: str, *, may_be_link: bool = False) -> None:
    """See that a folder, if it is there, belongs to this user alone; `variable` names the way to another one.

    A link is refused where others can make one (/tmp), and followed where only its owner can (a home).

    Raises:
        ConfigError: It is somebody else's, or others may enter it.
    """
    try:
        facts = folder.stat(follow_symlinks=may_be_link)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ConfigError(
            f"{folder} is not a folder of yours alone.",
            fact=f"It must be a folder of user {os.getuid()} with mode 0700.",
            advice=f"Set {variable} to another one, or mend it: chmod 700",
        )
