"""Reading log files: logs, flush."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any, Final

import click

from sharedcluster.cli.tables import coloured, say, wants_colour
from sharedcluster.cli.targets import Target, choose, known, names_argument
from sharedcluster.errors import ConfigError
from sharedcluster.operating.following import Follower, Line, last_lines
from sharedcluster.operating.records import logs_folder
from sharedcluster.operating.spec import log_paths

COLOURS: Final = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")
POLL: Final = 0.2
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")


@click.command(epilog="\b\nExamples:\n  sharedcluster logs\n  sharedcluster logs shop --worker 1 --lines 100\n"
               "  sharedcluster logs shop --err --no-follow\n  sharedcluster logs --json | jq .message")  # fmt: skip
@names_argument
@click.option("--worker", type=int, default=None, metavar="SLOT", help="only this worker")
@click.option("--err", is_flag=True, help="only standard error, where the log goes too")
@click.option("--out", is_flag=True, help="only standard output")
@click.option("--lines", default=15, metavar="N", help="how many old lines first [15]")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a line")
@click.option("--follow/--no-follow", default=True, help="go on as lines come [follow]")
def logs(
    names: tuple[str, ...], worker: int | None, err: bool, out: bool, lines: int, as_json: bool, follow: bool
) -> None:
    """Show the last lines of the log files of NAME (or of all apps) and follow them, also when they are rotated."""
    targets = choose(names, running=False) if names else [target for target in known() if target.record]
    chosen = {target.name: _paths(target, err=err, out=out) for target in targets if target.record or names}
    if not chosen:
        raise ConfigError("No app is kept, so there are no log files.", advice="Start one: sharedcluster start APP")
    wanted = _filter(worker, err=err, out=out)
    show = _printer(as_json=as_json, names=len(chosen) > 1)
    followers = {name: [Follower(path) for path in paths] for name, paths in chosen.items()} if follow else {}
    for name, paths in chosen.items():
        for line in last_lines(paths, lines, wanted):
            show(name, line)
    try:
        while followers:
            for name, each in followers.items():
                for line in sorted((line for one in each for line in one.lines()), key=_time):
                    if wanted(line):
                        show(name, line)
            time.sleep(POLL)
    except KeyboardInterrupt:
        return


def _time(line: Line) -> str:
    return line.time or "\x7f"  # what has no time of its own stays behind what came with it


def _paths(target: Target, *, err: bool, out: bool) -> list[str]:
    if target.record is None:
        raise ConfigError(
            f"{target.name} runs in the foreground: its log is where it was started.",
            advice="sharedcluster run APP --error-file PATH writes one",
        )
    out_path, err_path = log_paths(target.record.spec, logs_folder())
    if out_path == err_path or err == out:
        return list(dict.fromkeys((out_path, err_path)))
    return [err_path if err else out_path]


def _filter(worker: int | None, *, err: bool, out: bool) -> Callable[[Line], bool]:
    def wanted(line: Line) -> bool:
        if worker is not None and line.role != f"w{worker}":
            return False
        return err == out or line.stream == ("err" if err else "out")

    return wanted


def _printer(*, as_json: bool, names: bool) -> Callable[[str, Line], None]:
    def show_json(name: str, line: Line) -> None:
        fact: dict[str, Any] = {"app": name, "time": line.time, "role": line.role, "stream": line.stream}
        click.echo(json.dumps({**fact, "message": line.text}))

    def show(name: str, line: Line) -> None:
        role = line.role or "-"
        label = f"{name}|{role}" if names else role
        clock = line.time.partition(" ")[2] or line.time[11:23]
        mark = "|" if line.stream == "out" else "!"
        text = _printable(line.text)
        say(f"{coloured(f'{clock:<12} {label:<8} {mark}', _colour(role))} {text}")

    return show_json if as_json else show


def _printable(text: str) -> str:
    """What an application wrote may have colour, but must not move the cursor of whoever reads it."""
    pieces = [_escaped(piece) for piece in _COLOUR.split(text)]
    if not wants_colour():
        return "".join(pieces)
    marks = [*_COLOUR.findall(text), ""]
    return "".join(piece + mark for piece, mark in zip(pieces, marks, strict=True)) + ("\x1b[0m" if marks[:-1] else "")


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\t\n" else f"\\x{ord(c):02x}" for c in text)


def _colour(role: str) -> str:
    return COLOURS[int(role[1:]) % len(COLOURS)] if role[:1] == "w" and role[1:].isdigit() else "white"


@click.command()
@names_argument
def flush(names: tuple[str, ...]) -> None:
    """Empty the log files of NAME, and remove the rotated ones."""
    from pathlib import Path

    from sharedcluster.operating.rotation import rotated_files

    for target in choose(names, running=False):
        for path in _paths(target, err=False, out=False):
            if Path(path).exists():
                with open(path, "r+b") as file:
                    file.truncate(0)
            for old in rotated_files(path):
                old.unlink(missing_ok=True)
        click.echo(f"{target.name}: log files are empty")
