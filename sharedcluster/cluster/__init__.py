"""The primary process and the wire it speaks with its workers; `worker` is the other end of that wire.

`from sharedcluster import cluster` is also how people get Node's cluster module in Python. Its names are resolved on
first use, from `sharedcluster.program`, so that importing this package loads nothing; what a name is depends on which
process asks. Two of the names are those of modules in this folder, or can be set, and so are properties.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sharedcluster.program.emitter import Observer, ObserverT
    from sharedcluster.program.loops import Timer
    from sharedcluster.program.serving import Server
    from sharedcluster.program.settings import Settings
    from sharedcluster.program.this_worker import ThisWorker
    from sharedcluster.program.workers import ListeningAddress as ListeningAddress
    from sharedcluster.program.workers import Worker as Worker

    SCHED_RR: str
    SCHED_NONE: str
    is_primary: bool
    is_worker: bool
    worker: ThisWorker
    """None in a primary, where nobody should ask; so declared, every worker's code would have to."""
    workers: dict[int, Worker]
    settings: Settings
    scheduling_policy: str

    def setup_primary(**changes: Any) -> None: ...
    def fork(env: Mapping[str, str] | None = None) -> Worker: ...
    def disconnect(callback: Callable[[], object] | None = None) -> None: ...
    def run() -> None: ...
    def call_later(seconds: float, job: Callable[..., object], *arguments: object) -> Timer: ...
    def serve(application: Any, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> Server: ...
    @overload
    def on(event: str, observer: ObserverT) -> ObserverT: ...
    @overload
    def on(event: str) -> Callable[[ObserverT], ObserverT]: ...
    def on(event: str, observer: Any = None) -> Any: ...
    def once(event: str, observer: Observer) -> Observer: ...
    def off(event: str, observer: Observer) -> None: ...


_NAMES = frozenset((
    "SCHED_RR", "SCHED_NONE", "is_primary", "is_worker", "workers", "settings", "scheduling_policy",
    "setup_primary", "fork", "disconnect", "run", "call_later", "serve", "on", "once", "off",
))  # fmt: skip
"""What people see here. The import system asks for the names of our own modules too, which must load nothing."""
_TYPES = frozenset(("Worker", "ListeningAddress"))


class _Cluster(ModuleType):
    """This package, as people see it."""

    @property
    def worker(self) -> Any:
        """The worker this process is, or None."""
        from sharedcluster.program import api

        return api.current().worker

    @worker.setter
    def worker(self, _module: ModuleType) -> None:
        """The import system says so when it has loaded `cluster/worker.py`, which is imported by its full name."""

    @property
    def scheduling_policy(self) -> Any:
        """See `Settings`."""
        return self.__getattr__("scheduling_policy")

    @scheduling_policy.setter
    def scheduling_policy(self, name: str) -> None:
        from sharedcluster.program import api

        api.current().scheduling_policy = name  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        if name in _TYPES:
            from sharedcluster.program import workers

            return getattr(workers, name)
        if name not in _NAMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from sharedcluster.program import api

        try:
            return getattr(api.current(), name)
        except AttributeError:
            raise AttributeError(api.describe_missing(name)) from None


sys.modules[__name__].__class__ = _Cluster
