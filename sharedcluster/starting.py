"""From a configuration to a running cluster: bind, have a Redis, check the application, say so, become the primary.

Each step can fail by a mistake of the user's, and fails here, before the first worker is forked, as one block of text
with the exit code of its kind.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import click

from sharedcluster import descriptors, redis_server
from sharedcluster.checking import check_application
from sharedcluster.cluster import events
from sharedcluster.cluster.commands import Commands
from sharedcluster.cluster.forking import MoldContext, WorkerContext
from sharedcluster.cluster.listener import Listener, bind
from sharedcluster.cluster.primary import Primary
from sharedcluster.cluster.worker_handle import ExitReason, WorkerHandle
from sharedcluster.config import BindAddress, Config, Resolved, check_environment
from sharedcluster.control import client
from sharedcluster.control.protocol import check_name, runtime_folder
from sharedcluster.control.server import ControlServer
from sharedcluster.errors import BindError, ConfigError, RedisNeededError
from sharedcluster.log import logger, set_up
from sharedcluster.observing import observing
from sharedcluster.upgrading import Inheritance, Predecessor, Successor
from sharedcluster.version import VERSION
from sharedcluster.watching import watching

PROBE_TIMEOUT: Final = 3.0


def start(resolved: Resolved, observe: Callable[[Primary], None] | None = None) -> int:
    """Serve until told to stop; returns the exit code. `observe` gets the primary before it runs."""
    config = resolved.config
    set_up("primary", level=config.log_level, style=config.log_format, files=config.log_files())
    for warning in check_environment(os.environ):
        logger.warning("%s", warning)
    most = descriptors.raise_limit()
    logger.debug("%d descriptors may be open in each process", most)
    inherited = Inheritance.from_environment()
    with ExitStack() as undo:
        listeners = _adopt(inherited, config) if inherited else _bind_all(config, undo)
        redis = _Redis(config, undo, inherited)
        primary = _build(config, listeners, redis, inherited)
        undo.callback(redis.leave, primary)
        undo.callback(primary.stop_answering)
        found = check_application(config, redis.url)
        if found["shares_state"] and not redis.url:
            raise RedisNeededError(
                "The application shares sessions or caches, and there is no Redis (--redis none).",
                advice="Leave --redis out, or name one: --redis redis://127.0.0.1:6379/0",
            )
        for warning in found["warnings"]:
            logger.warning("%s", warning)
        _announce(resolved, primary, found["found"], redis)
        _follow(primary)
        Predecessor(primary, redis.url, redis.lifeline_fd)
        if observe:
            observe(primary)
        with watching(config, primary), observing(config, primary):
            return primary.run()


def check_only(resolved: Resolved) -> Iterator[str]:
    """What `sharedcluster check` says; raises what `run` would fail with."""
    config = resolved.config
    for address in config.addresses():
        bind(address, backlog=1).close()
        yield f"listen   {address}: free"
    choice = redis_server.choose(config.redis, os.environ)
    if choice.kind == "url" and choice.url:
        facts = redis_server.probe(choice.url, PROBE_TIMEOUT)
        yield f"redis    {redis_server.redact(choice.url)}: {facts.product} {facts.version}"
    else:
        yield f"redis    {choice.program or choice.kind}"
    found = check_application(config, choice.url or "")
    yield f"app      {found['found']}"
    yield from (f"warning  {warning}" for warning in found["warnings"])


# -- Redis -------------------------------------------------------------------------------------------------------


class _Redis:
    """The Redis of this run: somebody else's by its URL, or a private one that leaves with the cluster."""

    def __init__(self, config: Config, undo: ExitStack, inherited: Inheritance | None = None) -> None:
        self.keeper: redis_server.PrivateRedis | None = None
        self.lifeline_fd = -1
        if inherited and inherited.lifeline_fd >= 0:
            # The private server of the primary we replace goes on; by the lifeline its keeper knows that we live.
            self.url = self.shown = inherited.redis_url
            self.lifeline_fd = inherited.lifeline_fd
            self.described = "private, kept from before the upgrade"
            return
        choice = redis_server.choose(config.redis, os.environ)
        self.url = choice.url or ""
        self.shown = redis_server.redact(self.url)
        self.described = "none"
        if choice.warning:
            logger.warning("%s", choice.warning)
        if choice.kind == "url":
            facts = redis_server.probe(self.url, PROBE_TIMEOUT)
            self.described = f"{self.shown}  {facts.product} {facts.version}, {facts.latency * 1000:.1f} ms"
            for warning in facts.warnings:
                logger.warning("%s", warning)
        elif choice.kind != "none":
            self.keeper = redis_server.PrivateRedis(choice)
            self.url = self.shown = self.keeper.start()
            self.described = f"private, for this run only  {choice.program}"
            self.lifeline_fd = self.keeper.lifeline_fd
            undo.callback(self._stop)

    def leave(self, primary: Primary) -> None:
        """The primary ends: if another one took its place, the private server stays with that one."""
        if primary.was_handed_over:
            self.keeper = None

    def _stop(self) -> None:
        if self.keeper is not None:
            self.keeper.stop()


# -- listeners ---------------------------------------------------------------------------------------------------


def _bind_all(config: Config, undo: ExitStack) -> list[Listener]:
    listeners: list[Listener] = []
    for address in _inherited() or config.addresses():
        try:
            bound = bind(address, backlog=config.backlog)
        except BindError as error:
            raise _with_owner(error, address) from error
        listener = Listener(len(listeners), _actual(address, bound), bound, limit=config.backlog)
        undo.callback(listener.close)
        listeners.append(listener)
    return listeners


def _adopt(inherited: Inheritance, config: Config) -> list[Listener]:
    """The listeners of the primary that this one replaces; nothing is bound anew."""
    return [
        Listener(index, address, socket.socket(fileno=fd), limit=config.backlog, is_lent=True)
        for index, (fd, address) in enumerate(inherited.listeners)
    ]


def _inherited() -> tuple[BindAddress, ...]:
    """The sockets systemd passes: LISTEN_FDS of them from descriptor 3 on, if LISTEN_PID is us (sd_listen_fds(3))."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return ()
    return tuple(BindAddress(fd=3 + number) for number in range(int(count)))


def _actual(address: BindAddress, bound: socket.socket) -> BindAddress:
    """The address that was really bound: the port that 0 became, what an inherited descriptor is bound to."""
    name = bound.getsockname()
    if isinstance(name, tuple):
        return BindAddress(host=name[0], port=name[1], fd=address.fd)
    return replace(address, path=address.path or os.fsdecode(name)) if address.fd is None else address


def _with_owner(error: BindError, address: BindAddress) -> BindError:
    """Say who holds the port, where that can be found out."""
    owner = _owner_of(address.port) if address.port else None
    if owner is None:
        return error
    pid, program = owner
    name = _cluster_of(pid)
    who = f'"{program}" (pid {pid}' + (f', sharedcluster "{name}")' if name else ")")
    advice = (*((f"Stop it: sharedcluster stop --name {name}",) if name else ()), *error.advice)
    return BindError(error.what.rstrip(".") + f" by {who}.", advice=advice)


def _owner_of(port: int) -> tuple[int, str] | None:
    import psutil  # only when something went wrong

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,) and connection.pid:
                return connection.pid, psutil.Process(connection.pid).name()
    except (psutil.Error, OSError):
        return None
    return None


def _cluster_of(pid: int) -> str:
    for path in client.sockets():
        try:
            facts = client.call(path, "status", timeout=1.0)["status"]
        except Exception:  # noqa: S112 - a nicety in an error message
            continue
        if pid == facts["pid"] or pid in [worker["pid"] for worker in facts["workers"]]:
            return str(facts["name"])
    return ""


# -- what the primary forks --------------------------------------------------------------------------------------


def enter_worker(context: WorkerContext) -> int:
    """The worker's entry, called in the forked child: importing the module patches the process."""
    from sharedcluster.cluster.worker import main

    return main(context)


def enter_mold(context: MoldContext) -> int:
    """A mold's entry, called in the forked child: importing the module patches the process."""
    from sharedcluster.cluster import mold

    return mold.main(context)


# -- the primary -------------------------------------------------------------------------------------------------


def _build(config: Config, listeners: list[Listener], redis: _Redis, inherited: Inheritance | None) -> Primary:
    folder = runtime_folder(create=True)
    name = inherited.name if inherited else _free_name(config, folder)
    path = Path(config.control) if config.control else folder / f"{name}.sock"
    primary = Primary(
        config,
        listeners,
        enter_worker,
        enter_mold,
        name=name,
        redis_url=redis.url,
        redis_shown=redis.shown,
        keeper=redis.keeper,
    )

    def take_place() -> None:
        """Be the one that operators find."""
        primary.answer(lambda selector: ControlServer(path, Commands(primary), selector))
        _write_pid_file(config.pid_file)

    if inherited:
        primary.events.on(events.TAKEN_OVER, take_place)
        Successor(primary, inherited.channel_fd)
    else:
        take_place()
    return primary


def _free_name(config: Config, folder: Path) -> str:
    """The name asked for; or one made from the application's, with a number if that runs already."""
    if config.name:
        return check_name(config.name)
    stem = default_name(config.app)
    for number in range(1, 1000):
        name = stem if number == 1 else f"{stem}-{number}"
        if not client.is_running(folder / f"{name}.sock"):
            return name
    raise ConfigError(f"A thousand clusters named {stem} are running.", advice="Choose a name: --name NAME")


def default_name(target: str) -> str:
    """A name for the cluster of an application: `shop` for `src/shop.py`, `shop.web` for `shop.web:create_app()`."""
    stem = os.path.basename(target.split(":", 1)[0].rstrip("/")).removesuffix(".py") or Path.cwd().name
    clean = "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "-" for c in stem).strip(".-")
    return clean[:60] or "app"


def _write_pid_file(path: str) -> None:
    """Write it, and remove it at the end if it still names us and not the primary that took our place."""
    if not path:
        return
    ours = f"{os.getpid()}\n"
    try:
        Path(path).write_text(ours)
    except OSError as error:
        raise ConfigError(f"Cannot write the pid file {path}: {error.strerror}.") from error

    def remove() -> None:
        with suppress(OSError):
            if Path(path).read_text() == ours:
                Path(path).unlink()

    atexit.register(remove)


# -- what an operator reads --------------------------------------------------------------------------------------


def _announce(resolved: Resolved, primary: Primary, found: str, redis: _Redis) -> None:
    config = resolved.config
    rows = {
        "app": f"{config.app or '.'}  {found}",
        "redis": redis.described,
        "workers": f"{config.workers}  ({resolved.sources['workers']})",
        "policy": f"{config.policy} per connection",
        "listen": " ".join(url_of(listener.address) for listener in primary.hand_off.listeners),
        "control": f"sharedcluster status | stop --name {primary.name}",
    }
    versions = {
        "sharedcluster": VERSION,
        "Python": platform.python_version(),
        "gevent": importlib.metadata.version("gevent"),
    }
    if sys.stderr.isatty() and config.log_format == "text":
        click.echo("\n  " + "   ".join(f"{name} {version}" for name, version in versions.items()) + "\n", err=True)
        for label, text in rows.items():
            click.echo(f"  {click.style(f'{label:>8}', dim=True)}   {text}", err=True)
        click.echo(err=True)
        return
    logger.info("starting " + " ".join(f"{label}={text!r}" for label, text in rows.items()))


def url_of(address: BindAddress) -> str:
    """What a person types into a browser."""
    if address.path or (address.fd is not None and not address.port):
        return str(address)
    host = "127.0.0.1" if address.host == "0.0.0.0" else "[::1]" if address.host == "::" else address.host
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{address.port}"


def _follow(primary: Primary) -> None:
    """Log what happens to the cluster, from its events."""
    started = time.monotonic()

    def ready(workers: int) -> None:
        hint = "     Ctrl+C drains and stops" if sys.stderr.isatty() else ""
        seconds = time.monotonic() - started
        logger.info("ready in %.1f s, %d workers (pid %d)%s", seconds, workers, os.getpid(), hint)
        primary.notifier.ready(workers)

    def ended(worker: WorkerHandle, reason: ExitReason) -> None:
        if reason.asked:
            logger.debug("worker %d (slot %d, pid %d) left", worker.id, worker.slot, worker.pid)
            return
        memory = _about_memory(worker, reason)
        logger.error("worker %d (slot %d, pid %d) %s%s", worker.id, worker.slot, worker.pid, reason.how, memory)
        if worker.load_failure:
            logger.error("%s\n%s", *worker.load_failure)

    primary.events.on(events.READY, ready)
    primary.events.on(events.EXIT, ended)

    def reloaded(generation: int) -> None:
        logger.info("generation %d serves", generation)
        primary.notifier.ready(primary.desired_workers)

    primary.events.on(events.RELOAD, reloaded)


def _about_memory(worker: WorkerHandle, reason: ExitReason) -> str:
    if reason.signal != signal.SIGKILL:
        return ""
    last = f"last seen with {worker.stats.rss / 1048576:.0f} MB"
    return f": out of memory, says the kernel ({last})" if reason.out_of_memory else f" ({last})"
