"""Which clusters a command is about: a name, an id, `all`, an ecosystem file, or the only one there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from sharedcluster.control import client
from sharedcluster.control.client import NotRunningError
from sharedcluster.errors import ConfigError
from sharedcluster.operating import ecosystem, records
from sharedcluster.operating.records import Record


@dataclass(frozen=True, slots=True)
class Target:
    """A cluster: kept (it has a record), or run in the foreground (it has only a socket)."""

    name: str
    control: Path | None
    record: Record | None = None


def complete_names(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names for the shell's completion; a completion never fails aloud."""
    with suppress(Exception):
        return [CompletionItem(t.name) for t in known() if t.name.startswith(incomplete)]
    return []


names_argument = click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete_names)


def with_address(command: Callable[..., Any]) -> Callable[..., Any]:
    """Other ways to say which cluster."""
    command = click.option("--control", default="", metavar="PATH", help="its control socket")(command)
    return click.option("--name", default="", metavar="NAME", help="which one, if several run")(command)


def known() -> list[Target]:
    """Every cluster there is to know of: the kept ones by id, then those in the foreground."""
    kept = [Target(r.name, Path(r.state.control) if r.state.control else None, r) for r in records.load_all()]
    theirs = {target.control for target in kept}
    loose = [Target(path.stem, path) for path in client.sockets() if path not in theirs]
    return kept + [target for target in loose if target.name not in {t.name for t in kept}]


def choose(words: Iterable[str], name: str = "", control: str = "", *, running: bool = True) -> list[Target]:
    """The clusters that are meant; none named means the only one.

    Args:
        words: Names, ids, `all` or ecosystem files.
        name: The same by option.
        control: A control socket instead.
        running: Whether only running ones count when none is named.

    Raises:
        NotRunningError: There is no such cluster.
        ConfigError: Several could be meant.
    """
    if control:
        return [Target(Path(control).stem, Path(control))]
    wanted = [*words, *([name] if name else [])]
    there = known()
    if not wanted:
        return [_only(there, running=running)]
    chosen: dict[str, Target] = {}
    for word in wanted:
        chosen |= {target.name: target for target in _matching(word, there)}
    return list(chosen.values())


def _only(there: Sequence[Target], *, running: bool) -> Target:
    candidates = [target for target in there if not running or is_running(target)]
    if not candidates:
        raise NotRunningError("No cluster is running.", advice="Start one: sharedcluster run APP")
    if len(candidates) > 1:
        names = ", ".join(target.name for target in candidates)
        raise ConfigError(f"Several clusters are running: {names}.", advice="Name one of them, or all.")
    return candidates[0]


def is_running(target: Target) -> bool:
    """Whether something of it runs."""
    if target.record is not None and target.record.is_running():
        return True
    return target.control is not None and client.is_running(target.control)


def _matching(word: str, there: Sequence[Target]) -> list[Target]:
    if word == "all":
        return list(there)
    if ecosystem.is_file_name(word):
        sections = ecosystem.read(Path(word), _no_name).sections
        return [target for target in there if target.name in sections]
    found = [target for target in there if target.name == word]
    if not found and word.isdigit():
        found = [target for target in there if target.record is not None and target.record.id == int(word)]
    if not found:
        names = ", ".join(target.name for target in there) or "none"
        raise NotRunningError(f"No cluster named {word!r} is running.", fact=f"Known: {names}.")
    return found


def _no_name(app: str) -> str:
    from sharedcluster.cli.options import default_name

    return default_name(app)
