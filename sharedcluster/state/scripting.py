"""The Lua scripts in scripts/: their names on the server, their texts, and the commands that run them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from sharedcluster.state.wire import Argument, Command, pack_arguments, packed_pieces

_SCRIPTS = files("sharedcluster.state").joinpath("scripts")
_TEXTS: dict[str, str] = {}
COUNTS_LIMIT = 100
"""Numbers of keys and arguments of which the command's beginning is remembered, for each packer."""


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


@dataclass(slots=True)
class PackedScript:
    """A script's command as it goes over the wire, for `GroupCommit.many`. Frozen it would be dearer to create."""

    data: bytes


class ScriptPacker:
    """Packs the commands of one script whose first arguments seldom change.

    hiredis takes 2,000 instructions for an argument, and half of those that go with a session write are always the
    same. What is constant is packed once, the rest is put together by hand.
    """

    def __init__(self, name: str, constants: Iterable[bytes]) -> None:
        values = tuple(constants)
        self._count = 3 + len(values)
        self._start = pack_arguments((b"EVALSHA", script_sha(name).encode()))
        self._constants = pack_arguments(values)
        self._starts: dict[tuple[int, int], bytes] = {}

    def pack(self, keys: list[bytes], args: list[bytes]) -> PackedScript:
        """The command with these keys and, after the constant ones, these arguments."""
        counts = (len(keys), len(args))
        start = self._starts.get(counts)
        if start is None:
            start = b"*%d\r\n%b%b" % (self._count + sum(counts), self._start, pack_arguments([b"%d" % len(keys)]))
            if len(self._starts) < COUNTS_LIMIT:
                self._starts[counts] = start
        pieces = [start, *packed_pieces(keys + args)]
        pieces.insert(1 + 3 * len(keys), self._constants)
        return PackedScript(b"".join(pieces))


def script_command(name: str, keys: Sequence[str], args: Iterable[Argument]) -> Command:
    """The command that runs scripts/NAME.lua, for `GroupCommit.many`."""
    return ("EVALSHA", script_sha(name), len(keys), *keys, *args)
