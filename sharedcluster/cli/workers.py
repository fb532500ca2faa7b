"""One worker of a running cluster, by its id: `drain ID`, `describe ID`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sharedcluster.cli.tables import facts_block
from sharedcluster.cli.targets import choose, known, with_address
from sharedcluster.control import client
from sharedcluster.errors import ConfigError


def worker_meant(words: tuple[str, ...], name: str, control: str) -> tuple[Path, str] | None:
    """The control socket and the worker's id, if words say `ID` or `NAME ID`; an app of that number goes before."""
    if not words or not words[-1].isdigit() or len(words) > 2:
        return None
    if len(words) == 1 and any(t.record is not None and t.record.id == int(words[0]) for t in known()):
        return None
    (target, *others) = choose(words[:-1], name, control)
    if others or target.control is None:
        raise ConfigError("A worker's id is about one cluster.", advice="Name one: sharedcluster describe NAME ID")
    return target.control, words[-1]


def show_worker(control: Path, id: str, *, as_json: bool) -> None:
    """What the primary knows of a worker, and what the kernel says of its memory."""
    facts: dict[str, Any] = client.call(control, "describe", id=id)["worker"]
    facts |= _memory(facts["pid"])
    if as_json:
        click.echo(json.dumps({"schema": 1, **facts}, indent=2))
    else:
        click.echo(facts_block(facts))


def _memory(pid: int) -> dict[str, int]:
    """Unique and proportional set size in bytes; psutil reads the whole map for it, so only here."""
    import psutil

    try:
        memory = psutil.Process(pid).memory_full_info()
    except psutil.Error:
        return {}
    return {"uss": memory.uss, "pss": memory.pss}


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, metavar="[NAME] ID")
@with_address
def drain(words: tuple[str, ...], name: str, control: str) -> None:
    """Take one worker out: its replacement comes first, then it answers what it has and leaves."""
    meant = worker_meant(words, name, control)
    if meant is None:
        raise click.UsageError("give a worker's id, as `sharedcluster status` shows it: sharedcluster drain 3")
    path, id = meant
    reply = client.call(path, "drain", id=id)
    click.echo(f"{path.stem}: worker {reply['id']} (slot {reply['slot']}) leaves when its replacement is ready")
