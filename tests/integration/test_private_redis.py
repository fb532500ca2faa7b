"""The private Redis against everything that ends a cluster, and the questions put to a Redis of somebody else.

The starter is a program of its own that stands for the primary: it starts the server and forks a stand-in worker,
which does nothing but live, as one that finishes a long request.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from sharedcluster.errors import RedisNeededError
from sharedcluster.redis_server import PrivateRedis, RedisChoice, choose, probe
from sharedcluster.redis_server.address import parse
from sharedcluster.redis_server.interview import ping
from tests.redis_process import RedisProcess, find_redis_server, free_port
from tests.waiting import wait_until

STARTER = """
import json, os, select, signal, socket, sys
from sharedcluster.redis_server import PrivateRedis, choose

listener = socket.create_server(("127.0.0.1", 0))
redis = PrivateRedis(choose(sys.argv[1], os.environ))
url = redis.start()
worker = os.fork()
if worker == 0:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener.close()
    if program := os.environ.get("LEAVE_BEHIND"):
        os.posix_spawnp(program, [program, "600"], os.environ)
    signal.pause()
facts = dict(url=url, folder=redis.folder, keeper=redis.keeper_pid, worker=worker, port=listener.getsockname()[1])
facts["modules"] = sorted(sys.modules)
print(json.dumps(facts), flush=True)
for line in sys.stdin:
    match line.strip():
        case "stop":
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
            print(json.dumps(redis.stop()), flush=True)
        case "revive":
            os.waitpid(redis.keeper_pid, 0)
            print(json.dumps(redis.is_alive()), flush=True)
            redis.revive()
            print(json.dumps(redis.is_alive()), flush=True)
"""


def is_alive(process: psutil.Process) -> bool:
    """True while the process runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Starter:
    """The stand-in for a primary, and what it said."""

    def __init__(self, setting: str, environ: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER, setting],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environ,
            start_new_session=True,
        )
        self.facts: dict[str, Any] = self.hear()
        self.url: str = self.facts["url"]
        self.folder = Path(self.facts["folder"])
        self.keeper = psutil.Process(self.facts["keeper"])
        self.worker = psutil.Process(self.facts["worker"])

    def hear(self) -> Any:
        """The next line it prints."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise AssertionError(self.process.communicate()[1])

    def say(self, word: str) -> None:
        """Give it a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """End the starter as `kill -9` of a primary does."""
        self.process.kill()
        self.process.wait()

    @property
    def server(self) -> psutil.Process:
        """The server, the keeper's only child."""
        [server] = self.keeper.children()
        return server

    def answers(self) -> bool:
        """True if the server can be reached by its URL."""
        return ping(parse(self.url), 1.0)

    def is_gone(self) -> bool:
        """True when neither process nor folder is left."""
        return not self.folder.exists() and not is_alive(self.keeper)

    def close(self) -> None:
        """Leave nothing behind, whatever the test did."""
        self.kill()
        if self.worker.is_running():
            self.worker.kill()
        wait_until(self.is_gone, "the private Redis is gone")
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


StartFunction = Callable[..., Starter]


@pytest.fixture
def start() -> Iterator[StartFunction]:
    """Start a starter, with a real server unless the test says otherwise."""
    starters: list[Starter] = []

    def start_one(setting: str = "auto", **environ: str) -> Starter:
        if setting == "auto":
            find_redis_server()
        starters.append(Starter(setting, {"REDIS_URL": ""} | environ))
        return starters[-1]

    yield start_one
    for starter in starters:
        starter.close()


@pytest.mark.parametrize("setting", ["auto", "memory://"])
def test_it_is_private(start: StartFunction, setting: str) -> None:
    """A socket in a folder that only its user may enter, no TCP port, and a URL that leads to it."""
    starter = start(setting)
    assert starter.answers()
    assert stat.S_IMODE(starter.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((starter.folder / "redis.sock").stat().st_mode) == 0o700
    assert starter.server.net_connections("inet") == []
    assert starter.facts["url"].startswith("unix:///")


def test_the_primary_stays_small(start: StartFunction) -> None:
    """Nothing the primary must not import came in with the module that starts the server."""
    modules = {name.partition(".")[0] for name in start().facts["modules"]}
    assert not modules & {"redis", "gevent", "flask", "ssl", "fakeredis", "ctypes", "subprocess", "multiprocessing"}


def test_it_outlives_a_killed_primary_and_goes_with_the_last_worker(start: StartFunction) -> None:
    """`kill -9` of the primary leaves the session store to the worker that still finishes a request; then it goes."""
    starter = start()
    server = starter.server
    starter.kill()
    assert starter.answers()
    assert is_alive(server)
    starter.worker.kill()
    wait_until(starter.is_gone, "keeper and folder are gone")
    assert not is_alive(server)


def test_it_holds_no_port_open(start: StartFunction) -> None:
    """The keeper closes the listeners it inherited: the port is free after the primary."""
    starter = start()
    starter.kill()

    def can_be_bound() -> bool:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", starter.facts["port"]))
            return True

    wait_until(can_be_bound, "the worker has closed its copy, and the port is free")
    assert is_alive(starter.keeper)


def test_stop_ends_it_at_once(start: StartFunction) -> None:
    """After the last worker was reaped, `stop` returns when server, folder and keeper are gone."""
    starter = start()
    starter.say("stop")
    assert starter.hear() is True
    assert starter.is_gone()


def test_signals_of_the_cluster_do_not_reach_it(start: StartFunction) -> None:
    """Ctrl+C in the terminal, and a TERM to every process of a cgroup, leave the state where it is."""
    starter = start()
    server = starter.server
    assert os.getpgid(starter.keeper.pid) != os.getpgid(starter.process.pid)
    os.killpg(starter.process.pid, signal.SIGINT)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        starter.keeper.send_signal(number)
        server.send_signal(number)
    starter.process.wait()
    assert starter.answers()
    assert starter.server == server


def test_a_crashed_server_is_started_again_on_the_same_socket(start: StartFunction) -> None:
    """The workers' URL stays good, and the log says that what was stored is gone."""
    starter = start()
    crashed = starter.server
    crashed.kill()
    wait_until(lambda: not is_alive(crashed) and starter.answers(), "the new server answers")
    assert starter.server.pid != crashed.pid
    starter.kill()
    starter.worker.kill()
    assert starter.process.stderr is not None
    said = starter.process.stderr.read()  # ends when the keeper, who holds it too, is gone
    assert "killed by signal 9" in said
    assert "are gone" in said


def test_a_server_that_cannot_be_started_again_is_tried_again(start: StartFunction, tmp_path: Path) -> None:
    """As long as the cluster lives the keeper tries, at growing intervals, and tells why it does not work."""
    program, broken = tmp_path / "redis-server", tmp_path / "broken"
    program.write_text(
        f'#!/bin/sh\n[ -e {broken} ] && echo "out of order" && exit 1\nexec {find_redis_server()} "$@"\n'
    )
    program.chmod(0o755)
    starter = start(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert starter.answers()
    broken.touch()
    starter.server.kill()
    assert starter.process.stderr is not None
    said = [starter.process.stderr.readline() for _ in range(2)]
    assert all("out of order" in line for line in said)
    broken.unlink()
    wait_until(starter.answers, "the server is back")


def test_a_killed_keeper_takes_the_server_along_and_is_replaced(start: StartFunction) -> None:
    """No server without a keeper; the primary that reaps it gets both back on the same socket."""
    starter = start()
    server, keeper = starter.server, starter.keeper
    keeper.kill()
    wait_until(lambda: not is_alive(server), "the server went along")
    starter.say("revive")
    assert starter.hear() is False
    assert starter.hear() is True
    wait_until(starter.answers, "the new server answers")
    [starter.keeper] = [child for child in psutil.Process(starter.process.pid).children() if child != starter.worker]


def test_the_folder_of_a_cluster_that_was_killed_whole_is_swept(start: StartFunction) -> None:
    """`kill -9` of every process at once leaves a folder; the next start removes it, and no folder of a living one."""
    dead, living = start(), start()
    for process in (dead.keeper, dead.worker, psutil.Process(dead.process.pid)):
        process.kill()
    dead.process.wait()
    wait_until(lambda: not is_alive(dead.keeper), "all are dead")
    assert dead.folder.exists()
    start()
    assert not dead.folder.exists()
    assert living.answers()


def test_a_program_of_the_app_does_not_hold_the_lifeline(start: StartFunction) -> None:
    """What a worker executes and leaves behind (a daemon, say) does not keep the server alive."""
    starter = start(LEAVE_BEHIND="sleep")
    [daemon] = wait_until(starter.worker.children, "the worker started its program")
    starter.kill()
    starter.worker.kill()
    wait_until(starter.is_gone, "keeper and folder are gone")
    assert is_alive(daemon)
    daemon.kill()


def test_fakeredis_runs_the_scripts_of_two_processes(start: StartFunction) -> None:
    """The development server is one state for all connections, with Lua and pub/sub, and survives an error reply."""
    url = start("memory://").url
    with redis.Redis.from_url(url, single_connection_client=True) as one, redis.Redis.from_url(url) as other:
        number = one.client_id()
        with pytest.raises(redis.exceptions.NoScriptError):
            one.evalsha("0" * 40, 0)
        assert one.client_id() == number
        one.set("key", "value")
        assert other.eval("return redis.call('GET', KEYS[1])", 1, "key") == b"value"
        with other.pubsub(ignore_subscribe_messages=True) as subscriber:
            subscriber.subscribe("channel")
            subscriber.get_message(timeout=5)
            one.publish("channel", "hello")
            message = wait_until(lambda: subscriber.get_message(timeout=1), "the message arrives")
            assert message["data"] == b"hello"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("#!/bin/sh\necho 'no memory today' >&2\nexit 1\n", "no memory today"),
        ("not a program", "cannot be executed"),
    ],
)
def test_a_server_that_does_not_start_says_why(tmp_path: Path, program: str, words: str) -> None:
    """The error carries the last lines of its log, and nothing is left behind."""
    path = tmp_path / "redis-server"
    path.write_text(program)
    path.chmod(0o755)
    private = PrivateRedis(RedisChoice("server", program=str(path)))
    with pytest.raises(RedisNeededError, match=words):
        private.start()
    assert not os.path.exists(private.folder)


def test_a_server_that_hangs_at_the_start_is_given_up(tmp_path: Path) -> None:
    """A server that never answers ends the start at its deadline, and is killed."""
    path = tmp_path / "redis-server"
    path.write_text("#!/bin/sh\nexec sleep 600\n")
    path.chmod(0o755)
    private = PrivateRedis(RedisChoice("server", program=str(path)), start_timeout=0.3)
    with pytest.raises(RedisNeededError, match="did not start"):
        private.start()
    assert [child for child in psutil.Process().children() if child.name() == "sleep"] == []


def test_a_long_runtime_folder_is_passed_over(start: StartFunction, tmp_path: Path) -> None:
    """A socket's path has about 100 bytes; a longer XDG_RUNTIME_DIR is left for /tmp."""
    long = tmp_path / ("x" * 90)
    long.mkdir()
    starter = start(XDG_RUNTIME_DIR=str(long), TMPDIR="")
    assert starter.answers()
    assert starter.folder.parent == Path("/tmp")


# --- the questions put to a Redis of somebody else ---


@pytest.fixture
def server() -> Iterator[Callable[..., RedisProcess]]:
    """Start real servers with options."""
    servers: list[RedisProcess] = []

    def start_one(*options: str) -> RedisProcess:
        servers.append(RedisProcess(find_redis_server(), *options))
        servers[-1].start()
        return servers[-1]

    yield start_one
    for one in servers:
        one.close()


def complaint(url: str, timeout: float = 3.0) -> str:
    """The whole text of the error `probe` raises."""
    with pytest.raises(RedisNeededError) as caught:
        probe(url, timeout)
    return str(caught.value)


def test_probe_reports_what_it_found(redis_url: str) -> None:
    """Product, version and the time of one round trip, for the start-up line."""
    facts = probe(redis_url)
    assert facts.product in ("Redis", "Valkey")
    assert facts.version[0].isdigit()
    assert 0 < facts.latency < 3
    assert facts.warnings == ()


def test_probe_of_a_server_with_a_password(server: Callable[..., RedisProcess]) -> None:
    """None, a wrong one, a needless one and the right one; none of them is printed."""
    guarded, open_one = server("--requirepass", "s3cret"), server()
    place = f"127.0.0.1:{guarded.port}/0"
    assert "wants a password" in complaint(f"redis://{place}")
    wrong = complaint(f"redis://:wr0ng@{place}")
    assert "does not accept" in wrong
    assert "wr0ng" not in wrong
    needless = complaint(f"redis://:needle55@127.0.0.1:{open_one.port}/0")
    assert "has no password" in needless
    assert "needle55" not in needless
    facts = probe(f"redis://:s3cret@{place}")
    assert "s3cret" not in repr(facts)


def test_probe_of_a_replica(server: Callable[..., RedisProcess]) -> None:
    """A read-only replica is refused at the start, not at the first login."""
    primary = server()
    replica = server("--replicaof", f"127.0.0.1 {primary.port}", "--repl-diskless-sync-delay", "0")
    wait_until(lambda: "read-only replica" in complaint(replica.url), "the replica is up")
    primary.kill()
    with redis.Redis.from_url(replica.url) as client:
        client.config_set("replica-serve-stale-data", "no")
    wait_until(lambda: "lost its primary" in complaint(replica.url), "the replica noticed")


def test_probe_of_servers_that_refuse_writes(server: Callable[..., RedisProcess]) -> None:
    """A full memory and missing replicas are found by the one write, each with its own words."""
    full = server("--maxmemory", "1", "--maxmemory-policy", "noeviction")
    assert "memory is full" in complaint(full.url)
    lonely = server("--min-replicas-to-write", "1")
    assert "too few of its replicas" in complaint(lonely.url)


def test_probe_of_a_server_that_cannot_save(server: Callable[..., RedisProcess]) -> None:
    """MISCONF: a server whose snapshots fail refuses writes."""
    broken = server()
    with redis.Redis.from_url(broken.url) as client:
        client.config_set("save", "3600 1")
        (broken.folder / "dump.rdb").mkdir()  # the snapshot cannot replace it
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "the snapshot failed")
    assert "cannot save its snapshots" in complaint(broken.url)


def test_probe_warns_of_a_policy_that_removes_sessions(server: Callable[..., RedisProcess]) -> None:
    """allkeys-* under a memory limit would log people out; volatile-* and no limit pass without a word."""
    [warning] = probe(server("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru").url).warnings
    assert "allkeys-lru" in warning
    assert probe(server("--maxmemory", "64mb", "--maxmemory-policy", "volatile-ttl").url).warnings == ()


def test_probe_of_a_user_with_narrow_rights(server: Callable[..., RedisProcess]) -> None:
    """A user who may write the application's keys only is let through, with a word about the untried write."""
    narrow = server(*["--user", "app", "on", ">pw", "~app:*", "&*", "+@all", "-@admin", "-@dangerous"])
    [warning] = probe(f"redis://app:pw@127.0.0.1:{narrow.port}/0").warnings
    assert "writing was not tried" in warning
    nothing = server(*["--user", "app", "on", ">pw", "~*", "&*", "-@all", "+auth"])
    assert "does not let this user" in complaint(f"redis://app:pw@127.0.0.1:{nothing.port}/0")


def test_probe_of_a_database_that_is_not_there(redis_url: str) -> None:
    """The number at the end of the URL is checked."""
    assert "no such database" in complaint(redis_url.removesuffix("/0") + "/4711")


def test_probe_of_a_server_that_hangs(own_redis: RedisProcess) -> None:
    """A stopped server is given up after the timeout, for every step together."""
    own_redis.signal(signal.SIGSTOP)
    assert "no answer in time" in complaint(own_redis.url, timeout=0.3)
    own_redis.signal(signal.SIGCONT)


def test_probe_of_nothing(tmp_path: Path) -> None:
    """A closed port, a missing socket and an unknown name."""
    refused = complaint(f"redis://:hidden@127.0.0.1:{free_port()}/0")
    assert "connection refused" in refused
    assert "--redis memory://" in refused
    assert "hidden" not in refused
    assert "no such socket" in complaint(f"unix://{tmp_path}/nothing.sock")
    assert "is not known" in complaint("redis://no-such-host.invalid/0")


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], str]]:
    """Servers that send these bytes to whoever connects and speaks; returns their URL."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start_one(*answers: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            for answer in answers:
                # OSError: whoever asked may have had enough and gone (ENOTCONN is no ConnectionError).
                with listener.accept()[0] as connection, contextlib.suppress(OSError):
                    connection.settimeout(5)
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"redis://127.0.0.1:{listener.getsockname()[1]}/0"

    yield start_one
    for thread in threads:
        thread.join()
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not a Redis"),
        (b"x" * 100_000, "is not a Redis"),
        (b"", "closed the connection"),
        (b"-DENIED Redis is running in protected mode\r\n", "protected mode"),
        (b"-ERR max number of clients reached\r\n", "takes no more connections"),
        (b"-ERR something new\r\n", "It answered: ERR something new"),
        (b"-MOVED 1 127.0.0.1:7000\r\n", "Redis Cluster"),
        (b"+PONG\r\n$23\r\nredis_version:5.0.7\r\n\r\n\r\n", "is too old: 5.0.7"),
    ],
)
def test_probe_of_strange_answers(answering: Callable[[bytes], str], answer: bytes, words: str) -> None:
    """Each kind of server that will not do has its own words, and none hangs the start."""
    assert words in complaint(answering(answer))


def test_probe_waits_for_a_server_that_loads(answering: Callable[..., str]) -> None:
    """LOADING after a restart is waited for, and told when it takes too long."""
    loading = b"-LOADING Redis is loading the dataset in memory\r\n"
    ready = b"+PONG\r\n$23\r\nredis_version:7.0.0\r\n\r\n\r\n+OK\r\n"
    assert probe(answering(loading, ready)).version == "7.0.0"
    assert "still loading" in complaint(answering(loading), timeout=0.15)


def test_probe_over_tls_where_there_is_none(redis_url: str, tmp_path: Path) -> None:
    """A plain port asked for TLS is silent, and the error guesses why; a missing certificate file is named."""
    assert "starts with redis://" in complaint(redis_url.replace("redis://", "rediss://"), timeout=0.5)
    missing = redis_url.replace("redis://", "rediss://") + f"?ssl_ca_certs={tmp_path}/none.pem"
    assert "no such file" in complaint(missing)


def test_auto_finds_the_server_of_this_machine() -> None:
    """The choice is the binary the other tests run."""
    assert choose("auto", {"PATH": os.path.dirname(find_redis_server())}).program == find_redis_server()
