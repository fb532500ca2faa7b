"""The consistency checker: many clients against a real cluster while everything around it breaks.

    python -m tests.slow.consistency --operations 200000

Every operation goes into a history with its times and its outcome: acknowledged, refused, or unknown (the connection
broke, or 503: it may have happened, and may still happen for as long as Redis stands still with the command in its
buffer). The histories are checked against the guarantee table of docs/state.md. A checker that never finds anything
proves nothing: `--guard-off NAME` takes one guard out of the product, and then it must find violations.
"""

from gevent import monkey

monkey.patch_all()

import argparse  # noqa: E402 - nothing may be imported before the patch
import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402

from tests.cluster_process import Cluster  # noqa: E402
from tests.redis_process import RedisProcess, find_redis_server  # noqa: E402
from tests.slow.consistency_app import GUARDS  # noqa: E402

# After an acknowledged write nobody serves the old value for longer: 2.5 s of trust, and what a busy machine may add.
STALE_BOUND = 3.5
# Within this time an operation whose outcome is unknown has either happened or never will.
UNKNOWN_FOR = 20.0


class UnknownOutcome(Exception):  # noqa: N818 - it is not an error of anybody
    """The operation may or may not have happened."""


class Run:
    """One run: what was done, what went wrong, and whether it goes on."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.operations: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.violations: list[str] = []
        self._is_over = False
        self.has_faults = True
        self.serial = itertools.count(1)

    def is_over(self) -> bool:
        """Whether clients are to stop."""
        return self._is_over

    def end(self) -> None:
        """Let clients stop."""
        self._is_over = True

    def violated(self, row: str, text: str) -> None:
        """A guarantee did not hold."""
        if len(self.violations) < 1000:
            self.violations.append(f"{row}: {text}")


class Client:
    """A keep-alive connection and a cookie jar for one cookie."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.cookie = ""
        self._socket: socket.socket | None = None
        self._rest = b""

    def call(self, path: str, job: dict[str, Any], *, cookie: str | None = None, keep: bool = True) -> Any:
        """POST and return the JSON; UnknownOutcome for anything but 200."""
        body = json.dumps(job).encode()
        sent = self.cookie if cookie is None else cookie
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        if sent:
            head += f"Cookie: session={sent}\r\n"
        try:
            status, fields, answer = self._exchange(head.encode() + b"\r\n" + body)
        except (OSError, ValueError):
            self.close()
            raise UnknownOutcome from None
        if status != 200:
            if status >= 500 and status != 503:
                self.run.violated("errors", f"{path} answered {status}: {answer[:200]!r}")
            raise UnknownOutcome
        if keep:
            for name, value in fields:
                if name == b"set-cookie":
                    self.cookie = value.split(b";")[0].partition(b"=")[2].decode()
        return json.loads(answer)

    def _exchange(self, data: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        if self._socket is None or random.random() < 0.02:
            self.close()
            self._socket = socket.create_connection(("127.0.0.1", self.run.port), timeout=15)
            self._rest = b""
        self._socket.sendall(data)
        while b"\r\n\r\n" not in self._rest:
            self._more()
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        fields = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines[1:])]
        length = int(dict(fields)[b"content-length"])
        while len(self._rest) < length:
            self._more()
        answer, self._rest = self._rest[:length], self._rest[length:]
        if dict(fields).get(b"connection") == b"close":
            self.close()
        return int(lines[0].split(b" ")[1]), fields, answer

    def _more(self) -> None:
        assert self._socket is not None
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionResetError
        self._rest += data

    def close(self) -> None:
        """Forget the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


# -- sessions -------------------------------------------------------------------------------------------------------


def sequential_sessions(run: Run) -> None:
    """Read-your-writes and monotonic reads of one client that goes from worker to worker."""
    client = Client(run)
    while not run.is_over():
        client.cookie = ""
        known = 0
        unknown: dict[int, float] = {}
        for number in range(1, 200):
            if run.is_over():
                return
            job = {"set": {"n": number}} if random.random() < 0.5 else {}
            try:
                seen = client.call("/session", job)["seen"].get("n", 0)
            except UnknownOutcome:
                run.unknown["session"] += 1
                if job:
                    unknown[number] = time.monotonic()
                gevent.sleep(random.uniform(0, 0.2))
                continue
            run.operations["session read"] += 1
            if seen != known and seen not in unknown:
                run.violated("session, sequential", f"saw {seen} after {known} (unknown: {sorted(unknown)})")
            if client.cookie == "" and known:
                break
            known = seen
            if job:
                run.operations["session write"] += 1
                known = number
            # What is unknown stays possible for a while: a stalled Redis may run it later than what came after it.
            horizon = time.monotonic() - UNKNOWN_FOR
            unknown = {n: at for n, at in unknown.items() if at > horizon and n != known}


def parallel_sessions(run: Run) -> None:
    """Requests in parallel on one session, each its own key: no acknowledged write is lost."""
    clients = [Client(run) for _ in range(4)]
    while not run.is_over():
        cookie = ""
        try:
            clients[0].cookie = ""
            clients[0].call("/session", {"set": {"start": 1}})
            cookie = clients[0].cookie
            for turn in range(1, 30):
                if run.is_over():
                    return
                cookie = parallel_round(run, clients, cookie, turn)
        except UnknownOutcome:
            run.unknown["session"] += 1
            gevent.sleep(random.uniform(0, 0.3))


def parallel_round(run: Run, clients: list[Client], cookie: str, turn: int) -> str:
    """Write four keys at once, then read until all four are seen."""
    cookies: list[str] = []

    def write(number: int) -> None:
        clients[number].cookie = cookie
        clients[number].call("/session", {"set": {f"k{number}": turn}, "hold": random.uniform(0, 0.003)})
        cookies.append(clients[number].cookie)

    greenlets = [gevent.spawn(write, number) for number in range(len(clients))]
    gevent.joinall(greenlets)
    if not all(greenlet.successful() for greenlet in greenlets):
        raise UnknownOutcome
    run.operations["session write"] += len(clients)
    jar = cookies[-1]
    deadline = time.monotonic() + STALE_BOUND
    while True:
        began = time.monotonic()
        clients[0].cookie = jar
        seen = clients[0].call("/session", {})["seen"]
        jar = clients[0].cookie
        run.operations["session read"] += 1
        missing = [n for n in range(len(clients)) if seen.get(f"k{n}") != turn]
        if not missing:
            return jar
        if began > deadline:
            run.violated("session, parallel", f"keys {missing} of turn {turn} are lost: {seen}")
            raise UnknownOutcome
        gevent.sleep(0.05)


def destroyed_sessions(run: Run) -> None:
    """A late write never brings back a session that was ended, and its cookie leads nowhere for ever."""
    client = Client(run)
    while not run.is_over():
        late = Client(run)  # its request may outlive this turn
        try:
            client.cookie = ""
            client.call("/session", {"set": {"user": "ann"}})
            cookie = client.cookie
            writer = gevent.spawn(late.call, "/session", {"set": {"x": 1}, "hold": 0.02}, cookie=cookie, keep=False)
            gevent.sleep(random.uniform(0, 0.03))
            client.call("/session", {"clear": True})
            run.operations["session end"] += 1
            writer.join()
            gevent.spawn(probe_destroyed, run, cookie)
        except UnknownOutcome:
            run.unknown["session"] += 1
        gevent.sleep(random.uniform(0, 0.1))


def probe_destroyed(run: Run, cookie: str) -> None:
    """Look through an ended session's cookie, again and again, on any worker."""
    client = Client(run)
    gevent.sleep(STALE_BOUND)
    for _ in range(3):
        try:
            seen = client.call("/session", {}, cookie=cookie, keep=False)["seen"]
            run.operations["session probe"] += 1
            if seen:
                run.violated("session, destroyed", f"an ended session shows {seen}")
                break
        except UnknownOutcome:
            run.unknown["session"] += 1
        gevent.sleep(random.uniform(0.1, 1))
    client.close()


# -- cache ----------------------------------------------------------------------------------------------------------


class Register:
    """Keys with one writer each: numbers that only grow, and when each was acknowledged."""

    def __init__(self) -> None:
        self.keys: dict[str, list[tuple[float, int]]] = {}

    def required(self, key: str, began: float) -> int:
        """What a read that began then must at least show."""
        known = self.keys.get(key, [])
        return next((number for at, number in reversed(known) if at < began - STALE_BOUND), 0)

    def note(self, key: str, number: int) -> None:
        """A write was acknowledged now; only what the bound may still ask for is kept."""
        known = self.keys.setdefault(key, [])
        known.append((time.monotonic(), number))
        del known[:-400]


def between_writes() -> float:
    """Bursts, and then nothing for long enough that a value which was left stale is seen to be."""
    return random.uniform(0, 0.05) if random.random() < 0.9 else STALE_BOUND + 1.5


def rarely() -> float:
    """So seldom that a key is often not read while a worker's ear is away: a read then would drop what is stale."""
    return random.uniform(STALE_BOUND + 1, STALE_BOUND + 3)


def cache_writer(run: Run, register: Register, name: str, pause: Callable[[], float] = between_writes) -> None:
    """Set a key to growing numbers; after an unknown outcome the key is given up, another one takes its place."""
    client = Client(run)
    for generation in itertools.count():
        key = f"{name}.{generation}"
        register.keys[key] = []
        try:
            for number in itertools.count(1):
                if run.is_over():
                    return
                client.call("/cache", {"set": {key: number}})
                run.operations["cache set"] += 1
                register.note(key, number)
                gevent.sleep(pause())
        except UnknownOutcome:
            run.unknown["cache"] += 1
            register.keys.pop(key)
            gevent.sleep(random.uniform(0, 0.3))


def cache_reader(run: Run, register: Register, at_once: int = 12, pause: float = 0.01) -> None:
    """Read keys and see that nothing is older than the bound allows."""
    client = Client(run)
    while not run.is_over():
        keys = random.sample(sorted(register.keys), min(at_once, len(register.keys)))
        began = time.monotonic()
        try:
            values = client.call("/cache", {"get": keys})["values"]
        except UnknownOutcome:
            run.unknown["cache"] += 1
            gevent.sleep(random.uniform(0, 0.2))
            continue
        for key, value in values.items():
            run.operations["cache get"] += 1
            if value is not None and value < register.required(key, began):
                run.violated("cache", f"{key} is {value}, {register.required(key, began)} was acknowledged before")
        gevent.sleep(random.uniform(0, pause))


def row_writer(run: Run, register: Register, name: str) -> None:
    """Change a row and delete what was computed from it, repeating until it is acknowledged."""
    client = Client(run)
    while not run.is_over():
        once = f"{name}-{next(run.serial)}"
        while not run.is_over():
            try:
                number = client.call("/row", {"bump": name, "once": once})["number"]
            except UnknownOutcome:
                run.unknown["row"] += 1
                gevent.sleep(random.uniform(0, 0.2))
                continue
            run.operations["row change"] += 1
            register.note(name, number)
            break
        gevent.sleep(between_writes())


def row_reader(run: Run, register: Register) -> None:
    """Read computed values: none may come from before a deletion."""
    client = Client(run)
    while not run.is_over():
        keys = random.sample(sorted(register.keys), min(4, len(register.keys)))
        began = time.monotonic()
        try:
            values = client.call("/row", {"get": keys})["values"]
        except UnknownOutcome:
            run.unknown["row"] += 1
            gevent.sleep(random.uniform(0, 0.2))
            continue
        for key, value in values.items():
            run.operations["row read"] += 1
            if value < register.required(key, began):
                run.violated("cache, computed", f"{key} is {value}, {register.required(key, began)} was acknowledged")


# -- dict, locks ----------------------------------------------------------------------------------------------------


def dict_counter(run: Run, name: str, won: list[int], unknown: list[int]) -> None:
    """Count with compare_and_set."""
    client = Client(run)
    while not run.is_over():
        try:
            answer = client.call("/dict", {"name": name})
            run.operations["dict compare"] += 1
            if answer["ok"]:
                won.append(answer["seen"])
        except UnknownOutcome:
            run.unknown["dict"] += 1
            unknown.append(1)
            gevent.sleep(random.uniform(0, 0.2))
        gevent.sleep(random.uniform(0, 0.02))


def check_dict(run: Run, name: str, won: list[int]) -> None:
    """Nobody may win the same step twice."""
    twice = [step for step, count in Counter(won).items() if count > 1]
    if twice:
        run.violated("dict", f"{name}: steps {twice[:5]} were won twice")


def lock_user(run: Run, name: str, sections: list[tuple[float, float, int]]) -> None:
    """Enter a critical section."""
    client = Client(run)
    while not run.is_over():
        try:
            answer = client.call("/lock", {"name": name})
            if answer["kept"]:
                run.operations["lock section"] += 1
                sections.append((answer["began"], answer["ended"], answer["fence"]))
            elif answer["fence"] and not run.has_faults:
                run.violated("lock", f"{name}: lost although nothing had happened")
        except UnknownOutcome:
            run.unknown["lock"] += 1
            gevent.sleep(random.uniform(0, 0.2))
        gevent.sleep(random.uniform(0, 0.02))


def check_lock(run: Run, name: str, sections: list[tuple[float, float, int]]) -> None:
    """Sections that were kept to the end do not overlap, and their fences grow."""
    sections.sort()
    for one, two in itertools.pairwise(sections):
        if two[0] < one[1]:
            run.violated("lock", f"{name}: two holders at once, fences {one[2]} and {two[2]}")
        if two[2] <= one[2]:
            run.violated("lock", f"{name}: fence {two[2]} after {one[2]}")


# -- channels -------------------------------------------------------------------------------------------------------


def publisher(run: Run, channel: str, sent: dict[str, int]) -> None:
    """Publish numbers; what is acknowledged has a position."""
    client = Client(run)
    for number in itertools.count(1):
        if run.is_over():
            return
        try:
            sent[client.call("/publish", {"channel": channel, "data": number})["position"]] = number
            run.operations["publish"] += 1
        except UnknownOutcome:
            run.unknown["publish"] += 1
            gevent.sleep(random.uniform(0, 0.2))
        gevent.sleep(random.uniform(0, 0.02))


def listener(run: Run, channel: str, heard: list[tuple[str, str]]) -> None:
    """An EventSource: reads events, comes back with Last-Event-ID, is cut off now and then."""
    last = ""
    while not run.is_over():
        head = (
            f"GET /events/{channel} HTTP/1.0\r\nHost: x\r\n" + (f"Last-Event-ID: {last}\r\n" if last else "") + "\r\n"
        )
        try:
            with socket.create_connection(("127.0.0.1", run.port), timeout=20) as connection:
                connection.sendall(head.encode())
                reader = connection.makefile("rb")
                if b" 200 " not in reader.readline():
                    gevent.sleep(0.1)
                    continue
                while reader.readline().strip():
                    pass
                last = read_events(run, reader, last, heard, random.randint(5, 400))
        except OSError:
            pass
        gevent.sleep(random.uniform(0, 0.1))


def read_events(run: Run, reader: Any, last: str, heard: list[tuple[str, str]], limit: int) -> str:
    """Read until the stream ends, the run is over, or we have had enough; returns the last id."""
    event: dict[str, str] = {}
    while not run.is_over() and limit:
        line = reader.readline().decode()
        if not line:
            break
        line = line.rstrip("\n")
        if line:
            name, _, value = line.partition(": ")
            event[name] = value
            continue
        last = event.get("id", last)
        if "data" in event:
            heard.append((event.get("id", ""), "reset" if event.get("event") == "reset" else event["data"]))
            run.operations["message"] += 1
            limit -= 1
        event = {}
    return last


def check_channel(run: Run, channel: str, sent: dict[str, int], heard: list[tuple[str, str]]) -> None:
    """In order, nothing twice, nothing left out between the first and the last, and what was acknowledged is there."""
    if any(data == "reset" for _, data in heard):
        run.violated("broadcast", f"{channel}: a reset although history reaches back")
        return
    offsets = [int(identity.rpartition(".")[2]) for identity, _ in heard]
    for one, two in itertools.pairwise(offsets):
        if two != one + 1:
            run.violated("broadcast", f"{channel}: {two} after {one}")
    for identity, data in heard:
        if identity in sent and str(sent[identity]) != data:
            run.violated("broadcast", f"{channel}: {identity} is {data}, {sent[identity]} was sent")


# -- faults ---------------------------------------------------------------------------------------------------------


class World:
    """Redis, the link to it, and the cluster; and what can happen to them."""

    def __init__(self, workers: int, environ: dict[str, str]) -> None:
        # What Redis has acknowledged survives its death: else no store over it could keep its word.
        options = ("--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0")
        self.redis = RedisProcess(find_redis_server(), *options)
        self.redis.start()
        command = [sys.executable, "-m", "tests.slow.consistency_link", str(self.redis.port)]
        self.link = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.link.stdout is not None
        url = f"redis://127.0.0.1:{int(self.link.stdout.readline())}/0"
        app = "tests.slow.consistency_app:app"
        self.cluster = Cluster(app, "--workers", str(workers), "--redis", url, env=environ).start()

    def close(self) -> None:
        """End everything."""
        self.cluster.close()
        self.link.kill()
        self.link.wait()
        for pipe in (self.link.stdin, self.link.stdout):
            if pipe is not None:
                pipe.close()
        self.redis.close()

    def tell_link(self, text: str) -> None:
        """Change what the link does."""
        assert self.link.stdin is not None
        self.link.stdin.write(text.encode() + b"\n")
        self.link.stdin.flush()

    def any_worker(self) -> int:
        """The pid of a worker that is there."""
        return int(random.choice([w for w in self.cluster.workers() if w["pid"]])["pid"])

    def kill_worker(self) -> None:
        """kill -9."""
        os.kill(self.any_worker(), signal.SIGKILL)

    def pause_worker(self) -> None:
        """A worker stands still for longer than near copies may be trusted."""
        pid = self.any_worker()
        os.kill(pid, signal.SIGSTOP)
        gevent.sleep(random.uniform(0.5, 4.0))
        os.kill(pid, signal.SIGCONT)

    def reload(self) -> None:
        """A rolling reload."""
        self.cluster.signal(signal.SIGHUP)

    def restart_redis(self) -> None:
        """Redis dies and comes back with what it had acknowledged."""
        self.redis.kill()
        gevent.sleep(random.uniform(0, 1.5))
        self.redis.start()

    def stop_redis(self) -> None:
        """Redis stands still."""
        self.redis.signal(signal.SIGSTOP)
        gevent.sleep(random.uniform(0.3, 4.0))
        self.redis.signal(signal.SIGCONT)

    def pause_clients(self) -> None:
        """CLIENT PAUSE."""
        with socket.create_connection(("127.0.0.1", self.redis.port), timeout=5) as connection:
            connection.sendall(b"CLIENT PAUSE %d\r\n" % random.randint(100, 3000))
            connection.recv(100)
        gevent.sleep(2)

    def kill_subscribers(self) -> None:
        """Workers cannot listen for a while, but can write: what is published meanwhile is missed."""
        with socket.create_connection(("127.0.0.1", self.redis.port), timeout=5) as connection:
            for _ in range(15):
                connection.sendall(b"CLIENT KILL TYPE pubsub\r\n")
                connection.recv(100)
                gevent.sleep(0.1)

    def cut_links(self) -> None:
        """All connections to Redis break at once."""
        self.tell_link("cut")

    def black_hole(self) -> None:
        """Everything between workers and Redis is swallowed while TCP stays up; then those connections are gone."""
        self.tell_link("black hole")
        gevent.sleep(random.uniform(0.5, 5.0))
        self.tell_link("cut")
        self.tell_link("forward")


FAULTS: dict[str, Callable[[World], None]] = {
    "kill worker": World.kill_worker,
    "pause worker": World.pause_worker,
    "reload": World.reload,
    "restart redis": World.restart_redis,
    "stop redis": World.stop_redis,
    "pause clients": World.pause_clients,
    "kill subscribers": World.kill_subscribers,
    "cut links": World.cut_links,
    "black hole": World.black_hole,
}


def break_things(run: Run, world: World, names: list[str], pause: float) -> None:
    """One fault after another, with room between them to recover."""
    order = itertools.cycle(random.sample(names, len(names)))
    while not run.is_over():
        gevent.sleep(random.uniform(0.5, 1.5) * pause)
        name = next(order)
        if run.is_over():
            return
        try:
            FAULTS[name](world)
            run.faults[name] += 1
        except (OSError, AssertionError, RuntimeError) as error:  # a worker that has just gone, a primary that reloads
            run.faults[f"{name}: not possible ({type(error).__name__})"] += 1


# -- the run --------------------------------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> Run:
    """Run everything and check the histories."""
    environ = {"CONSISTENCY_CHAOS": "1", "CONSISTENCY_GUARD_OFF": options.guard_off or ""}
    if options.lose:
        environ["CONSISTENCY_LOSE"] = str(options.lose)
    world = World(options.workers, environ)
    run = Run(world.cluster.port)
    cached, quiet, rows = Register(), Register(), Register()
    steps: dict[str, tuple[list[int], list[int]]] = {f"d{n}": ([], []) for n in range(2)}
    sections: dict[str, list[tuple[float, float, int]]] = {f"l{n}": [] for n in range(2)}
    sent: dict[str, dict[str, int]] = {f"c{n}": {} for n in range(2)}
    heard: dict[str, list[list[tuple[str, str]]]] = {name: [[] for _ in range(5)] for name in sent}
    tasks: list[tuple[Any, ...]] = [(sequential_sessions, run)] * (24 if options.lose else 12)
    if not options.lose:
        tasks += [(parallel_sessions, run)] * 4 + [(destroyed_sessions, run)] * 3
        tasks += [(cache_writer, run, cached, f"k{n}") for n in range(16)] + [(cache_reader, run, cached)] * 8
        tasks += [(cache_writer, run, quiet, f"q{n}", rarely) for n in range(60)]
        tasks += [(cache_reader, run, quiet, 3, 0.1)] * 2
        tasks += [(row_writer, run, rows, f"r{n}") for n in range(12)] + [(row_reader, run, rows)] * 6
        tasks += [(dict_counter, run, name, *steps[name]) for name in steps for _ in range(3)]
        tasks += [(lock_user, run, name, sections[name]) for name in sections for _ in range(3)]
        tasks += [(publisher, run, name, sent[name]) for name in sent]
        tasks += [(listener, run, name, each) for name in sent for each in heard[name]]
    greenlets = [gevent.spawn(*task) for task in tasks]
    names = [name for name in (options.faults or list(FAULTS)) if name != "none"]
    run.has_faults = bool(names)
    if names:
        greenlets.append(gevent.spawn(break_things, run, world, names, options.pause))
    try:
        wait_for_operations(run, options, names)
        gevent.sleep(0.1)
        run.end()
        gevent.joinall(greenlets, timeout=30)
        for greenlet in greenlets:
            if greenlet.exception is not None and not isinstance(greenlet.exception, UnknownOutcome):
                run.violated("checker", repr(greenlet.exception))
        for name, (won, _) in steps.items():
            check_dict(run, name, won)
        for name, each in sections.items():
            check_lock(run, name, each)
        for name, lists in heard.items():
            for list_ in lists:
                check_channel(run, name, sent[name], list_)
    finally:
        if options.keep_log:
            print(world.cluster.output()[-4000:])
        world.close()
    return run


def wait_for_operations(run: Run, options: argparse.Namespace, faults: list[str]) -> None:
    """Until enough was done and each of the faults has happened, or (with a guard off) enough was found."""
    began = told = time.monotonic()

    def is_enough() -> bool:
        return run.operations.total() >= options.operations and all(run.faults[name] for name in faults)

    while not is_enough() and time.monotonic() - began < options.seconds:
        gevent.sleep(0.1)
        if options.guard_off and len(run.violations) >= 3:
            return
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"  {run.operations.total()} operations, {len(run.violations)} violations", flush=True)


def report(run: Run, seconds: float) -> None:
    """What was done, what was broken, what was found."""
    print(f"operations  {run.operations.total()} in {seconds:.0f} s")
    for name, count in sorted(run.operations.items()):
        print(f"  {name:16} {count}")
    print(f"unknown     {run.unknown.total()}  " + ", ".join(f"{k} {v}" for k, v in sorted(run.unknown.items())))
    print(f"faults      {run.faults.total()}  " + ", ".join(f"{k} {v}" for k, v in sorted(run.faults.items())))
    print(f"violations  {len(run.violations)}")
    for text in run.violations[:20]:
        print(f"  {text}")


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--operations", type=int, default=200_000, help="stop after this many, and all faults")
    parser.add_argument("--seconds", type=float, default=1200, help="or after this time")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--faults", nargs="*", choices=[*FAULTS, "none"], help="default: all")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two faults, more or less")
    parser.add_argument("--guard-off", choices=sorted(GUARDS))
    parser.add_argument("--lose", type=float, default=0.0, help="share of session invalidations that go unheard")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--keep-log", action="store_true")
    options = parser.parse_args()
    gevent.get_hub().NOT_ERROR += (UnknownOutcome,)  # not worth a traceback: it is what is being counted
    random.seed(options.seed)
    began = time.monotonic()
    run = check(options)
    report(run, time.monotonic() - began)
    return 1 if run.violations else 0


if __name__ == "__main__":
    sys.exit(main())
