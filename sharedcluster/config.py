"""Every setting, declared once.

A field of `Config` is a setting: its default, its flags, its environment variables, its key in the file, its help and
how its text is read stand in one place, and the command line, the environment, `.env`, `sharedcluster.toml`,
`sharedcluster config` and the reference in the docs all follow from it.

Precedence: command line, environment, `.env`, file, default. An unknown key is an error with a suggestion.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from sharedcluster.cgroup import available_cpus
from sharedcluster.errors import ConfigError
from sharedcluster.log_files import LogFiles

ENV_PREFIX: Final = "SHAREDCLUSTER_"
DEFAULT_FILE: Final = "sharedcluster.toml"
MAX_WORKERS: Final = 500
"""So that two generations, which a reload needs, fit on the board."""
POLICIES: Final = ("round-robin", "least-connections", "sticky", "shared")


@dataclass(frozen=True, slots=True)
class BindAddress:
    """Where to listen: a host and a port, a unix socket's path, or an open descriptor."""

    host: str = ""
    port: int = 0
    path: str = ""
    fd: int | None = None

    def __str__(self) -> str:
        if self.fd is not None:
            return f"fd://{self.fd}"
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


# -- reading the text of a setting ------------------------------------------------------------------------------


def parse_bind(text: str) -> BindAddress:
    """`HOST:PORT`, `:PORT`, `PORT`, `[IPV6]:PORT`, `unix:PATH` or `fd://N`."""
    if text.startswith("unix:"):
        path = text[len("unix:") :].removeprefix("//")
        if not path:
            raise ValueError("unix: needs a path, as in unix:/run/app.sock")
        return BindAddress(path=path)
    if text.startswith("fd://"):
        return BindAddress(fd=parse_count(text[len("fd://") :]))
    host, colon, port = text.rpartition(":")
    if not colon and not text.isdigit():
        raise ValueError(f"{text!r} is not HOST:PORT, unix:PATH or fd://N")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"an IPv6 address is written in brackets: [{host}]:{port}")
    number = parse_count(port if colon else text)
    if number > 65535:
        raise ValueError(f"{number} is not a port (0 to 65535)")
    return BindAddress(host=host or ("0.0.0.0" if colon else "127.0.0.1"), port=number)


def parse_count(text: str) -> int:
    """A whole number, not negative."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def parse_workers(text: str) -> int:
    """A number of workers, or `max` for one per CPU."""
    if text in ("max", "auto"):
        return available_cpus()[0]
    number = parse_count(text)
    if not 1 <= number <= MAX_WORKERS:
        raise ValueError(f"the number of workers is 1 to {MAX_WORKERS}")
    return number


_UNITS: Final = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes: `65536`, `64K`, `64KiB`, `1.5G`."""
    number = text.strip().rstrip("BbiIkKmMgG")
    unit = text.strip()[len(number) :].lower().removesuffix("b").removesuffix("i")
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"{text!r} is not a size, as in 65536, 64K or 1.5G") from error


def parse_seconds(text: str) -> float:
    """Seconds: `30`, `0.5`, `2m`, `1h`."""
    factor = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}.get(text[-1:].lower())
    try:
        seconds = float(text[:-1]) * factor if factor else float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number of seconds, as in 30, 0.5 or 2m") from error
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{text!r} is not a duration")
    return seconds


def parse_flag(text: str) -> bool:
    """A switch in the environment or the file."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def parse_list(text: str) -> tuple[str, ...]:
    """Comma-separated words."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parse_codes(text: str) -> tuple[int, ...]:
    """Exit codes, as in `0,64`."""
    return tuple(parse_count(word) for word in parse_list(text))


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser for a closed set of words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}{_suggest(text, choices)}")
        return text

    return parse


def parse_policy(text: str) -> str:
    """The name of a policy, or `MODULE:CLASS`."""
    module, colon, name = text.partition(":")
    if colon and name.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return text
    return one_of(*POLICIES)(text)


def parse_text(text: str) -> str:
    """Any text."""
    return text


# -- the table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """What a field of `Config` is to the outside."""

    help: str
    flags: tuple[str, ...]
    parse: Callable[[str], Any]
    metavar: str
    env: tuple[str, ...] = ()
    many: bool = False
    shown: str = ""

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value on the command line."""
        return self.parse is parse_flag


def setting(
    default: Any,
    help: str,
    *flags: str,
    parse: Callable[[str], Any] = parse_text,
    metavar: str = "TEXT",
    env: tuple[str, ...] = (),
    many: bool = False,
    shown: str = "",
) -> Any:
    """Declare a field of `Config`. `shown` is the default as the help shows it, where it is found at start."""
    return field(default=default, metadata={"setting": Setting(help, flags, parse, metavar, env, many, shown)})


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of one cluster. Durations are seconds, sizes bytes; 0 means off where off is possible."""

    app: str = setting("", "the application: a module, package or file, with :name if need be", env=("FLASK_APP",))
    workers: int = setting(
        0, "number of workers, or max for one per CPU", "-w", "--workers", parse=parse_workers, metavar="N|max",
        env=("WEB_CONCURRENCY",), shown="CPUs within the cgroup quota",
    )  # fmt: skip
    bind: tuple[BindAddress, ...] = setting(
        (), "HOST:PORT, unix:PATH or fd://N; repeatable", "-b", "--bind", parse=parse_bind, metavar="ADDR", many=True,
        shown="127.0.0.1:8000",
    )  # fmt: skip
    host: str = setting("", "the host to listen on, instead of --bind", "--host", metavar="HOST", shown="127.0.0.1")
    port: int = setting(
        -1, "the port to listen on, instead of --bind; 0 takes a free one", "--port", parse=parse_count, metavar="N",
        env=("PORT",), shown="8000",
    )  # fmt: skip
    backlog: int = setting(
        2048, "connections the kernel holds per listener, and the bound of the pending queue", "--backlog",
        parse=parse_count, metavar="N",
    )  # fmt: skip
    redis: str = setting("auto", "URL, auto, memory:// or none", "--redis", metavar="URL")
    policy: str = setting(
        "round-robin", f"who gets the next connection: {', '.join(POLICIES)}, or MODULE:CLASS of your own", "--policy",
        parse=parse_policy, metavar="NAME",
    )  # fmt: skip
    graceful_timeout: float = setting(
        30.0, "drain deadline; then TERM, then KILL", "--graceful-timeout", parse=parse_seconds, metavar="S"
    )
    heartbeat_timeout: float = setting(
        30.0, "a worker whose loop stands still this long is dumped and replaced", "--heartbeat-timeout",
        parse=parse_seconds, metavar="S",
    )  # fmt: skip
    boot_timeout: float = setting(
        60.0, "a worker that is not ready this long after its fork is replaced", "--boot-timeout",
        parse=parse_seconds, metavar="S",
    )  # fmt: skip
    request_timeout: float = setting(
        0.0, "a request older than this is answered 503 and its greenlet ended", "--request-timeout",
        parse=parse_seconds, metavar="S",
    )  # fmt: skip
    keep_alive: float = setting(75.0, "idle time of a connection", "--keep-alive", parse=parse_seconds, metavar="S")
    max_requests: int = setting(
        0, "recycle a worker after so many requests", "--max-requests", parse=parse_count, metavar="N"
    )
    max_requests_jitter: int = setting(
        0, "up to so many more, drawn for each worker", "--max-requests-jitter", parse=parse_count, metavar="N"
    )
    max_memory: int = setting(
        0, "recycle a worker whose resident memory reaches this", "--max-memory", parse=parse_size, metavar="SIZE"
    )
    max_lifetime: float = setting(
        0.0, "recycle a worker after so long", "--max-lifetime", parse=parse_seconds, metavar="S"
    )
    preload: bool = setting(False, "load the app once and fork the workers from it", "--preload", parse=parse_flag)
    reload: bool = setting(False, "development: reload when a file changes", "--reload", parse=parse_flag)
    head_timeout: float = setting(
        10.0, "from the first byte of a request's head to its last", "--head-timeout", parse=parse_seconds, metavar="S"
    )
    body_timeout: float = setting(
        30.0, "between two pieces of a request's body", "--body-timeout", parse=parse_seconds, metavar="S"
    )
    write_timeout: float = setting(
        30.0,
        "between two pieces that a client takes of an answer",
        "--write-timeout",
        parse=parse_seconds,
        metavar="S",
    )
    limit_head: int = setting(
        65536, "bytes of a request's head; more is answered 431 or 414", "--limit-head", parse=parse_size,
        metavar="BYTES",
    )  # fmt: skip
    limit_fields: int = setting(
        100, "header fields of a request; more are answered 431", "--limit-fields", parse=parse_count, metavar="N"
    )
    limit_body: int = setting(
        0, "bytes of a request's body; more is answered 413", "--limit-body", parse=parse_size, metavar="BYTES"
    )
    limit_concurrency: int = setting(
        0, "requests served at once by a worker; more are answered 503", "--limit-concurrency", parse=parse_count,
        metavar="N",
    )  # fmt: skip
    forwarded_allow_ips: tuple[str, ...] = setting(
        ("127.0.0.1",), "whose X-Forwarded-* and PROXY heads count", "--forwarded-allow-ips", parse=parse_list,
        metavar="IPS", env=("FORWARDED_ALLOW_IPS",),
    )  # fmt: skip
    forwarded_headers: tuple[str, ...] = setting(
        ("for", "proto"), "which of for, proto, host, port, prefix are taken from them", "--forwarded-headers",
        parse=parse_list, metavar="WORDS",
    )  # fmt: skip
    proxy_protocol: bool = setting(
        False, "a PROXY protocol head is required from them", "--proxy-protocol", parse=parse_flag
    )
    certfile: str = setting("", "TLS: the certificate chain, as PEM", "--certfile", metavar="FILE")
    keyfile: str = setting("", "TLS: the key, if it is not in the certificate's file", "--keyfile", metavar="FILE")
    name: str = setting("", "the name of this cluster", "--name", metavar="NAME", shown="the app's name")
    control: str = setting(
        "", "path of the control socket", "--control", metavar="PATH", shown="NAME.sock in the runtime folder"
    )
    pid_file: str = setting("", "write the primary's process id there", "--pid-file", metavar="PATH")
    log_level: str = setting(
        "info", "debug, info, warning or error", "--log-level", parse=one_of("debug", "info", "warning", "error"),
        metavar="LEVEL",
    )  # fmt: skip
    log_format: str = setting("text", "text or json", "--log-format", parse=one_of("text", "json"), metavar="FORMAT")
    access_log: bool = setting(False, "log each request", "--access-log", parse=parse_flag)
    expose_worker: bool = setting(False, "add X-Worker: SLOT to each response", "--expose-worker", parse=parse_flag)
    out_file: str = setting(
        "", "standard output of all processes goes there; USR1 reopens", "--out-file", metavar="PATH"
    )
    error_file: str = setting("", "standard error and the log go there; USR1 reopens", "--error-file", metavar="PATH")
    stop_exit_codes: tuple[int, ...] = setting(
        (), "a worker that exits with one of these is not replaced", "--stop-exit-codes", parse=parse_codes,
        metavar="CODES", shown="none",
    )  # fmt: skip
    wait_ready: bool = setting(
        False, "a worker serves when the application says so: SharedCluster.ready()", "--wait-ready", parse=parse_flag
    )

    hooks: str = setting(
        "", "a module whose functions are called on events: on_fork, on_exit, post_worker_init, ...", "--hooks",
        metavar="MODULE", shown="none",
    )  # fmt: skip

    def log_files(self) -> LogFiles | None:
        """Where the two streams go, if to files; one that is named alone takes both."""
        if not (self.out_file or self.error_file):
            return None
        return LogFiles(self.out_file or self.error_file, self.error_file or self.out_file)

    def addresses(self) -> tuple[BindAddress, ...]:
        """Where to listen, --host and --port taken in."""
        if self.bind and (self.host or self.port >= 0):
            raise ConfigError("--bind and --host/--port name the address twice.", advice="Use one of them.")
        return self.bind or (BindAddress(self.host or "127.0.0.1", self.port if self.port >= 0 else 8000),)


def settings() -> dict[str, tuple[Field[Any], Setting]]:
    """The table, by the name of the field."""
    return {f.name: (f, f.metadata["setting"]) for f in fields(Config)}


@dataclass(frozen=True, slots=True)
class Section:
    """The part of a file that is about one cluster: values by the name of the setting, and where they stand."""

    values: Mapping[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration and, by the name of each setting, where its value came from."""

    config: Config
    sources: Mapping[str, str]


def resolve(
    command_line: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    dotenv: Mapping[str, str] | None = None,
    file: str | None = None,
    section: Section | None = None,
) -> Resolved:
    """Put a configuration together.

    Args:
        command_line: Texts (or lists of texts, or True) by the name of the setting; only what was given.
        environ: The process's environment.
        dotenv: What `.env` says.
        file: The file to read; None reads `sharedcluster.toml` if it is there.
        section: What a file says of this cluster, if it was read already; then `file` is not looked at.

    Raises:
        ConfigError: A value cannot be read, or a key is unknown.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    from_file, file_name = _read_file(file) if section is None else (section.values, section.where)
    for name, (declared, about) in settings().items():
        for value, source in _candidates(name, about, command_line, environ, dotenv or {}, from_file, file_name):
            values[name] = _read(about, value, source)
            sources[name] = source
            break
        else:
            sources[name] = "default"
            if declared.default is MISSING:
                raise ConfigError(f"{name} is needed.")
    _settle_address(values, sources)
    if not values.get("workers"):
        values["workers"], sources["workers"] = available_cpus()
    return Resolved(Config(**values), sources)


def _candidates(
    name: str,
    about: Setting,
    command_line: Mapping[str, Any],
    environ: Mapping[str, str],
    dotenv: Mapping[str, str],
    from_file: Mapping[str, Any],
    file_name: str,
) -> list[tuple[Any, str]]:
    found = [(command_line[name], "command line")] if name in command_line else []
    for where, label in ((environ, ""), (dotenv, ".env: ")):
        for variable in (ENV_PREFIX + name.upper(), *about.env):
            if where.get(variable):
                found.append((where[variable], label + variable))  # noqa: PERF401 - two loops read better
    if name in from_file:
        found.append((from_file[name], file_name))
    return found


def _settle_address(values: dict[str, Any], sources: dict[str, str]) -> None:
    """A --bind given nearer to the user than a port (say $PORT) wins over it, and the other way round."""
    order = ("command line", "SHAREDCLUSTER_", "PORT", ".env", "", "default")

    def rank(name: str) -> int:
        return next(i for i, start in enumerate(order) if sources[name].startswith(start))

    if "bind" in values and ("port" in values or "host" in values):
        nearest = min(rank(n) for n in ("host", "port") if n in values)
        losers = ("host", "port") if rank("bind") < nearest else ("bind",) if rank("bind") > nearest else ()
        for name in losers:
            values.pop(name, None)
            sources[name] = "default"


def _read(about: Setting, value: Any, source: str) -> Any:
    try:
        if about.many:
            items = value if isinstance(value, (list, tuple)) else parse_list(str(value))
            return tuple(about.parse(str(item)) for item in items)
        if isinstance(value, (list, tuple)) and about.parse in (parse_list, parse_codes):
            return about.parse(",".join(str(item) for item in value))
        if isinstance(value, bool) and about.is_switch:
            return value
        return about.parse(str(value))
    except ValueError as error:
        name = about.flags[-1] if source == "command line" and about.flags else source
        raise ConfigError(f"{name}: {error}.") from error


def _read_file(file: str | None) -> tuple[dict[str, Any], str]:
    path = Path(file or DEFAULT_FILE)
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        if file is None:
            return {}, ""
        raise ConfigError(f"{path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    known = {name.replace("_", "-"): name for name in settings()} | {name: name for name in settings()}
    for key in content:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{_suggest(key, known)}.")
    return {known[key]: value for key, value in content.items()}, str(path)


def _suggest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_environment(environ: Mapping[str, str]) -> list[str]:
    """Variables that start as ours do and mean nothing: each a line of warning."""
    known = {ENV_PREFIX + name.upper() for name in settings()} | OTHER_VARIABLES
    return [
        f"{variable} is set, but there is no such setting{_suggest(variable, sorted(known))}"
        for variable in sorted(environ)
        if variable.startswith(ENV_PREFIX) and variable not in known
    ]


OTHER_VARIABLES: Final = frozenset(
    ENV_PREFIX + name
    for name in (
        "WORKER_ID",
        "SLOT",
        "REDIS_URL",
        "RUNTIME_DIR",
        "STATE_DIR",
        "NAMESPACE",
        "CONFIG",
        "UPGRADE",
        "COMPLETE",
    )
)
"""Variables of ours that are no settings: what a worker is told, and where the runtime folder is."""
