"""What a kept application is: its settings as they were given, its environment, and how it is kept.

Settings stay raw (texts and numbers by name) until a process with the application's own folder and environment
resolves them, so a restart reads `.env` anew and means the same as the first start.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from sharedcluster import config as configuration
from sharedcluster.config import (
    Resolved,
    Section,
    Setting,
    parse_count,
    parse_flag,
    parse_list,
    parse_seconds,
    parse_size,
    setting,
)
from sharedcluster.errors import ConfigError


def parse_cron(text: str) -> str:
    """A cron expression of five or six fields, checked by the library that will follow it."""
    if text:
        next_time(text, datetime.now())  # cron is about the clock on the wall
    return text


def next_time(expression: str, after: datetime) -> datetime:
    """When a cron expression is due next, in local time.

    Raises:
        ValueError: It is no cron expression.
        ConfigError: The library that reads it is not installed.
    """
    try:
        from cronsim import CronSim, CronSimError
    except ImportError:
        raise ConfigError("cron_restart needs a package.", advice='pip install "sharedcluster[cron]"') from None
    try:
        return next(CronSim(expression, after))
    except (CronSimError, StopIteration) as error:
        raise ValueError(f"{expression!r} is not a cron expression ({error}), as in '0 4 * * *'") from error


@dataclass(frozen=True, slots=True)
class Upkeep:
    """How an application is kept; none of it concerns the cluster itself. Durations in seconds, sizes in bytes."""

    autorestart: bool = setting(
        True, "start the primary again when it crashes or is killed", "--autorestart/--no-autorestart",
        parse=parse_flag,
    )  # fmt: skip
    cron_restart: str = setting(
        "", "a rolling reload at these times, as cron writes them", "--cron-restart", parse=parse_cron, metavar="CRON",
        shown="off",
    )  # fmt: skip
    watch: tuple[str, ...] = setting(
        (), "a rolling reload when a file below one of these folders changes", "--watch", parse=parse_list,
        metavar="PATHS", shown="off",
    )  # fmt: skip
    ignore_watch: tuple[str, ...] = setting(
        ("__pycache__", ".git", ".venv", "node_modules", "*.log"), "names that are not watched", "--ignore-watch",
        parse=parse_list, metavar="NAMES",
    )  # fmt: skip
    log_max_size: int = setting(
        10 << 20, "a log file that is larger is rotated; 0 never", "--log-max-size", parse=parse_size, metavar="SIZE",
        shown="10M",
    )  # fmt: skip
    log_max_age: float = setting(
        0.0, "a log file is rotated when a period of this length begins, as in 1d", "--log-max-age",
        parse=parse_seconds, metavar="S",
    )  # fmt: skip
    log_keep: int = setting(
        30, "how many rotated files of each log are kept", "--log-keep", parse=parse_count, metavar="N"
    )
    log_compress: bool = setting(
        True, "compress rotated files with gzip", "--log-compress/--no-log-compress", parse=parse_flag
    )


def upkeep_settings() -> dict[str, Setting]:
    """The table of `Upkeep`."""
    return {f.name: f.metadata["setting"] for f in fields(Upkeep)}


def read_upkeep(values: Mapping[str, Any], where: str) -> Upkeep:
    """Read the part of a section, or of a command line, that is about upkeep.

    Raises:
        ConfigError: A value cannot be read.
    """
    read: dict[str, Any] = {}
    for name, about in upkeep_settings().items():
        if name in values:
            read[name] = _read(name, about.parse, values[name], where)
    return Upkeep(**read)


def _read(name: str, parse: Callable[[str], Any], value: Any, where: str) -> Any:
    if isinstance(value, bool):
        value = {True: ".", False: ""}[value] if name == "watch" else str(value)
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    try:
        return parse(str(value))
    except ValueError as error:
        raise ConfigError(f"{where}: {name}: {error}.") from error


NOT_INHERITED: Final = frozenset(
    (
        "_", "OLDPWD", "PWD", "SHLVL", "TERM", "LINES", "COLUMNS", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES",
        "NOTIFY_SOCKET", "INVOCATION_ID", "JOURNAL_STREAM", "SHAREDCLUSTER_SLOT", "SHAREDCLUSTER_WORKER_ID",
    )
)  # fmt: skip
"""Variables of the shell that starts an application and not of the application."""


@dataclass(frozen=True, slots=True)
class AppSpec:
    """One application to keep.

    Args:
        name: Its name, and its cluster's.
        app: What `run` would be given.
        settings: Values of a file by the name of the setting.
        where: The file and the section, for messages.
        given: Values of the command line.
        cwd: The folder it runs in, absolute.
        env: The variables of its sections.
        environ: The environment it was started from.
        upkeep: How it is kept.
        file: The ecosystem file, absolute, or "".
        env_name: The section that was chosen with --env.
    """

    name: str
    settings: Mapping[str, Any]
    where: str
    given: Mapping[str, Any]
    cwd: str
    env: Mapping[str, str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    upkeep: Upkeep = field(default_factory=Upkeep)
    file: str = ""
    env_name: str = ""

    @property
    def variables(self) -> dict[str, str]:
        """The environment of its processes."""
        kept = {name: value for name, value in self.environ.items() if name not in NOT_INHERITED}
        return {**kept, **self.env, "PWD": self.cwd}

    @property
    def target(self) -> str:
        """The application, as far as it is known without resolving."""
        return str(self.given.get("app") or self.settings.get("app") or "")

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AppSpec:
        """The reverse; what is not a spec raises TypeError, KeyError or ValueError."""
        upkeep: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["upkeep"].items()}
        return cls(**{**values, "upkeep": Upkeep(**upkeep)})

    def resolve(self, logs: Path) -> Resolved:
        """Put the configuration of its cluster together.

        To be called in a process that has its folder and its environment.

        Args:
            logs: The folder for log files that are not named.
        """
        dotenv = read_dotenv()
        section = Section(self.settings, self.where)
        return configuration.resolve(self._with_files(logs), self._own_environment(), dotenv=dotenv, section=section)

    def _own_environment(self) -> dict[str, str]:
        """The environment without what is about another application.

        `$PORT` and `$WEB_CONCURRENCY` of the shell that starts several applications cannot be meant for each of them:
        what the file says wins over them, unless they stand in the application's own `env`.
        """
        said = {*self.settings, *(("port",) if {"bind", "host"} & set(self.settings) else ())}
        table = configuration.settings()
        settled = {alias for name in said if name in table for alias in table[name][1].env}
        return {name: value for name, value in os.environ.items() if name not in settled or name in self.env}

    def _with_files(self, logs: Path) -> dict[str, Any]:
        """The command line's values, with the name and the log files of a kept application."""
        said = {**self.settings, **self.given}
        files = {"out_file": str(logs / f"{self.name}.out.log"), "error_file": str(logs / f"{self.name}.err.log")}
        if one := said.get("out_file", "") or said.get("error_file", ""):
            files = {"out_file": said.get("out_file") or one, "error_file": said.get("error_file") or one}
        return {**self.given, **files, "name": self.name}


def log_paths(spec: AppSpec, logs: Path) -> tuple[str, str]:
    """The two log files, absolute; equal if they are merged."""
    given = spec._with_files(logs)
    return tuple(str(Path(spec.cwd, given[name])) for name in ("out_file", "error_file"))  # type: ignore[return-value]


def read_dotenv() -> dict[str, str]:
    """What `.env` in the current folder says; it is also set for the application, as Flask's own command does.

    Raises:
        ConfigError: There is one, and the package that reads it is not installed.
    """
    if not Path(".env").is_file():
        return {}
    try:
        from dotenv import dotenv_values  # an extra
    except ImportError:
        raise ConfigError(
            "There is a .env file, which cannot be read without a package.",
            advice='pip install "sharedcluster[dotenv]", or remove the file',
        ) from None
    values = {key: value for key, value in dotenv_values(".env").items() if value is not None}
    read = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update({key: value for key, value in read.items() if not key.startswith(configuration.ENV_PREFIX)})
    return read
