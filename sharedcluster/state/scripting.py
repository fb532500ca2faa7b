"""The Lua scripts in scripts/: their names on the server, their texts, and the commands that run them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from sharedcluster.state.wire import Argument, Command, pack_argument

_SCRIPTS = files("sharedcluster.state").joinpath("scripts")
_TEXTS: dict[str, str] = {}


@cache
def script_sha(name: str) -> str:
    """What Redis calls scripts/NAME.lua."""
    text = _SCRIPTS.joinpath(f"{name}.lua").read_text(encoding="utf-8")
    sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()  # what Redis names a script by
    _TEXTS[sha] = text
    return sha


def script_names() -> list[str]:
    """All there are."""
    return sorted(entry.name[:-4] for entry in _SCRIPTS.iterdir() if entry.name.endswith(".lua"))


def script_text(sha: str) -> str:
    """The text of a script this process has used."""
    return _TEXTS[sha]


def script_command(name: str, keys: Sequence[str], args: Iterable[Argument]) -> Command:
    """The command that runs scripts/NAME.lua, for `GroupCommit.many`."""
    return ("EVALSHA", script_sha(name), len(keys), *keys, *args)


@dataclass(slots=True)
class Part:
    """One caller's share in a run of a `JointScript`, packed."""

    script: JointScript
    keys: bytes
    key_count: int
    arguments: bytes
    argument_count: int

    def command(self) -> bytes:
        """The run that does this and nothing else."""
        return self.script.command([self])


class JointScript:
    """A script that does the work of several callers in one run, for one call, one reply and one message.

    It is given the keys of all, then the arguments they have in common, then each caller's own, and returns an array:
    for each what became of its part.

    Args:
        name: scripts/NAME.lua.
        common: The arguments they have in common.
    """

    def __init__(self, name: str, common: Sequence[bytes]) -> None:
        self._sha = script_sha(name).encode()
        self._common = b"".join(map(pack_argument, common))
        self._common_count = len(common)

    def command(self, parts: Sequence[Part]) -> bytes:
        """The run that does all of these."""
        key_count = sum([part.key_count for part in parts])
        count = 3 + key_count + self._common_count + sum([part.argument_count for part in parts])
        start = b"*%d\r\n$7\r\nEVALSHA\r\n$40\r\n%b\r\n%b" % (count, self._sha, pack_argument(b"%d" % key_count))
        return b"".join([start, *[part.keys for part in parts], self._common, *[part.arguments for part in parts]])
