"""What the commands do to kept applications: start one detached and wait for the outcome, stop it, start it again."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sharedcluster.config import parse_seconds
from sharedcluster.control import client
from sharedcluster.control.protocol import ControlError, runtime_folder
from sharedcluster.errors import ConfigError, UserError
from sharedcluster.operating import records
from sharedcluster.operating.records import ProcessId, Record, State
from sharedcluster.operating.spec import AppSpec

START_PATIENCE: Final = 180.0
"""Seconds after which a command does not wait for a start any more; workers that hang are replaced long before."""
_STILL_STARTING: Final = b'{"ok": false, "error": "It is still starting: sharedcluster list", "exit_code": 1}'
STOP_MARGIN: Final = 10.0
"""Seconds a cluster may take beyond its drain deadline before it is killed."""


class StartError(UserError):
    """An application did not come up; the text is what its primary said."""

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Started:
    """The outcome of a start."""

    record: Record
    workers: int
    seconds: float


def start(spec: AppSpec) -> Started:
    """Start an application detached and wait until all of its workers listen.

    Raises:
        ConfigError: It runs already.
        StartError: It did not come up; why is in the text, and its log files have more.
    """
    began = time.monotonic()
    with records.locked():
        known = records.load(spec.name)
        if known and known.is_running():
            raise ConfigError(
                f"{spec.name} is running already.",
                advice=f"New code: sharedcluster reload {spec.name}   New settings: sharedcluster restart {spec.name}",
            )
        if client.is_running(_default_control(spec)):
            raise ConfigError(
                f"A cluster named {spec.name} is running in the foreground.", advice="Choose another name: --name NAME"
            )
        record = records.register(spec)
        attendant, outcome = _spawn(record)
    reply = _await(outcome, attendant)
    if not reply.get("ok"):
        raise StartError(f"{spec.name} did not start.\n{reply.get('error', '')}".rstrip(), reply.get("exit_code", 1))
    return Started(record, int(reply["workers"]), time.monotonic() - began)


def _default_control(spec: AppSpec) -> Path:
    return Path(
        str(spec.given.get("control") or spec.settings.get("control") or runtime_folder() / f"{spec.name}.sock")
    )


def _spawn(record: Record) -> tuple[subprocess.Popen[bytes], int]:
    """The attendant, in a session of its own, so that no terminal and no shell takes it along."""
    records.made(records.logs_folder())
    read, write = os.pipe2(os.O_CLOEXEC)
    attendant = subprocess.Popen(
        [sys.executable, "-m", "sharedcluster.operating.attendant", record.name, str(write)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        env={**record.spec.environ, "SHAREDCLUSTER_STATE_DIR": str(records.state_folder())},
        pass_fds=(write,), start_new_session=True,
    )  # fmt: skip
    os.close(write)
    # Written by us before the lock is released: whoever comes next sees that it runs.
    records.save_state(record.name, State(**{**_plain(record.state), "attendant": ProcessId.of(attendant.pid)}))
    return attendant, read


def _plain(state: State) -> dict[str, Any]:
    return {"state": "starting", "restarts": state.restarts, "cpu_seconds": state.cpu_seconds}


def _await(outcome: int, attendant: subprocess.Popen[bytes]) -> Mapping[str, Any]:
    with open(outcome, "rb") as pipe:
        ready, _, _ = select.select([pipe], [], [], START_PATIENCE)
        line = pipe.readline() if ready else _STILL_STARTING
    if line:
        attendant.returncode = 0  # it outlives us, and is reaped by whoever adopts it
        reply: Mapping[str, Any] = json.loads(line)
        return reply
    code = attendant.wait()
    return {"ok": False, "error": f"Its attendant ended with code {code}.", "exit_code": 1}


# -- stopping ----------------------------------------------------------------------------------------------------


def stop(record: Record, *, now: bool = False) -> bool:
    """Drain and stop an application, and wait until it is gone.

    Returns:
        Whether it ran.
    """
    if not record.is_running():
        _settle(record)
        return False
    grace = _ask_to_stop(record, now=now)
    deadline = time.monotonic() + grace + STOP_MARGIN
    while (record := records.load(record.name) or record).is_running():
        if time.monotonic() > deadline:
            _kill(record)
            break
        time.sleep(0.03)
    _settle(record)
    return True


def _ask_to_stop(record: Record, *, now: bool) -> float:
    """Through the control socket if somebody answers there, by signal otherwise; returns the drain deadline."""
    if record.has_primary() and record.state.control:
        with suppress(UserError, ControlError, OSError):
            client.call(Path(record.state.control), "stop", now=now, timeout=3.0)
            said = {**record.spec.settings, **record.spec.given}.get("graceful_timeout", 30)
            return parse_seconds(str(said))
    for process in (record.state.attendant, record.state.primary):
        if process is not None and process.is_alive():
            os.kill(process.pid, signal.SIGQUIT if now else signal.SIGTERM)
            break
    return 30.0


def _kill(record: Record) -> None:
    """It did not end in time: its attendant first, so that it does not start the primary again."""
    for process in (record.state.attendant, record.state.primary):
        if process is not None and process.is_alive():
            os.kill(process.pid, signal.SIGKILL)


def _settle(record: Record) -> None:
    """Write `stopped` where no attendant is left to do so, and remove the socket of a dead primary."""
    state = records.load_state(record.name)
    if state.attendant is not None and state.attendant.is_alive():
        return
    if state.state not in ("stopped", "errored"):
        records.save_state(record.name, State(**{**_plain(state), "state": "stopped", "ended": state.ended}))
    clean_socket(state.control)


def clean_socket(control: str) -> bool:
    """Remove a control socket on which nobody listens; returns whether there was one."""
    path = Path(control or "/nonexistent")
    if not path.is_socket() or client.is_running(path):
        return False
    path.unlink(missing_ok=True)
    return True


def restart(record: Record, spec: AppSpec | None = None) -> Started:
    """Stop and start, with its recorded settings or with new ones."""
    stop(record)
    return start(spec or record.spec)


def delete(record: Record) -> None:
    """Stop it and forget it; its log files stay."""
    stop(record)
    with records.locked():
        records.forget(record.name)
