"""A scheduling policy of the user's own: `--policy MODULE:CLASS`.

It runs in the primary, which must stay clean and must not end by a mistake in it. So the module may import nothing but
the standard library, workers do not inherit it (a reload loads new code in them; the policy itself is replaced with
the primary, by USR2), and at its first mistake round-robin takes over for good.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final, cast

from sharedcluster.cluster.messages import Peer
from sharedcluster.cluster.scheduling import POLICIES, Policy, RoundRobin
from sharedcluster.cluster.worker_handle import WorkerHandle
from sharedcluster.errors import AppLoadError, ConfigError
from sharedcluster.log import logger

METHODS: Final = ("add", "remove", "pick")
MISTAKES: Final = (Exception, SystemExit)
"""What the user's code may raise; `sys.exit()` in it must not end the primary."""


def make_policy(name: str) -> Policy:
    """The policy of a name of `--policy`, or of the class that `MODULE:CLASS` names.

    Raises:
        ConfigError: There is no such class, it is no policy, or its module imports more than it may.
        AppLoadError: Its module or its constructor raised; with the traceback.
    """
    if name in POLICIES:
        return POLICIES[name]()
    module, _, attribute = name.partition(":")
    loaded = _import(name, module)
    made = getattr(loaded, attribute, None)
    if not callable(made):
        raise ConfigError(f'policy: "{module}" has no class {attribute}.')
    try:
        own = made()
    except MISTAKES as error:
        raise AppLoadError(f"policy: {name}() failed.", traceback=traceback.format_exc()) from error
    if missing := [method for method in METHODS if not callable(getattr(own, method, None))]:
        raise ConfigError(f"policy: {name} has no method {' or '.join(missing)}.", advice="A policy has all three.")
    return Guarded(name, cast(Policy, own))


def _import(policy: str, module: str) -> Any:
    before, top = set(sys.modules), module.partition(".")[0]
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise ConfigError(f'policy: there is no module "{module}".', fact=f"Looked in {here}.") from error
        raise AppLoadError(f'policy: importing "{module}" failed.', traceback=traceback.format_exc()) from error
    except MISTAKES as error:
        raise AppLoadError(f'policy: importing "{module}" failed.', traceback=traceback.format_exc()) from error
    finally:
        sys.path.remove(here)
    new = set(sys.modules) - before
    strangers = {name.partition(".")[0] for name in new} - sys.stdlib_module_names - {top, "sharedcluster"}
    if strangers:
        raise ConfigError(
            f"policy: {policy} imports {', '.join(sorted(strangers))}.",
            fact="It runs in the primary, which loads nothing but the standard library.",
            advice="Put the policy in a file of its own, outside the application's package.",
        )
    for name in new:
        if name.partition(".")[0] == top:
            del sys.modules[name]
    return loaded


class Guarded:
    """A policy that is not trusted, and round-robin, which is told the same and takes over at the first mistake."""

    def __init__(self, name: str, own: Policy) -> None:
        self._name = name
        self._own: Policy | None = own
        self._turn = RoundRobin()
        self._workers: set[WorkerHandle] = set()

    def add(self, worker: WorkerHandle) -> None:
        """The worker takes connections from now on."""
        self._workers.add(worker)
        self._turn.add(worker)
        if self._own is not None:
            self._ask(self._own.add, worker)

    def remove(self, worker: WorkerHandle) -> None:
        """The worker drains or is dead."""
        self._workers.discard(worker)
        self._turn.remove(worker)
        if self._own is not None:
            self._ask(self._own.remove, worker)

    def pick(self, peer: Peer) -> WorkerHandle | None:
        """Whom the user's policy picks, if that one can take a connection."""
        if self._own is not None:
            picked = self._ask(self._own.pick, peer)
            if picked is None and self._own is not None:
                return None
            # Compared by identity: what it picked may be anything, also what has no hash or fails when it is compared.
            if any(picked is worker for worker in self._workers) and picked.has_credit:
                return cast(WorkerHandle, picked)
            if self._own is not None:
                what = repr(picked) if type(picked) is WorkerHandle else f"an object of type {type(picked).__name__}"
                self._give_up(f"picked {what}, which cannot take a connection")
        return self._turn.pick(peer)

    def _ask(self, method: Callable[[Any], Any], argument: object) -> Any:
        try:
            return method(argument)
        except MISTAKES:
            self._give_up(f"failed\n{traceback.format_exc()}")
            return None

    def _give_up(self, why: str) -> None:
        logger.error("the policy %s %s; round-robin from now on", self._name, why)
        self._own = None
