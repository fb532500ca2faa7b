"""What operators can do to a running cluster, as the control socket calls it; each is a few lines on the primary."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from sharedcluster.cluster.primary import Primary
from sharedcluster.cluster.status import worker_facts
from sharedcluster.cluster.worker_handle import WorkerHandle, WorkerState
from sharedcluster.control.server import Client
from sharedcluster.errors import ConfigError

Command = Callable[[dict[str, Any], Client], dict[str, Any] | None]


class Commands:
    """Satisfies `control.server.Target`. A command that returns None answers later."""

    def __init__(self, primary: Primary) -> None:
        self._primary = primary
        self._table: dict[str, Command] = {
            "status": self._status,
            "stop": self._stop,
            "reload": self._reload,
            "scale": self._scale,
            "drain": self._drain,
            "describe": self._describe,
            "latency": self._latency,
            "reset": self._reset,
        }

    def commands(self) -> Mapping[str, Command]:
        """Command -> what does it."""
        self._primary.workforce.has_changed = True
        return self._table

    def _status(self, _arguments: dict[str, Any], _client: Client) -> dict[str, Any]:
        return {"status": self._primary.status()}

    def _stop(self, arguments: dict[str, Any], _client: Client) -> dict[str, Any]:
        if arguments.get("now"):
            self._primary.on_stop_now()
        else:
            self._primary.on_drain()
        return {"pid": os.getpid()}

    def _reload(self, arguments: dict[str, Any], client: Client) -> dict[str, Any] | None:
        if self._primary.is_stopping:
            raise ConfigError("The cluster is stopping.")
        if not arguments.get("wait", True):
            self._primary.on_reload()
            return {"generation": self._primary.status()["generation"]}
        self._primary.on_reload(lambda failure: client.reply(self._outcome(failure)))
        return None

    def _outcome(self, failure: str) -> dict[str, Any]:
        if failure:
            return {"ok": False, "error": failure, "exit_code": 3}
        return {"ok": True, "generation": self._primary.status()["generation"]}

    def _drain(self, arguments: dict[str, Any], _client: Client) -> dict[str, Any]:
        worker = self._worker(arguments)
        if worker.state is not WorkerState.LISTENING or worker.retiring:
            raise ConfigError(f"Worker {worker.id} is {worker.state}{', leaving' if worker.retiring else ''}.")
        self._primary.workforce.retire(worker, "an operator asked for it")
        return {"id": worker.id, "slot": worker.slot}

    def _describe(self, arguments: dict[str, Any], _client: Client) -> dict[str, Any]:
        worker = self._worker(arguments)
        facts = worker_facts(worker, time.monotonic())
        return {
            "worker": {
                **facts,
                "unacknowledged": len(worker.unacknowledged),
                "retiring": worker.retiring,
                "heartbeat_age": round(time.monotonic() - worker.heartbeat_at, 1),
                "load_failure": worker.load_failure,
                "counters": worker.stats.counters,
            }
        }

    def _latency(self, _arguments: dict[str, Any], _client: Client) -> dict[str, Any]:
        """Requests by duration, bucket i below 2**i microseconds: of each worker, to be merged by addition."""
        workers = self._primary.workforce.workers.values()
        return {"workers": [{"id": w.id, "slot": w.slot, "latency": w.stats.latency} for w in workers]}

    def _reset(self, _arguments: dict[str, Any], _client: Client) -> dict[str, Any]:
        self._primary.workforce.reset_counters()
        return {}

    def _worker(self, arguments: dict[str, Any]) -> WorkerHandle:
        workers = self._primary.workforce.workers
        wanted = str(arguments.get("id", ""))
        if wanted.isdigit() and int(wanted) in workers:
            return workers[int(wanted)]
        raise ConfigError(
            f"There is no worker {wanted!r}.", fact=f"Their ids: {', '.join(map(str, workers)) or 'none'}."
        )

    def _scale(self, arguments: dict[str, Any], _client: Client) -> dict[str, Any]:
        wanted = scaled(self._primary.desired_workers, str(arguments.get("workers", "")))
        self._primary.scale(wanted)
        return {"workers": wanted}


def scaled(now: int, text: str) -> int:
    """`4`, `+2` or `-1`, from `now` workers.

    Raises:
        ConfigError: It is none of these, or would leave no worker.
    """
    try:
        wanted = now + int(text) if text[:1] in ("+", "-") else int(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a number of workers.", advice="Use 4, +1 or -1.") from None
    if wanted < 1:
        raise ConfigError(f"{wanted} workers cannot serve.", advice="To stop: sharedcluster stop")
    return wanted
