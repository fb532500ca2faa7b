"""How fast one publisher is heard by many SSE clients on several workers, one of which is killed on the way.

python -m tests.slow.consistency_fan_out --workers 4 --clients 400 --messages 2000
"""

from gevent import monkey

monkey.patch_all()

import argparse  # noqa: E402 - nothing may be imported before the patch
import os  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from contextlib import suppress  # noqa: E402

import gevent  # noqa: E402

from tests.cluster_process import Cluster  # noqa: E402
from tests.redis_process import RedisProcess, find_redis_server  # noqa: E402
from tests.slow.consistency import Client, Run, UnknownOutcome  # noqa: E402

CHANNEL = "fan"


class Listener:
    """One EventSource: what it heard, when, and how often it had to come back."""

    def __init__(self) -> None:
        self.last = ""
        self.numbers: list[int] = []
        self.latencies: list[float] = []
        self.connections = 0
        self.is_listening = False

    def run(self, run: Run) -> None:
        """Listen until the run is over, coming back with Last-Event-ID."""
        while not run.is_over():
            with suppress(OSError):
                self._listen(run)
            self.is_listening = False
            gevent.sleep(0.1)

    def _listen(self, run: Run) -> None:
        resume = f"Last-Event-ID: {self.last}\r\n" if self.last else ""
        with socket.create_connection(("127.0.0.1", run.port), timeout=60) as connection:
            connection.sendall(f"GET /events/{CHANNEL} HTTP/1.0\r\nHost: x\r\n{resume}\r\n".encode())
            reader = connection.makefile("rb")
            self.connections += 1
            while line := reader.readline():
                name, _, value = line.rstrip(b"\n").partition(b": ")
                if name == b"retry":
                    self.is_listening = True
                elif name == b"id":
                    self.last = value.decode()
                elif name == b"event":
                    run.violated("fan out", f"a client was told: {value.decode()}")
                elif name == b"data" and b" " in value:
                    number, _, sent_at = value.partition(b" ")
                    self.numbers.append(int(number))
                    self.latencies.append(time.monotonic() - float(sent_at))


def publish(run: Run, messages: int, rate: float) -> tuple[int, float]:
    """Publish numbered messages at most so many per second; an unknown outcome ends the count with a violation."""
    client, began = Client(run), time.monotonic()
    for number in range(messages):
        gevent.sleep(max(0.0, began + number / rate - time.monotonic()))
        for _ in range(20):
            try:
                # The token makes it harmless to repeat what the killed worker may have done.
                job = {"channel": CHANNEL, "data": f"{number} {time.monotonic()}", "once": str(number)}
                client.call("/publish", job)
                break
            except UnknownOutcome:
                gevent.sleep(0.05)
        else:
            run.violated("fan out", f"message {number} could not be published")
    return messages, time.monotonic() - began


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=400)
    parser.add_argument("--messages", type=int, default=500)
    parser.add_argument("--rate", type=float, default=50.0)
    options = parser.parse_args()
    redis = RedisProcess(find_redis_server())
    redis.start()
    cluster = Cluster(
        "tests.slow.consistency_app:app", "--workers", str(options.workers), "--redis", redis.url
    ).start()
    try:
        run = Run(cluster.port)
        listeners = [Listener() for _ in range(options.clients)]
        greenlets = [gevent.spawn(each.run, run) for each in listeners]
        while not all(each.is_listening for each in listeners):
            gevent.sleep(0.05)
        victim = cluster.workers()[0]["pid"]
        gevent.spawn_later(options.messages / options.rate / 2, os.kill, victim, signal.SIGKILL)
        count, seconds = publish(run, options.messages, options.rate)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and any(len(each.numbers) < count for each in listeners):
            gevent.sleep(0.1)
        run.end()
        gevent.killall(greenlets, block=False)
        report(run, listeners, count, seconds)
    finally:
        cluster.close()
        redis.close()
    return 1 if run.violations else 0


def report(run: Run, listeners: list[Listener], count: int, seconds: float) -> None:
    """Rates, latencies, and whether everybody heard everything once and in order."""
    latencies = sorted(latency for each in listeners for latency in each.latencies)
    for each in listeners:
        if each.numbers != list(range(count)):
            missing = sorted(set(range(count)) - set(each.numbers))
            run.violated("fan out", f"a client heard {len(each.numbers)} of {count}, missing {missing[:5]}")
    cut = sum(each.connections > 1 for each in listeners)
    print(
        f"{count} messages to {len(listeners)} clients in {seconds:.1f} s: {len(latencies) / seconds:.0f} deliveries/s"
    )
    print(f"latency median {statistics.median(latencies) * 1000:.1f} ms, ", end="")
    print(f"p99 {latencies[int(len(latencies) * 0.99)] * 1000:.1f} ms, max {latencies[-1] * 1000:.0f} ms")
    print(f"clients that came back after the kill {cut}, violations {len(run.violations)}")
    for text in run.violations[:10]:
        print(f"  {text}")


if __name__ == "__main__":
    sys.exit(main())
