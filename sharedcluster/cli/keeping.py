"""Keeping applications alive: start, stop, restart, reload, scale, signal, reset, delete.

Each waits for the outcome, says it in one line for each application, and exits with a code other than 0 when one of
them failed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click

from sharedcluster.cli.options import default_name, given, with_settings, with_upkeep
from sharedcluster.cli.targets import Target, choose, complete_names, names_argument, with_address
from sharedcluster.control import client
from sharedcluster.control.client import NotRunningError
from sharedcluster.control.protocol import ControlError, check_name
from sharedcluster.errors import ConfigError, UserError
from sharedcluster.operating import actions, ecosystem, records
from sharedcluster.operating.records import ProcessId
from sharedcluster.operating.spec import AppSpec, read_upkeep, upkeep_settings

STOP_POLL: Final = 0.05


@contextmanager
def _interruptible(consequence: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo(consequence, err=True)
        sys.exit(130)


def _each(targets: Sequence[Target], act: Callable[[Target], str]) -> int:
    """Do something to each, go on after a failure, and return the exit code of the first one."""
    worst = 0
    for target in targets:
        try:
            click.echo(act(target))
        except (UserError, ControlError) as error:
            lines = str(error).splitlines()
            head = lines[0] if lines[0].startswith(target.name) else f"{target.name}: {lines[0]}"
            click.echo("\n".join([f"sharedcluster: {head}", *(f"  {line}" for line in lines[1:])]), err=True)
            worst = worst or error.exit_code
    return worst


def _control(target: Target) -> Path:
    if target.control is None or not client.is_running(target.control):
        raise NotRunningError(f"{target.name} is not running.", advice=f"Start it: sharedcluster start {target.name}")
    return target.control


# -- start -------------------------------------------------------------------------------------------------------


START_EXAMPLES: Final = """
\b
Examples:
  sharedcluster start
  sharedcluster start shop.toml --env production
  sharedcluster start shop:create_app() --name shop -w 2 --port 8001
  sharedcluster start shop
"""


@click.command(epilog=START_EXAMPLES)
@click.argument("what", required=False, default=None, metavar="[APP|FILE|NAME]", shell_complete=complete_names)
@click.option("--only", multiple=True, metavar="NAME", help="only this app of the file; repeatable")
@click.option("--env", "env_name", default="", metavar="NAME", help="with this section of env")
@with_upkeep
@with_settings
def start(what: str | None, only: tuple[str, ...], env_name: str, **options: Any) -> int:
    """Start an app, every app of a FILE, or a stopped app by its NAME, in the background.

    Without an argument it is sharedcluster.toml (.yaml, .json) of this folder. It returns when all workers listen, or
    with what went wrong.
    """
    specs = _specs(what, only, env_name, options)
    with _interruptible("It goes on starting: sharedcluster list"):
        return _each([Target(spec.name, None) for spec in specs], _starter({spec.name: spec for spec in specs}))


def _starter(specs: dict[str, AppSpec]) -> Callable[[Target], str]:
    def act(target: Target) -> str:
        spec = specs[target.name]
        known = records.load(spec.name)
        if known and known.is_running() and spec.file and len(specs) > 1 and _same(known.spec, spec):
            return f"{spec.name} runs already"
        return said(actions.start(spec))

    return act


def _same(one: AppSpec, other: AppSpec) -> bool:
    return replace(one, environ={}) == replace(other, environ={})


def said(started: actions.Started) -> str:
    """The outcome of a start, as a line."""
    record = started.record
    state = records.load_state(record.name)
    addresses = ""
    with suppress(UserError, ControlError):
        facts = client.call(Path(state.control), "status")["status"]
        addresses = " on " + " ".join(each["address"] for each in facts["listeners"])
    workers = f"{started.workers} worker" + ("s" if started.workers != 1 else "")
    return f"{record.name} (id {record.id}) started in {started.seconds:.1f} s: {workers}{addresses}"


def _specs(what: str | None, only: tuple[str, ...], env_name: str, options: dict[str, Any]) -> list[AppSpec]:
    config_file = options.pop("config_file", None) or os.environ.get("SHAREDCLUSTER_CONFIG")
    values = given(options)
    environ = dict(os.environ)
    if what is None or ecosystem.is_file_name(what):
        path = Path(what or config_file or ecosystem.default_file(Path()) or _no_file())
        return ecosystem.read(path, default_name).specs(environ, only=only, env_name=env_name, given=values)
    known = next((r for r in records.load_all() if what in (r.name, str(r.id))), None)
    if known is not None:
        return [_renewed(known.spec, values, env_name)]
    if only or env_name:
        raise click.UsageError("--only and --env need an ecosystem file")
    return [_from_command_line(what, config_file, values, environ)]


def _no_file() -> Path:
    raise ConfigError(
        f"Nothing to start: there is none of {', '.join(ecosystem.DEFAULT_FILES)} here.",
        advice=("Name an app: sharedcluster start shop:app", "Or write a file: sharedcluster init"),
    )


def _renewed(spec: AppSpec, values: dict[str, Any], env_name: str) -> AppSpec:
    """A stopped application again, with what is given now in addition."""
    if env_name:
        spec = _reread(replace(spec, env_name=env_name))
    own = {k: v for k, v in values.items() if k not in upkeep_settings()}
    kept = {k: getattr(spec.upkeep, k) for k in upkeep_settings()} | {
        k: v for k, v in values.items() if k in upkeep_settings()
    }
    return replace(spec, given={**spec.given, **own}, upkeep=read_upkeep(kept, "command line"))


def _reread(spec: AppSpec) -> AppSpec:
    """An application as its file describes it now; its environment stays the one it was started from."""
    if not spec.file:
        raise ConfigError(f"{spec.name} did not come from a file.", advice="Delete it and start it anew.")
    file = ecosystem.read(Path(spec.file), default_name)
    return file.specs(spec.environ, only=[spec.name], env_name=spec.env_name, given=spec.given)[0]


def _from_command_line(app: str, config_file: str | None, values: dict[str, Any], environ: dict[str, str]) -> AppSpec:
    own = {k: v for k, v in values.items() if k not in upkeep_settings()}
    settings: dict[str, Any] = {}
    where = ""
    if config_file:
        file = ecosystem.read(Path(config_file), default_name)
        first = file.specs(environ)[0]
        settings, where = dict(first.settings), first.where
    return AppSpec(
        name=check_name(str(values.get("name") or default_name(app))),
        settings=settings,
        where=where,
        given={**own, "app": app},
        cwd=os.getcwd(),
        environ=environ,
        upkeep=read_upkeep(values, "command line"),
    )


# -- stop, restart, delete ---------------------------------------------------------------------------------------


@click.command()
@names_argument
@with_address
@click.option("--now", is_flag=True, help="cut what is in flight")
def stop(names: tuple[str, ...], name: str, control: str, now: bool) -> int:
    """Drain and stop, and wait until it is gone. It stays in `list` and can be started again by its name."""

    def act(target: Target) -> str:
        if target.record is not None:
            ran = actions.stop(target.record, now=now)
            return f"{target.name} stopped" if ran else f"{target.name} was not running"
        path = _control(target)
        process = ProcessId.of(client.call(path, "stop", now=now)["pid"])
        while process.is_alive():
            time.sleep(STOP_POLL)
        return f"{target.name} stopped"

    targets = choose(names, name, control)
    with _interruptible("It goes on draining."):
        return _each(targets, act)


@click.command()
@names_argument
@with_address
@click.option("--env", "env_name", default="", metavar="NAME", help="with this section of env of its file")
def restart(names: tuple[str, ...], name: str, control: str, env_name: str) -> int:
    """Stop and start again. For new code `reload` is better: nobody is refused.

    The recorded settings are used; a FILE in place of a NAME is read anew.
    """
    files = [word for word in names if ecosystem.is_file_name(word)]
    fresh = {spec.name: spec for path in files for spec in _specs(path, (), env_name, {})}

    def act(target: Target) -> str:
        spec = fresh.get(target.name)
        if target.record is None:
            if spec is not None:
                return said(actions.start(spec))
            raise ConfigError(
                f"{target.name} runs in the foreground.", advice=f"New code: sharedcluster reload {target.name}"
            )
        if spec is None and env_name:
            spec = _reread(replace(target.record.spec, env_name=env_name))
        return said(actions.restart(target.record, spec))

    targets = {target.name: target for target in choose(names, name, control, running=False)}
    targets |= {each: Target(each, None) for each in fresh if each not in targets}
    with _interruptible("It goes on."):
        return _each(list(targets.values()), act)


@click.command()
@names_argument
@with_address
def delete(names: tuple[str, ...], name: str, control: str) -> int:
    """Stop and forget: it leaves `list`. Its log files stay."""

    def act(target: Target) -> str:
        if target.record is not None:
            actions.delete(target.record)
        elif target.control is not None and not actions.clean_socket(str(target.control)):
            raise ConfigError(f"{target.name} runs in the foreground.", advice=f"sharedcluster stop {target.name}")
        return f"{target.name} deleted"

    with _interruptible("It goes on stopping."):
        return _each(choose(names, name, control, running=False), act)


# -- through the control socket ----------------------------------------------------------------------------------


@click.command()
@names_argument
@with_address
@click.option("--wait/--no-wait", default=True, help="until the new generation serves, or does not come up [wait]")
def reload(names: tuple[str, ...], name: str, control: str, wait: bool) -> int:
    """Replace all workers: a new generation first, then the old one drains. No request is lost."""

    def act(target: Target) -> str:
        started = time.monotonic()
        reply = client.call(_control(target), "reload", timeout=None, wait=wait)
        ending = f"serves after {time.monotonic() - started:.1f} s" if wait else "is on its way"
        return f"{target.name}: generation {reply['generation']} {ending}"

    with _interruptible("The reload goes on."):
        return _each(choose(names, name, control), act)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, metavar="[NAME] N|+N|-N", shell_complete=complete_names)
@with_address
def scale(arguments: tuple[str, ...], name: str, control: str) -> int:
    """Change the number of workers; a later start or restart keeps it."""
    if not arguments:
        raise click.UsageError("give a number of workers: sharedcluster scale 4, scale +2, scale NAME 4")

    def act(target: Target) -> str:
        reply = client.call(_control(target), "scale", workers=arguments[-1])
        _remember_workers(target, int(reply["workers"]))
        return f"{target.name}: {reply['workers']} workers"

    return _each(choose(arguments[:-1], name, control), act)


def _remember_workers(target: Target, workers: int) -> None:
    with records.locked():
        record = records.load(target.name) if target.record else None
        if record is not None:
            records.save_spec(records.with_spec(record, given={**record.spec.given, "workers": str(workers)}))


@click.command(name="signal")
@click.argument("number", metavar="SIGNAL")
@names_argument
@with_address
@click.option("--workers", is_flag=True, help="to each worker, not to the primary")
def signal_command(number: str, names: tuple[str, ...], name: str, control: str, workers: bool) -> int:
    """Send a signal (HUP, USR1, 10, ...) to the primary; what each means is in `run --help`."""
    wanted = _signal(number)

    def act(target: Target) -> str:
        facts = client.call(_control(target), "status")["status"]
        pids = [worker["pid"] for worker in facts["workers"]] if workers else [facts["pid"]]
        for pid in pids:
            os.kill(pid, wanted)
        return f"{target.name}: {wanted.name} sent to {' '.join(map(str, pids))}"

    return _each(choose(names, name, control), act)


def _signal(text: str) -> signal.Signals:
    word = text.upper().removeprefix("SIG")
    try:
        return signal.Signals(int(word)) if word.isdigit() else signal.Signals[f"SIG{word}"]
    except (KeyError, ValueError):
        raise click.UsageError(f"{text!r} is not a signal, as in HUP, USR1 or 10") from None


@click.command()
@names_argument
@with_address
def reset(names: tuple[str, ...], name: str, control: str) -> int:
    """Set the counters to zero: restarts, reloads and what is counted beside them."""

    def act(target: Target) -> str:
        client.call(_control(target), "reset")
        if target.record and target.record.has_attendant() and target.record.state.attendant:
            os.kill(target.record.state.attendant.pid, signal.SIGALRM)
        return f"{target.name}: counters are zero"

    return _each(choose(names, name, control), act)
