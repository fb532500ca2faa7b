"""The Lua scripts in scripts/: their names on the server, their texts, and the commands that run them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files

from sharedcluster.state.wire import Argument, Command, Form

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


def script_form(name: str, keys: int, arguments: Sequence[bytes | None]) -> Form:
    """The command that runs scripts/NAME.lua with that many keys, which differ, and arguments, of which some do."""
    return Form([b"EVALSHA", script_sha(name).encode(), b"%d" % keys, *[None] * keys, *arguments])


def script_command(name: str, keys: Sequence[str], args: Iterable[Argument]) -> Command:
    """The command that runs scripts/NAME.lua, for `GroupCommit.many`."""
    return ("EVALSHA", script_sha(name), len(keys), *keys, *args)
