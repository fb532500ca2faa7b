"""Reading: list, status, describe. They ask the primaries and read the records; only dead sockets are removed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click

from sharedcluster.cli.tables import duration, facts_block, megabytes, say, table
from sharedcluster.cli.targets import Target, choose, known, names_argument, with_address
from sharedcluster.cli.workers import show_worker, worker_meant
from sharedcluster.control import client
from sharedcluster.control.protocol import ControlError
from sharedcluster.errors import UserError
from sharedcluster.operating import actions, records
from sharedcluster.operating.records import Record, logs_folder
from sharedcluster.operating.spec import log_paths

LAST_WORDS: Final = 20
"""Lines of the error log that `describe` shows of an application that is errored without a traceback."""
PATIENCE: Final = 1.0
"""Seconds that one primary may take to answer; the others must not wait for it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A cluster as a command finds it: `state` in one word, `note` what is unusual, `facts` its own status."""

    target: Target
    state: str
    note: str = ""
    facts: Mapping[str, Any] | None = None


def see(target: Target) -> Seen:
    """Ask a cluster how it is; a socket on which nobody listens any more is removed."""
    facts = None
    silent = ""
    if target.control is not None:
        try:
            facts = client.call(target.control, "status", timeout=PATIENCE)["status"]
        except UserError:
            actions.clean_socket(str(target.control))
        except (ControlError, OSError) as error:
            silent = str(error)
    if target.record is None:
        if facts is None:
            return Seen(target, "no answer" if silent else "dead", silent or "its control socket was left behind")
        return Seen(target, facts["state"], "foreground", facts)
    return _see_kept(target, target.record, facts, silent)


def _see_kept(target: Target, record: Record, facts: Mapping[str, Any] | None, silent: str) -> Seen:
    state = record.state
    attended = record.has_attendant()
    past = f"{state.ended} {duration(time.time() - state.ended_at)} ago" if state.ended else ""
    if facts is not None and (attended or record.has_primary()):
        lost = facts["counters"].get("log_lines_lost")
        notes = (
            "" if attended else "nobody attends it: restart it",
            f"{lost} log lines lost" if lost else "",
            past if state.restarts else "",
        )
        word = "starting" if state.state == "starting" else facts["state"]
        return Seen(target, word, "; ".join(filter(None, notes)), facts)
    if record.has_primary():
        word = "starting" if state.state == "starting" else "no answer"
        return Seen(target, word, silent or past)
    if attended:
        return Seen(target, state.state, past)
    if state.state in ("stopped", "errored"):
        return Seen(target, state.state, first_line(state.failure) if state.state == "errored" else "")
    return Seen(target, "dead", "its primary and its attendant are gone")


def first_line(text: str) -> str:
    """The first line of a text."""
    return text.partition("\n")[0]


@click.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="for machines; the shape is stable")
def list_command(as_json: bool) -> None:
    """Show every app, one line each (also: ls, ps)."""
    seen = [see(target) for target in known()]
    if as_json:
        click.echo(json.dumps({"schema": 1, "apps": [_as_json(each) for each in seen]}, indent=2))
        return
    if not seen:
        click.echo("Nothing runs and nothing is kept. Start something: sharedcluster start APP")
        return
    header = ["id", "name", "state", "pid", "uptime", "workers", "restarts", "conns", "requests", "cpu", "mem",
              "address", "note"]  # fmt: skip
    say(table(header, [_row(each) for each in seen], left=(1, 2, 11, 12), state=2))


def _row(seen: Seen) -> list[str]:
    record, facts = seen.target.record, seen.facts
    number = str(record.id) if record else "-"
    if facts is None:
        return [number, seen.target.name, seen.state, *["-"] * 8, "", seen.note]
    totals = _totals(facts)
    ready = sum(worker["state"] == "listening" for worker in facts["workers"])
    return [
        number, seen.target.name, seen.state, str(facts["pid"]), duration(time.time() - facts["started_at"]),
        f"{ready}/{len(facts['workers'])}" if ready != len(facts["workers"]) else str(ready),
        str(_restarts(seen)), str(totals["connections"]), str(totals["requests"]), f"{totals['cpu']:.0f}%",
        megabytes(totals["rss"]), " ".join(each["address"] for each in facts["listeners"]), seen.note,
    ]  # fmt: skip


def _restarts(seen: Seen) -> int:
    """Of workers and of the primary."""
    own = seen.target.record.state.restarts if seen.target.record else 0
    return own + int((seen.facts or {}).get("counters", {}).get("restarts", 0))


def _totals(facts: Mapping[str, Any]) -> dict[str, float]:
    totals = {key: sum(w[key] for w in facts["workers"]) for key in ("connections", "requests", "cpu", "rss")}
    totals["requests"] += facts["counters"].get("requests", 0)  # of workers that have left
    return totals


def _as_json(seen: Seen) -> dict[str, Any]:
    record, state = seen.target.record, seen.target.record.state if seen.target.record else None
    return {
        "id": record.id if record else None,
        "name": seen.target.name,
        "state": seen.state,
        "note": seen.note,
        "kept": record is not None,
        "attended": record.has_attendant() if record else False,
        "control": str(seen.target.control or ""),
        "app": record.spec.target if record else None,
        "primary_restarts": state.restarts if state else 0,
        "ended": state.ended if state else "",
        "exit_code": state.exit_code if state else None,
        "failure": state.failure if state else "",
        "cpu_seconds": round(state.cpu_seconds, 3) if state else 0.0,
        "status": seen.facts,
    }


# -- status ------------------------------------------------------------------------------------------------------


@click.command()
@names_argument
@with_address
@click.option("--json", "as_json", is_flag=True, help="for machines; the shape is stable")
def status(names: tuple[str, ...], name: str, control: str, as_json: bool) -> None:
    """Show a running cluster and its workers."""
    if control or not (names or name):
        paths = [client.find(control=control)] if control else [_running(target) for target in choose(())]
    else:
        paths = [_running(target) for target in choose(names, name)]
    for number, path in enumerate(paths):
        facts = client.call(path, "status")["status"]
        say(json.dumps(facts, indent=2) if as_json else ("\n" if number else "") + status_table(facts))


def _running(target: Target) -> Path:
    """The control socket of a cluster that answers.

    Raises:
        NotRunningError: It does not run; why is said as far as it is known.
    """
    if target.control is not None and client.is_running(target.control):
        return target.control
    seen = see(target)
    raise client.NotRunningError(
        f"{target.name} is not running: {seen.state}.", fact=seen.note,
        advice=(f"More: sharedcluster describe {target.name}", f"Start it: sharedcluster start {target.name}"),
    )  # fmt: skip


def status_table(facts: Mapping[str, Any]) -> str:
    """The status as text: one line on the cluster, one on each worker, a state always as a word."""
    redis = facts["redis"]
    latency = f" {redis['latency_ms']:.1f} ms" if redis["state"] == "ok" and redis["latency_ms"] is not None else ""
    addresses = " ".join(each["address"] for each in facts["listeners"])
    head = (
        f"{facts['name']}  {facts['state']}  up {duration(time.time() - facts['started_at'])}  pid {facts['pid']}"
        f"  {addresses}  redis {redis['state']}{latency}  generation {facts['generation']}"
        f"  restarts {facts['counters'].get('restarts', 0)}"
    )
    header = ["slot", "id", "pid", "state", "uptime", "restarts", "conns", "active", "requests", "cpu", "mem"]
    rows = [
        [
            str(w["slot"]), str(w["id"]), str(w["pid"]), w["state"], duration(w["uptime"]), str(w["restarts"]),
            str(w["connections"]), str(w["in_flight"]), str(w["requests"]), f"{w['cpu']:.0f}%", megabytes(w["rss"]),
        ]
        for w in facts["workers"]
    ]  # fmt: skip
    return f"{head}\n\n{table(header, rows, left=(3,), state=3)}"


# -- describe ----------------------------------------------------------------------------------------------------


@click.command()
@names_argument
@with_address
@click.option("--json", "as_json", is_flag=True, help="for machines")
def describe(names: tuple[str, ...], name: str, control: str, as_json: bool) -> None:
    """Show everything about an app, or (with a worker's ID, or NAME ID) about one worker."""
    if meant := worker_meant(names, name, control):
        show_worker(*meant, as_json=as_json)
        return
    for number, target in enumerate(choose(names, name, control, running=False)):
        seen = see(target)
        if target.record is not None:  # `see` may have taken a moment
            seen = replace(seen, target=replace(target, record=records.load(target.name) or target.record))
        if as_json:
            click.echo(json.dumps({"schema": 1, **_as_json(seen), **_described(seen)}, indent=2, default=str))
            continue
        click.echo("\n" if number else "", nl=False)
        click.echo(f"{target.name}  {seen.state}" + (f"  ({seen.note})" if seen.note else ""))
        click.echo(facts_block(_described(seen)))
        if seen.facts is not None:
            say("\n" + status_table(seen.facts))
        if target.record is not None and (failure := _failure(seen)):
            click.echo(f"\nlast failure:\n{failure}")


def _described(seen: Seen) -> dict[str, Any]:
    record = seen.target.record
    if record is None:
        return {"control": seen.target.control}
    spec, state, upkeep = record.spec, record.state, record.spec.upkeep
    out, err = log_paths(spec, logs_folder())
    given = {**spec.settings, **spec.given}
    rotation = f"at {megabytes(upkeep.log_max_size)}" if upkeep.log_max_size else "never by size"
    if upkeep.log_max_age:
        rotation += f", every {duration(upkeep.log_max_age)}"
    return {
        "id": record.id,
        "app": spec.target,
        "folder": spec.cwd,
        "file": spec.file + (f"  (env {spec.env_name})" if spec.env_name else ""),
        "settings": "  ".join(f"{k}={_shown(v)}" for k, v in given.items() if k != "app"),
        "variables": " ".join(sorted(spec.env)),
        "autorestart": "on" if upkeep.autorestart else "off",
        "cron_restart": upkeep.cron_restart,
        "watch": ", ".join(upkeep.watch),
        "out log": out,
        "error log": err if err != out else "",
        "rotation": f"{rotation}, {upkeep.log_keep} kept" + (", compressed" if upkeep.log_compress else ""),
        "attendant": f"pid {state.attendant.pid}" if state.attendant and record.has_attendant() else "none",
        "control": state.control,
        "restarts": f"{state.restarts} of the primary" if state.restarts else "",
        "ended": _ended(record),
        **state.notes,
    }


def _shown(value: Any) -> str:
    """A setting without a password in it."""
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    if "://" in text:
        from sharedcluster.redis_server import redact

        return redact(text)
    return text


def _ended(record: Record) -> str:
    state = record.state
    if not state.ended:
        return ""
    ago = duration(time.time() - state.ended_at)
    return f"{state.ended}, {ago} ago, after {state.cpu_seconds:.2f} s of CPU"


def _failure(seen: Seen) -> str:
    """What went wrong last: the application's traceback if it is known, else the last words of its workers."""
    record = seen.target.record
    assert record is not None
    failure = record.state.failure
    if "Traceback" in failure or seen.state not in ("errored", "dead"):
        return _indented(failure)
    from sharedcluster.operating.following import last_lines

    path = log_paths(record.spec, logs_folder())[1]
    words = last_lines([path], LAST_WORDS, lambda line: line.role not in ("primary", "attendant"))
    return _indented("\n".join([failure, *(f"{line.time} {line.role} | {line.text}" for line in words)]).strip())


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
