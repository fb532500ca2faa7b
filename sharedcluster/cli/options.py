"""Settings as options of a command, from the declared tables, and back to a configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from sharedcluster import config as configuration
from sharedcluster.config import Resolved, Section, Setting
from sharedcluster.operating import ecosystem
from sharedcluster.operating.spec import Upkeep, read_dotenv, upkeep_settings

Command = Callable[..., Any]


def with_settings(command: Command) -> Command:
    """Give a command every setting of a cluster as an option."""
    for name, (declared, about) in reversed(configuration.settings().items()):
        if about.flags:
            command = _option(name, declared.default, about)(command)
    return click.option("-c", "--config", "config_file", metavar="FILE", help="read this file [sharedcluster.toml]")(
        command
    )


def with_upkeep(command: Command) -> Command:
    """Give a command the settings of how an application is kept."""
    for name, about in reversed(upkeep_settings().items()):
        command = _option(name, getattr(Upkeep(), name), about)(command)
    return command


def _option(name: str, default: Any, about: Setting) -> Callable[[Command], Command]:
    shown = about.shown or (", ".join(map(str, default)) if isinstance(default, tuple) else default)
    text = about.help + ("" if shown in ("", False, True) else f" [{'off' if shown in (0, 0.0) else shown}]")
    if about.is_switch:
        if "/" in about.flags[-1]:
            return click.option(about.flags[-1], name, default=None, help=text)
        return click.option(*about.flags, name, is_flag=True, default=None, help=text)
    return click.option(*about.flags, name, default=None, multiple=about.many, metavar=about.metavar, help=text)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were really given."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def resolve(options: dict[str, Any]) -> Resolved:
    """The configuration from a command's options and everything behind them."""
    chosen = options.pop("config_file", None) or os.environ.get("SHAREDCLUSTER_CONFIG")
    path = Path(chosen) if chosen else ecosystem.default_file(Path())
    section = _section(path, options) if path else Section({}, "")
    return configuration.resolve(given(options), os.environ, dotenv=read_dotenv(), section=section)


def _section(path: Path, options: dict[str, Any]) -> Section:
    """The part of a file that a command in the foreground means: the only app in it, or the one that APP names.

    Its variables are set, as they would be if it was started in the background.
    """
    file = ecosystem.read(path, default_name)
    asked = options.get("app")
    if file.is_single or len(file.sections) == 1:
        name = next(iter(file.sections))
    elif asked in file.sections:
        name = str(asked)
    elif asked:
        return Section({}, "")  # an application that is not in the file
    else:
        raise click.UsageError(f"{path} has several apps, name one of them: {', '.join(file.sections)}")
    spec = file.specs(os.environ, only=[name])[0]
    if asked == name and spec.target:
        options["app"] = None
    elif asked and spec.target and asked != spec.target:
        return Section({key: value for key, value in spec.settings.items() if file.is_single}, spec.where)
    os.environ.update(spec.env)
    if spec.cwd != os.getcwd():
        os.chdir(spec.cwd)
    return Section({**spec.settings, **({} if file.is_single else {"name": name})}, spec.where)


def default_name(app: str) -> str:
    """A name for the cluster of an application that has none."""
    from sharedcluster.starting import default_name as from_target

    return from_target(app)
