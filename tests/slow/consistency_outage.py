"""Redis is away under load: what each kind of request gets, how long it waits, and that all is as before afterwards.

python -m tests.slow.consistency_outage --seconds 10 --how stop
"""

from gevent import monkey

monkey.patch_all()

import argparse  # noqa: E402 - nothing may be imported before the patch
import json  # noqa: E402
import random  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections import Counter, defaultdict  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402

from tests.cluster_process import Cluster, request  # noqa: E402
from tests.redis_process import RedisProcess, find_redis_server  # noqa: E402

# Connecting and answering have 0.3 and 0.5 s; a command may have to wait for the exchange before its own as well.
# The view with the lock makes two commands. The rest is what a busy machine adds.
LONGEST = 4.0

KINDS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "without state": ("GET", "/plain", None),
    "session read": ("POST", "/session", {}),
    "session write": ("POST", "/session", {"set": {"n": 1}}),
    "cache get": ("POST", "/cache", {"get": ["a", "b"]}),
    "cache set": ("POST", "/cache", {"set": {"a": 1}}),
    "lock": ("POST", "/lock", {"name": "l"}),
}


class Outage:
    """What was answered, by phase and kind."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.phase = "before"
        self.statuses: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
        self.longest: dict[tuple[str, str], float] = defaultdict(float)
        self.cookie = ""
        self.is_over = False

    def ask(self, kind: str) -> None:
        """Send one kind of request again and again."""
        method, path, job = KINDS[kind]
        headers = {"Content-Type": "application/json", "Cookie": f"session={self.cookie}"}
        body = json.dumps(job).encode() if job is not None else None
        while not self.is_over:
            phase, began = self.phase, time.monotonic()
            try:
                status = request(self.port, method, path, body=body, headers=headers, timeout=30).status
            except OSError:
                status = 0
            at = phase, kind
            self.statuses[at][status] += 1
            self.longest[at] = max(self.longest[at], time.monotonic() - began)
            gevent.sleep(random.uniform(0.01, 0.05))


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--how", choices=["kill", "stop"], default="kill", help="the process ends, or stands still")
    options = parser.parse_args()
    redis = RedisProcess(find_redis_server(), "--appendonly", "yes")
    redis.start()
    cluster = Cluster("tests.slow.consistency_app:app", "--workers", "2", "--redis", redis.url).start()
    try:
        outage = Outage(cluster.port)
        answer = cluster.post(
            "/session", body=b'{"set": {"user": "ann"}}', headers={"Content-Type": "application/json"}
        )
        outage.cookie = answer.headers["set-cookie"].split(";")[0].partition("=")[2]
        greenlets = [gevent.spawn(outage.ask, kind) for kind in KINDS for _ in range(4)]
        gevent.sleep(3)
        redis.kill() if options.how == "kill" else redis.signal(signal.SIGSTOP)
        outage.phase = "away"
        gevent.sleep(options.seconds)
        redis.start() if options.how == "kill" else redis.signal(signal.SIGCONT)
        outage.phase = "coming back"
        gevent.sleep(3)
        outage.phase = "after"
        gevent.sleep(3)
        outage.is_over = True
        gevent.joinall(greenlets, timeout=30)
        return report(outage)
    finally:
        cluster.close()
        redis.close()


def report(outage: Outage) -> int:
    """A table, and whether it is what the failure table of docs/state.md says."""
    wrong: list[str] = []
    for phase in ("before", "away", "coming back", "after"):
        for kind in KINDS:
            statuses, longest = outage.statuses[phase, kind], outage.longest[phase, kind]
            told = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
            print(f"{phase:12} {kind:14} longest {longest:5.2f} s   {told}")
            if longest > LONGEST:
                wrong.append(f"{phase}, {kind}: waited {longest:.1f} s")
            allowed = {200} if phase in ("before", "after") or kind in ("without state", "cache get") else {200, 503}
            if set(statuses) - allowed:
                wrong.append(f"{phase}, {kind}: {dict(statuses)}")
    print(f"wrong {len(wrong)}", *wrong, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
