"""A live view of one cluster at a time: monit.

It sleeps in `select` on the keyboard and looks once a second, as often as workers report; it fits 80 columns and 24
lines, and is a line of figures a second where there is no terminal.
"""

from __future__ import annotations

import select
import shutil
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

import click

from sharedcluster.cli.tables import duration, megabytes, state_colour
from sharedcluster.cli.targets import Target, choose, is_running, known, names_argument
from sharedcluster.control import client
from sharedcluster.control.protocol import ControlError
from sharedcluster.errors import ConfigError, UserError
from sharedcluster.operating.following import last_lines
from sharedcluster.operating.records import logs_folder
from sharedcluster.operating.samples import Look, Rates, bar, rates, ratio, window
from sharedcluster.operating.spec import log_paths

INTERVAL: Final = 1.0
KEYS: Final = "q quit   r reload   + - scale   l logs   tab next app"
NO_RATES: Final = Rates(0.0, {}, 0.0, 0.0, 0.0, {})


@click.command()
@names_argument
@click.option("--count", type=click.IntRange(1), metavar="N", help="stop after so many looks")
def monit(names: tuple[str, ...], count: int | None) -> None:
    """Watch a cluster: workers, latencies, sessions, cache, Redis. Keys: q, r, +, -, l, tab."""
    targets = choose(names) if names else [target for target in known() if is_running(target)]
    if not targets:
        raise client.NotRunningError("No cluster is running.", advice="Start one: sharedcluster start APP")
    view = View(targets)
    if sys.stdout.isatty() and sys.stdin.isatty():
        _live(view, count)
    else:
        _plain(view, count)


class View:
    """What is looked at, and what was seen of it lately."""

    def __init__(self, targets: list[Target]) -> None:
        self.targets = targets
        self.index = 0
        self.looks: deque[Look] = deque(maxlen=32)
        self.message = ""
        self.shows_logs = False

    @property
    def target(self) -> Target:
        """The cluster that is shown."""
        return self.targets[self.index]

    def look(self) -> None:
        """Ask it once."""
        path = self.target.control
        assert path is not None
        try:
            facts = client.call(path, "status", timeout=1.0)["status"]
            latency = client.call(path, "latency", timeout=1.0)["workers"]
        except (UserError, ControlError, OSError) as error:
            self.message = str(error).splitlines()[0]
            return
        self.looks.append(Look(time.monotonic(), facts, {each["id"]: each["latency"] for each in latency}))

    def rates(self) -> Rates:
        """What happened in the last seconds."""
        pair = window(list(self.looks))
        return rates(*pair) if pair else NO_RATES

    def press(self, key: str) -> bool:
        """Do what a key means; returns whether to go on."""
        if key in ("q", "\x03", "\x1b"):
            return False
        if key == "\t":
            self.index = (self.index + 1) % len(self.targets)
            self.looks.clear()
            self.message = ""
        elif key == "l":
            self.shows_logs = not self.shows_logs
        elif key in _COMMANDS:
            command, arguments = _COMMANDS[key]
            self._tell(command, arguments)
        return True

    def _tell(self, command: str, arguments: dict[str, Any]) -> None:
        path = self.target.control
        assert path is not None
        try:
            client.call(path, command, timeout=2.0, **arguments)
            self.message = f"{time.strftime('%H:%M:%S')} {command} {arguments.get('workers', '')}".rstrip()
        except (UserError, ControlError, OSError) as error:
            self.message = str(error).splitlines()[0]

    def log_lines(self, count: int) -> list[str]:
        """The last lines of its log."""
        record = self.target.record
        if record is None:
            return ["(it runs in the foreground: its log is there)"]
        lines = last_lines(log_paths(record.spec, logs_folder()), count)
        return [f"{line.time[11:19]} {line.role or '-':<8} {line.text}" for line in lines]


_COMMANDS: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "r": ("reload", {"wait": False}),
    "+": ("scale", {"workers": "+1"}),
    "-": ("scale", {"workers": "-1"}),
}


# -- frames ------------------------------------------------------------------------------------------------------


def frame(view: View, width: int, height: int) -> list[tuple[str, str]]:
    """The screen as lines, each with its colour ("" for none), at the most `height` of them."""
    if not view.looks:
        return [(f"{view.target.name}: {view.message or 'asking...'}"[:width], ""), (KEYS, "")]
    facts, now = view.looks[-1].facts, view.rates()
    top = [(_title(facts, now), "bold"), ("", "")]
    bottom = [("", ""), *((line, "") for line in _state_lines(facts, now)), (view.message, "yellow"), (KEYS, "dim")]
    room = max(1, height - len(top) - len(bottom))
    if view.shows_logs:
        middle = [(line, "") for line in view.log_lines(room)]
    else:
        middle = _worker_lines(facts["workers"], now, room)
    return [(line[:width], colour) for line, colour in [*top, *middle, *bottom]]


def _title(facts: Mapping[str, Any], now: Rates) -> str:
    where = " ".join(each["address"] for each in facts["listeners"])
    return f"{facts['name']}  {facts['state']}  {now.requests:.0f} req/s  p50 {_ms(now.p50)}  p95 {_ms(now.p95)}" \
           f"  p99 {_ms(now.p99)} ms  {where}"  # fmt: skip


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds < 100 else f"{milliseconds:.0f}"


def _worker_lines(workers: list[Mapping[str, Any]], now: Rates, room: int) -> list[tuple[str, str]]:
    names = ("conns", "active", "req/s")
    header = f"{'slot':>4} {'pid':>7}  {'state':<9} {'cpu':<17} {'mem':>8} " + " ".join(f"{n:>6}" for n in names)
    header += f" {'restarts':>8}"
    lines = [(header, "dim")]
    shown = workers[: room - 1] if len(workers) <= room - 1 else workers[: max(0, room - 2)]
    for w in shown:
        cpu = f"{bar(w['cpu'] / 100, 10)} {w['cpu']:>3.0f}%"
        line = (
            f"{w['slot']:>4} {w['pid']:>7}  {w['state']:<9} {cpu:<17} {megabytes(w['rss']):>8} {w['connections']:>6}"
            f" {w['in_flight']:>6} {now.by_worker.get(w['id'], 0):>6.0f} {w['restarts']:>8}"
        )
        lines.append((line, state_colour(w["state"])))
    if len(shown) < len(workers):
        lines.append((f"     ... and {len(workers) - len(shown)} more", "dim"))
    return lines


def _state_lines(facts: Mapping[str, Any], now: Rates) -> Iterator[str]:
    redis, counters = facts["redis"], facts["counters"]
    latency = f" {redis['latency_ms']:.1f} ms" if redis.get("latency_ms") else ""
    yield (
        f"up {duration(time.time() - facts['started_at'])}   generation {facts['generation']}"
        f"   restarts {counters.get('restarts', 0)}   reloads {counters.get('reloads', 0)}"
        f"   5xx {counters.get('responses_5xx', 0)}   redis {redis['state']}{latency}"
    )
    per_second = now.counters
    hits = ratio(per_second, _HITS, (*_HITS, "cache_misses"))
    yield (
        f"sessions {per_second.get('session_loads', 0) + per_second.get('session_near_hits', 0):.0f} read/s"
        f" {per_second.get('session_saves', 0):.0f} saved/s {counters.get('session_created', 0)} new"
        f"   cache {'-' if hits is None else f'{hits * 100:.1f}%'} hits"
        f"   gaps {counters.get('gaps', 0)}"
        + (f"   log lines lost {counters['log_lines_lost']}" if counters.get("log_lines_lost") else "")
    )


_HITS: Final = ("cache_hits", "cache_near_hits")


# -- where it is shown -------------------------------------------------------------------------------------------


def _plain(view: View, count: int | None) -> None:
    """A line a second, for a pipe or a file."""
    looks = 0
    with suppress(KeyboardInterrupt):
        view.look()
        while count is None or looks < count:
            time.sleep(INTERVAL)
            view.look()
            looks += 1
            if not view.looks:
                raise ConfigError(f"{view.target.name}: {view.message}")
            facts, now = view.looks[-1].facts, view.rates()
            cpu = sum(w["cpu"] for w in facts["workers"])
            mem = megabytes(sum(w["rss"] for w in facts["workers"]))
            click.echo(f"{time.strftime('%H:%M:%S')}  {_title(facts, now)}  workers {len(facts['workers'])}"
                       f"  cpu {cpu:.0f}%  mem {mem}  restarts {facts['counters'].get('restarts', 0)}")  # fmt: skip


def _live(view: View, count: int | None) -> None:
    try:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        raise ConfigError(
            "monit on a terminal needs a package.",
            advice=('pip install "sharedcluster[cli]"', "Or a line a second: sharedcluster monit | cat"),
        ) from None
    console = Console()

    def draw() -> Any:
        size = shutil.get_terminal_size((80, 24))
        lines = frame(view, size.columns, size.lines - 1)
        return Text("\n").join(Text(line, style=colour, no_wrap=True) for line, colour in lines)

    with _keys() as wait_for_key, Live(console=console, screen=True, auto_refresh=False) as live:
        looks = 0
        next_look = 0.0
        while count is None or looks < count:
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + INTERVAL
                view.look()
                looks += 1
            live.update(draw(), refresh=True)
            key = wait_for_key(max(0.0, next_look - time.monotonic()))
            if key and not view.press(key):
                return
            if key == "\t":
                next_look = 0.0


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Keys as they are pressed, without Enter; the terminal is put back at the end."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def wait(seconds: float) -> str:
        try:
            ready, _, _ = select.select([fd], [], [], seconds)
        except InterruptedError:
            return ""
        return sys.stdin.read(1) if ready else ""

    try:
        tty.setcbreak(fd)
        yield wait
    except KeyboardInterrupt:
        return
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
