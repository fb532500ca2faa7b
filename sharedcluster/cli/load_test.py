"""load-test: the options of loadtest and ab, and `quick` as artillery has it."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any, Final

import click

from sharedcluster.config import parse_seconds
from sharedcluster.errors import ConfigError

EXAMPLES: Final = """
\b
Examples:
  sharedcluster load-test http://127.0.0.1:8000/ -n 20000 -c 100
  sharedcluster load-test http://127.0.0.1:8000/ -t 30s -c 50 --rps 500
  sharedcluster load-test http://127.0.0.1:8000/counter --sessions
  sharedcluster load-test quick http://127.0.0.1:8000/ --count 10 --num 20
\b
Exit code 1 if a request failed (no answer, or 5xx) or a session was lost.
"""
DEFAULT_SECONDS: Final = 10.0


def _seconds(_context: click.Context, _parameter: click.Parameter, text: str | None) -> float | None:
    try:
        return None if text is None else parse_seconds(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command(name="load-test", epilog=EXAMPLES)
@click.argument("words", nargs=-1, required=True, metavar="[quick] URL")
@click.option("-n", "--requests", type=click.IntRange(1), metavar="N", help="how many requests in all")
@click.option("-c", "--concurrency", type=click.IntRange(1), metavar="N", help="how many clients at once [10]")
@click.option("-t", "--time", "seconds", callback=_seconds, metavar="S", help="for so long [10, if there is no -n]")
@click.option("-k/--no-keepalive", "keep_alive", default=True, help="keep connections open, or a new one each [keep]")
@click.option("--rps", type=click.FloatRange(0, min_open=True), metavar="R", help="so many a second, answered or not")
@click.option("-H", "--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="repeatable")
@click.option("-m", "--method", metavar="METHOD", help="[GET; POST with -d or --sessions]")
@click.option("-d", "--data", metavar="TEXT|@FILE", help="the body")
@click.option("-C", "--cookie", "cookies", multiple=True, metavar="NAME=VALUE", help="repeatable")
@click.option("--cores", type=click.IntRange(1), metavar="N", help="processes of the generator [half of the CPUs]")
@click.option("--timeout", default="10", callback=_seconds, metavar="S", help="for one answer [10]")
@click.option("--sessions", is_flag=True, help="each client keeps its cookies; count what its session forgot")
@click.option("--count", type=click.IntRange(1), metavar="C", help="quick: how many clients [10]")
@click.option("--num", type=click.IntRange(1), metavar="N", help="quick: requests of each [20]")
@click.option("--quiet", is_flag=True, help="no progress")
@click.option("--json", "as_json", is_flag=True, help="for machines; the shape is stable")
def load_test(words: tuple[str, ...], quiet: bool, as_json: bool, **options: Any) -> int:
    """Load URL from forked client processes and report what came back.

    With --rps a latency counts from the time its request was due, so a server that stands still is not spared.
    """
    from sharedcluster.load import report
    from sharedcluster.load.running import run

    plan = _plan(words, **options)
    _raise_descriptor_limit(plan.clients)
    is_silent = quiet or as_json or not sys.stderr.isatty()
    outcome = run(plan, _silent if is_silent else _show_progress)
    if not is_silent:
        click.echo(f"\r{'':<70}\r", nl=False, err=True)
    click.echo(json.dumps(report.as_json(outcome), indent=2) if as_json else report.report(outcome))
    tally = outcome.tally
    refused = sum(count for status, count in tally.statuses.items() if status >= 500)
    return int(bool(tally.errors.total() or refused or tally.lost or not tally.answered))


def _plan(
    words: tuple[str, ...], *, requests: int | None, concurrency: int | None, seconds: float | None,
    keep_alive: bool, rps: float | None, headers: tuple[str, ...], method: str | None, data: str | None,
    cookies: tuple[str, ...], cores: int | None, timeout: float, sessions: bool, count: int | None, num: int | None,
) -> Any:  # fmt: skip
    from sharedcluster.load.plan import Plan, Target

    is_quick = words[0] == "quick" and len(words) > 1
    if len(words) != (2 if is_quick else 1):
        raise click.UsageError("give one URL: sharedcluster load-test URL, or load-test quick URL")
    if not is_quick and (count or num):
        raise click.UsageError("--count and --num go with quick: load-test quick URL --count 10 --num 20")
    clients = (count or concurrency or 10) if is_quick else concurrency or 10
    each = (num or 20) if is_quick else 0
    body = _body(data)
    if not is_quick and requests is None and not seconds:
        seconds = DEFAULT_SECONDS
    if requests is not None:
        clients = min(clients, requests)
    return Plan(
        target=Target.from_url(words[-1]),
        requests=clients * each if is_quick else requests or 0,
        seconds=seconds or 0.0,
        clients=clients,
        rate=rps or 0.0,
        per_client=each,
        keep_alive=keep_alive,
        method=(method or ("POST" if body or sessions else "GET")).upper(),
        headers=tuple(_header(each) for each in headers),
        cookies=cookies,
        body=body,
        timeout=timeout,
        processes=min(clients, cores or max(1, len(os.sched_getaffinity(0)) // 2)),
        sessions=sessions,
    )


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or any(c in text for c in "\r\n"):
        raise click.UsageError(f"-H {text!r}: a header is 'NAME: VALUE'")
    return name.strip(), value.strip()


def _body(data: str | None) -> bytes:
    if not data:
        return b""
    if not data.startswith("@"):
        return data.encode()
    try:
        return Path(data[1:]).read_bytes()
    except OSError as error:
        raise ConfigError(f"Cannot read {data[1:]}: {error.strerror}.") from error


def _raise_descriptor_limit(clients: int) -> None:
    """Each client is a descriptor; the soft limit may go up to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = clients + 64
    if soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        if limit < wanted:
            raise ConfigError(
                f"{clients} clients need {wanted} descriptors.", advice=f"The limit is {hard}: ulimit -Hn"
            )


def _silent(_answered: int, _errors: int, _seconds: float) -> None:
    """No progress."""


def _show_progress(answered: int, errors: int, seconds: float) -> None:
    line = f"{seconds:6.1f} s  {answered} answers  {answered / max(seconds, 1e-9):.0f} req/s  {errors} errors"
    click.echo(f"\r{line:<70}", nl=False, err=True)
