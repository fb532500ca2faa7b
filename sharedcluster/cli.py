"""The `sharedcluster` command. It builds the primary from its parts and hands it the worker's entry.

Nothing heavy is imported here: `status` and `--help` answer at once, and the process that runs `run` becomes the
primary, which must stay clean. What a command needs beyond that it imports itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from sharedcluster import config as configuration
from sharedcluster.cluster.signals import as_table
from sharedcluster.config import Resolved, Setting
from sharedcluster.control import client
from sharedcluster.control.protocol import ControlError
from sharedcluster.errors import AppLoadError, UserError
from sharedcluster.version import VERSION

EXAMPLES = """
\b
Examples:
  sharedcluster run demo_app                    the demo, on http://127.0.0.1:8000
  sharedcluster run shop.web:create_app() -w 4  a factory, four workers
  sharedcluster run shop -b unix:/run/shop.sock --redis redis://cache:6379/0
  sharedcluster status                          what runs, and how
  sharedcluster stop                            drain and stop
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a user did wrong is one block on stderr, without a traceback."""
    try:
        code = cli.main(arguments, prog_name="sharedcluster", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except UserError as error:
        show_error(error)
        sys.exit(error.exit_code)
    except ControlError as error:
        click.echo(f"sharedcluster: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `sharedcluster status | head`
        sys.stderr.close()
        sys.exit(0)


def show_error(error: UserError) -> None:
    """What happened, the fact, what to type; and the application's own traceback, if that is what it is about."""
    if isinstance(error, AppLoadError) and error.traceback:
        click.echo(error.traceback, err=True)
    lines = str(error).splitlines()
    click.echo("\n".join([f"sharedcluster: {lines[0]}", *(f"  {line}" for line in lines[1:])]), err=True)


@click.group(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(message="%(version)s", version=VERSION)
def cli() -> None:
    """One Flask app on all cores, with one state."""


# -- settings as options -----------------------------------------------------------------------------------------


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command every setting as an option, from the one table."""
    for name, (declared, about) in reversed(configuration.settings().items()):
        if about.flags:
            command = _option(name, declared.default, about)(command)
    command = click.option(
        "-c", "--config", "config_file", metavar="FILE", help="read this file [sharedcluster.toml]"
    )(command)
    return click.argument("app", required=False, default=None)(command)


def _option(name: str, default: Any, about: Setting) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    shown = about.shown or (", ".join(map(str, default)) if isinstance(default, tuple) else default)
    text = about.help + ("" if shown in ("", False) else f" [{'off' if shown in (0, 0.0) else shown}]")
    if about.is_switch:
        return click.option(*about.flags, name, is_flag=True, default=None, help=text)
    return click.option(*about.flags, name, default=None, multiple=about.many, metavar=about.metavar, help=text)


def resolve(options: dict[str, Any]) -> Resolved:
    """The configuration from a command's options and everything behind them."""
    file = options.pop("config_file", None) or os.environ.get("SHAREDCLUSTER_CONFIG")
    given = {name: value for name, value in options.items() if value not in (None, ())}
    return configuration.resolve(given, os.environ, dotenv=_dotenv(), file=file)


def _dotenv() -> Mapping[str, str]:
    """What `.env` says; it is also set for the application, as Flask's own command does."""
    if not Path(".env").is_file():
        return {}
    try:
        from dotenv import dotenv_values  # an extra
    except ImportError:
        click.echo('There is a .env file, which is not read without: pip install "sharedcluster[dotenv]"', err=True)
        return {}
    values = {key: value for key, value in dotenv_values(".env").items() if value is not None}
    read = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(read)
    for key in read:
        os.environ.pop(key, None) if key.startswith(configuration.ENV_PREFIX) else None
    return read


# -- run ---------------------------------------------------------------------------------------------------------


@cli.command(epilog="\b\nSignals to the primary:\n" + as_table())
@with_settings
def run(**options: Any) -> int:
    """Serve APP (Flask's own notation; any WSGI callable) in the foreground until it is told to stop."""
    from sharedcluster.starting import start  # binds, starts Redis, checks the application, becomes the primary

    return start(resolve(options))


@cli.command()
@with_settings
@click.option("--json", "as_json", is_flag=True, help="for machines")
def config(as_json: bool, **options: Any) -> None:
    """Print every setting, its value and where that came from."""
    resolved = resolve(options)
    rows = {name: (_shown(getattr(resolved.config, name)), resolved.sources[name]) for name in resolved.sources}
    if as_json:
        click.echo(json.dumps({n: {"value": v, "source": s} for n, (v, s) in rows.items()}, indent=2))
        return
    for name, (value, source) in rows.items():
        click.echo(f"{name:<20} {value!s:<32} {source}")


def _shown(value: Any) -> Any:
    if isinstance(value, tuple):
        return [str(item) for item in value]
    from sharedcluster.redis_server import redact

    return redact(value) if isinstance(value, str) and "://" in value else value


@cli.command()
@with_settings
def check(**options: Any) -> None:
    """Load APP and ask Redis without serving; exits with the code that `run` would fail with."""
    from sharedcluster.starting import check_only

    for line in check_only(resolve(options)):
        click.echo(line)


# -- operating a running cluster ---------------------------------------------------------------------------------


def which_cluster(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that name a running cluster."""
    command = click.option("--control", default="", metavar="PATH", help="its control socket")(command)
    return click.option("--name", default="", metavar="NAME", help="which cluster, if several run")(command)


def _find(cluster: str | None, name: str, control: str) -> Path:
    return client.find(cluster or name, control)


@cli.command()
@click.argument("cluster", required=False, metavar="[NAME]")
@which_cluster
@click.option("--json", "as_json", is_flag=True, help="for machines; the shape is stable")
def status(cluster: str | None, name: str, control: str, as_json: bool) -> None:
    """Show a running cluster and its workers."""
    facts = client.call(_find(cluster, name, control), "status")["status"]
    click.echo(json.dumps(facts, indent=2) if as_json else status_table(facts))


def status_table(facts: Mapping[str, Any]) -> str:
    """The status as text: one line on the cluster, one on each worker, a state always as a word."""
    redis = facts["redis"]
    latency = f" {redis['latency_ms']:.1f} ms" if redis["state"] == "ok" and redis["latency_ms"] is not None else ""
    addresses = " ".join(each["address"] for each in facts["listeners"])
    up = _duration(time.time() - facts["started_at"])
    lines = [
        f"{facts['name']}  {facts['state']}  up {up}  pid {facts['pid']}  {addresses}  redis {redis['state']}{latency}"
        f"  generation {facts['generation']}  restarts {facts['counters'].get('restarts', 0)}",
        "",
        "slot    id      pid  state      uptime  restarts  conns  active  requests    cpu      mem",
    ]
    lines += [
        (
            f"{worker['slot']:>4}  {worker['id']:>4}  {worker['pid']:>7}  {worker['state']:<9}"
            f"  {_duration(worker['uptime']):>6}  {worker['restarts']:>8}  {worker['connections']:>5}"
            f"  {worker['in_flight']:>6}  {worker['requests']:>8}  {worker['cpu']:>4.0f}%"
            f"  {worker['rss'] / 1048576:>4.0f} MB"
        )
        for worker in facts["workers"]
    ]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    whole = int(max(0.0, seconds))
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{small}"
    return f"{whole}s"


@cli.command()
@click.argument("cluster", required=False, metavar="[NAME]")
@which_cluster
@click.option("--now", is_flag=True, help="cut what is in flight")
def stop(cluster: str | None, name: str, control: str, now: bool) -> None:
    """Drain and stop a cluster, and wait until it is gone."""
    path = _find(cluster, name, control)
    pid = client.call(path, "stop", now=now)["pid"]
    with _interruptible("It goes on draining."):
        while _is_alive(pid):
            time.sleep(0.05)
    click.echo(f"{path.stem} stopped")


@cli.command()
@click.argument("cluster", required=False, metavar="[NAME]")
@which_cluster
@click.option("--wait/--no-wait", default=True, help="until the new generation serves, or does not come up [wait]")
def reload(cluster: str | None, name: str, control: str, wait: bool) -> None:
    """Replace all workers: a new generation first, then the old one drains."""
    path = _find(cluster, name, control)
    started = time.monotonic()
    with _interruptible("The reload goes on."):
        reply = client.call(path, "reload", timeout=None, wait=wait)
    ending = f"serves after {time.monotonic() - started:.1f} s" if wait else "is on its way"
    click.echo(f"{path.stem}: generation {reply['generation']} {ending}")


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, metavar="[NAME] N|+N|-N")
@which_cluster
def scale(arguments: tuple[str, ...], name: str, control: str) -> None:
    """Change the number of workers."""
    if not 1 <= len(arguments) <= 2:
        raise click.UsageError("give a number of workers: sharedcluster scale 4, scale +2, scale NAME 4")
    path = _find(arguments[0] if len(arguments) == 2 else None, name, control)
    reply = client.call(path, "scale", workers=arguments[-1])
    click.echo(f"{path.stem}: {reply['workers']} workers")


@contextmanager
def _interruptible(consequence: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo(consequence, err=True)
        sys.exit(130)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A zombie that nobody reaps is gone for everybody else.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return False
