"""Functions of the user's that are called when something happens to the cluster: `hooks = "shop.hooks"`.

The setting names a module; a function in it that has the name of an event is called. Where it runs follows from what
it is about. The primary never imports it: it must stay clean, and a mistake in a hook must not end the cluster.

| name | called with | where | when |
|---|---|---|---|
| `on_fork`, `on_online`, `on_listening`, `on_drain`, `on_disconnect` | worker | observer | as `cluster`'s events |
| `on_exit` | worker, code, signal | observer | a worker's process has ended |
| `on_ready`, `on_reload`, `on_stop` | cluster | observer | all workers listen; a generation serves; all have left |
| `when_ready`, `on_reload` | cluster | observer | gunicorn's name for `on_ready`; the same |
| `child_exit` | cluster, worker | observer | gunicorn's name for `on_exit` |
| `post_fork` | cluster, worker | worker | before the application is loaded |
| `post_worker_init` | worker | worker | it is loaded, and nothing is served yet |
| `worker_exit` | cluster, worker | worker | everything is answered |

The observer is a process of its own, which the primary starts and feeds: `python -m sharedcluster.hooks MODULE`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

from sharedcluster.errors import AppLoadError

log: Final = logging.getLogger("sharedcluster.hooks")
MAX_EVENT: Final = 65536

OBSERVED: Final = (
    "on_fork", "on_online", "on_listening", "on_drain", "on_disconnect", "on_exit", "on_ready", "on_reload", "on_stop",
    "when_ready", "child_exit",
)  # fmt: skip
IN_WORKER: Final = ("post_fork", "post_worker_init", "worker_exit")
NOT_OFFERED: Final = (
    "on_starting", "pre_fork", "pre_exec", "pre_request", "post_request", "nworkers_changed", "worker_int",
    "worker_abort", "ssl_context",
)  # fmt: skip
"""gunicorn's other hooks: they would run in the primary, or around each request, where WSGI middleware belongs."""


@dataclass(frozen=True, slots=True)
class HookWorker:
    """A worker, as hooks get it. `age` is gunicorn's word for what counts up with every worker."""

    id: int
    slot: int
    generation: int
    pid: int

    @property
    def age(self) -> int:
        """The same as `id`."""
        return self.id

    @property
    def log(self) -> logging.Logger:
        """Where gunicorn's hooks write to."""
        return log


@dataclass(frozen=True, slots=True)
class HookCluster:
    """The cluster, as hooks get it: gunicorn's `server`."""

    name: str
    pid: int

    @property
    def log(self) -> logging.Logger:
        """Where gunicorn's hooks write to."""
        return log


class Hooks:
    """The functions of a module, by the names of events; none if there is no module."""

    def __init__(self, module: ModuleType | None) -> None:
        self._module = module

    @classmethod
    def load(cls, name: str) -> Hooks:
        """Import the module that the setting names.

        Raises:
            AppLoadError: It cannot be imported; with its own traceback.
        """
        if not name:
            return cls(None)
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:
                raise AppLoadError(f'hooks: there is no module "{name}".') from error
            raise AppLoadError(f'hooks: importing "{name}" failed.', traceback=traceback.format_exc()) from error
        except Exception as error:
            raise AppLoadError(f'hooks: importing "{name}" failed.', traceback=traceback.format_exc()) from error
        return cls(module)

    def warn_of_strangers(self) -> None:
        """Say which of gunicorn's hooks the module has in vain."""
        for name in NOT_OFFERED:
            if callable(getattr(self._module, name, None)):
                log.warning("the hook %s is never called here (see docs/from-node.md)", name)

    def call(self, name: str, *arguments: object) -> None:
        """Call a hook if the module has it; what it raises is logged."""
        hook: Callable[..., object] | None = getattr(self._module, name, None)
        if callable(hook):
            try:
                hook(*arguments)
            except Exception:
                log.exception("the hook %s failed", name)


# -- the observer ------------------------------------------------------------------------------------------------


def encode(event: str, cluster: HookCluster, worker: HookWorker | None = None, *rest: object) -> bytes:
    """An event as it goes to the observer: one datagram."""
    about = None if worker is None else [worker.id, worker.slot, worker.generation, worker.pid]
    return json.dumps([event, [cluster.name, cluster.pid], about, rest]).encode()


def dispatch(hooks: Hooks, data: bytes) -> None:
    """Call what an event is for."""
    event, about_cluster, about_worker, rest = json.loads(data)
    cluster = HookCluster(*about_cluster)
    if about_worker is None:
        hooks.call(f"on_{event}", cluster)
        if event == "ready":
            hooks.call("when_ready", cluster)
        return
    worker = HookWorker(*about_worker)
    hooks.call(f"on_{event}", worker, *rest)
    if event == "exit":
        hooks.call("child_exit", cluster, worker)


def main(name: str) -> None:
    """Be the observer: call hooks until the primary and all workers are gone."""
    # What is sent to the whole group is for the primary; the end of the channel is the end of this process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda _number, _frame: None)
    logging.basicConfig(format="observer  %(message)s", level=logging.INFO)
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    hooks = Hooks.load(name)
    hooks.warn_of_strangers()
    while data := channel.recv(MAX_EVENT):
        dispatch(hooks, data)
    with suppress(OSError):
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
