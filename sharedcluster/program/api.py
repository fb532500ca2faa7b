"""The one object behind `from sharedcluster import cluster`: a primary's, a worker's, or that of a worker of `run`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NoReturn

from sharedcluster.errors import ConfigError
from sharedcluster.program import role
from sharedcluster.program.policies import SCHED_NONE, SCHED_RR

if TYPE_CHECKING:
    from sharedcluster.program.primary import PrimaryCluster
    from sharedcluster.program.serving import WorkerCluster
    from sharedcluster.program.this_worker import ThisWorker

_current: list[Any] = []


def become_worker(told: role.WorkerRole) -> ThisWorker:
    """Called by a worker's entry, before its script runs."""
    # These need gevent, which only workers have.
    from sharedcluster.program.serving import WorkerCluster
    from sharedcluster.program.this_worker import ThisWorker

    worker = ThisWorker(told)
    _current[:] = [WorkerCluster(worker)]
    return worker


def current() -> PrimaryCluster | WorkerCluster | WorkerOfRun:
    """What this process is: a primary, if nobody has said otherwise."""
    if not _current:
        if role.runs_under_the_command():
            _current.append(WorkerOfRun())
        else:
            from sharedcluster.program.primary import PrimaryCluster  # a worker has no use for it

            _current.append(PrimaryCluster())
    found: PrimaryCluster | WorkerCluster | WorkerOfRun = _current[0]
    return found


class WorkerOfRun:
    """In a worker of `sharedcluster run`: it is one, and knows which; the command does what a script would do."""

    SCHED_RR = SCHED_RR
    SCHED_NONE = SCHED_NONE
    is_primary = False
    is_worker = True

    def __init__(self) -> None:
        self.worker = self
        # Before the first worker is forked the application is loaded once, to see whether it loads: that is worker 0.
        self.id = int(os.environ.get("SHAREDCLUSTER_WORKER_ID", "0"))
        self.slot = int(os.environ.get("SHAREDCLUSTER_SLOT", "0"))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigError(
            f"cluster.{name} belongs to a program of its own, and this is a worker of `sharedcluster run`.",
            advice="Start it as `python server.py`; or use the shared state for messages: shared.publish, @shared.on.",
        )


def describe_missing(name: str) -> str:
    """Why this process's `cluster` has no such name."""
    here = current()
    if here.worker is not None:
        return f"cluster.{name} is the primary's, and this is worker {here.worker.id}"
    return f"cluster.{name} is a worker's, and this is the primary"
