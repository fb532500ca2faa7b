"""The report of a load test, as text and as JSON."""

from __future__ import annotations

from typing import Any, Final

from sharedcluster.load.running import Outcome

SATURATED: Final = 0.9
"""Share of one CPU from which on a process of the generator is what limits the figures."""
MACHINE_SATURATED: Final = 0.95


def report(outcome: Outcome) -> str:
    """Labels and facts, one a line, then what has to be known to read them."""
    plan, tally = outcome.plan, outcome.tally
    latency = tally.latency
    rows = {
        "Target": f"{plan.method} {'https' if plan.target.is_tls else 'http'}://{plan.target.authority}{plan.target.path}",
        "Clients": f"{plan.clients}, {'keep-alive' if plan.keep_alive else 'a new connection for each request'}, "
        f"{tally.connections} connections made",
        "Requests": f"{tally.answered} in {tally.seconds:.2f} s   {per_second(outcome):.0f} req/s{_offered(outcome)}",
        "Errors": _errors(outcome),
        "Latency": (
            f"mean {latency.mean:.2f} ms   "
            + "   ".join(f"p{p} {latency.percentile(p / 100):.2f}" for p in (50, 90, 95, 99))
            + f"   max {latency.highest / 1000:.2f} ms"
            + ("   (from the time each was due)" if plan.rate else "")
        ),
        "Transfer": f"{tally.bytes_in / 1048576:.2f} MB received",
        "Workers": _workers(outcome),
        "Sessions": _sessions(outcome),
        "Generator": _generator(outcome),
    }
    lines = [f"{label:<10} {text}" for label, text in rows.items() if text]
    return "\n".join([*lines, *(f"\nNote: {note}" for note in notes(outcome))])


def per_second(outcome: Outcome) -> float:
    """Answers a second."""
    return outcome.tally.answered / max(outcome.tally.seconds, 1e-9)


def _offered(outcome: Outcome) -> str:
    plan, tally = outcome.plan, outcome.tally
    if not plan.rate:
        return ""
    delivered = 100 * tally.answered / max(tally.offered, 1)
    return f"   (offered {plan.rate:g}/s, {tally.offered} due, delivered {delivered:.1f}%)"


def non_2xx(outcome: Outcome) -> int:
    """Answers with another status than 2xx or 3xx."""
    return sum(count for status, count in outcome.tally.statuses.items() if not 200 <= status < 400)


def _errors(outcome: Outcome) -> str:
    tally = outcome.tally
    what = "   ".join(f"{name}: {count}" for name, count in tally.errors.most_common())
    bad = "   ".join(
        f"{status}: {count}" for status, count in sorted(tally.statuses.items()) if not 200 <= status < 400
    )
    line = f"{tally.errors.total()}" + (f"   {what}" if what else "")
    line += f"   non-2xx {non_2xx(outcome)}" + (f"   {bad}" if bad else "")
    return line + (f"   closed while idle {tally.closed_idle}" if tally.closed_idle else "")


def _workers(outcome: Outcome) -> str:
    workers = outcome.tally.workers
    if not workers:
        return "unknown (start the server with --expose-worker)"
    each = "  ".join(f"w{name} {workers[name]}" for name in sorted(workers, key=lambda n: (len(n), n)))
    return f"{each}   spread {spread(outcome) * 100:.1f}%"


def spread(outcome: Outcome) -> float:
    """How much more the busiest worker got than the laziest, as a share of the average."""
    counts = outcome.tally.workers.values()
    return (max(counts) - min(counts)) / (sum(counts) / len(counts)) if counts else 0.0


def _sessions(outcome: Outcome) -> str:
    tally = outcome.tally
    if not outcome.plan.sessions:
        return ""
    line = f"{outcome.plan.clients} clients, {tally.increments} increments, {tally.lost} lost"
    return line + (f"   ({tally.uncounted} answers without a count)" if tally.uncounted else "")


def _generator(outcome: Outcome) -> str:
    cpu = outcome.tally.cpu
    used = " ".join(f"{share * 100:.0f}%" for share in cpu)
    verdict = "THE BOTTLENECK" if is_bottleneck(outcome) else "not the bottleneck"
    return f"{len(cpu)} process{'es' if len(cpu) > 1 else ''}, {used} of a CPU each   {verdict}"


def is_bottleneck(outcome: Outcome) -> bool:
    """Whether a process of the generator had no time left."""
    return max(outcome.tally.cpu, default=0.0) >= SATURATED


def notes(outcome: Outcome) -> list[str]:
    """What a reader would otherwise get wrong."""
    plan, tally = outcome.plan, outcome.tally
    found = []
    if outcome.interrupted:
        found.append("interrupted; the figures are of what was done until then.")
    if is_bottleneck(outcome):
        found.append("the generator was busy all the time: the server can do more. Use --cores, or another machine.")
    elif outcome.is_local and outcome.machine_busy >= MACHINE_SATURATED:
        found.append(
            f"all CPUs of this machine were {outcome.machine_busy * 100:.0f}% busy: server and generator compete."
        )
    workers = len(tally.workers)
    closing = plan.keep_alive and tally.connections > plan.clients + tally.closed_idle + tally.errors.total()
    if closing:
        found.append("the server closes connections after a response, so most requests had to connect first.")
    if plan.keep_alive and not closing and workers and plan.clients < workers * 2:
        found.append("a connection stays with its worker; with so few clients some workers get more than others.")
    if plan.rate and tally.offered > tally.answered + tally.errors.total():
        left = tally.offered - tally.answered - tally.errors.total()
        found.append(
            f"{left} requests that were due were never sent: {plan.clients} clients were too few, or it was too slow."
        )
    if plan.sessions and not tally.increments:
        found.append('no answer had a "count": --sessions needs a route like POST /counter of demo_app.')
    return found


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The same for machines; latencies in milliseconds."""
    plan, tally = outcome.plan, outcome.tally
    latency = tally.latency
    return {
        "schema": 1,
        "url": f"{'https' if plan.target.is_tls else 'http'}://{plan.target.authority}{plan.target.path}",
        "method": plan.method,
        "clients": plan.clients,
        "keep_alive": plan.keep_alive,
        "seconds": round(tally.seconds, 4),
        "requests": tally.answered,
        "requests_per_second": round(per_second(outcome), 2),
        "rate": plan.rate or None,
        "offered": tally.offered if plan.rate else None,
        "errors": tally.errors.total(),
        "errors_by_kind": dict(tally.errors),
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "non_2xx": non_2xx(outcome),
        "connections": tally.connections,
        "closed_while_idle": tally.closed_idle,
        "bytes_received": tally.bytes_in,
        "latency_ms": {
            "mean": round(latency.mean, 3),
            **{f"p{p}": round(latency.percentile(p / 100), 3) for p in (50, 75, 90, 95, 99)},
            "p99.9": round(latency.percentile(0.999), 3),
            "max": round(latency.highest / 1000, 3),
        },
        "workers": dict(tally.workers),
        "sessions": {"clients": plan.clients, "increments": tally.increments, "lost": tally.lost}
        if plan.sessions
        else None,
        "generator": {
            "processes": len(tally.cpu),
            "cpu": [round(share, 3) for share in tally.cpu],
            "machine_busy": round(outcome.machine_busy, 3),
            "is_bottleneck": is_bottleneck(outcome),
        },
        "notes": notes(outcome),
    }
