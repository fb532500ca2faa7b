"""What operators see of a running cluster."""

from __future__ import annotations

import json
import os
import signal
import stat
from typing import Any

from tests.conftest import StartCluster
from tests.waiting import wait_until

WORKER = {
    "id": int, "slot": int, "pid": int, "generation": int, "state": str, "connections": int, "in_flight": int,
    "handed_off": int, "given_back": int, "requests": int, "rss": int, "cpu": float, "uptime": float, "restarts": int,
}  # fmt: skip
CLUSTER: dict[str, Any] = {
    "schema": int, "name": str, "pid": int, "version": str, "state": str, "generation": int, "policy": str,
    "started_at": float, "listeners": list, "redis": dict, "workers": list, "counters": dict,
}  # fmt: skip


def test_status_json_has_the_contracts_shape(start_cluster: StartCluster) -> None:
    """Every key of schema 1 with its type, no other key, and values that are true."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--name", "shop")
    for _ in range(6):
        cluster.get("/")
    wait_until(lambda: sum(w["requests"] for w in cluster.workers()) == 6, "the heartbeats have counted")
    printed = cluster.cli("status", "--json")
    facts = json.loads(printed.stdout)
    assert {key: type(value) for key, value in facts.items()} == CLUSTER
    assert facts["schema"] == 1
    assert (facts["name"], facts["state"], facts["generation"]) == ("shop", "online", 1)
    assert cluster.process is not None
    assert facts["pid"] == cluster.process.pid
    assert [set(each) for each in facts["listeners"]] == [{"address", "pending", "accepted"}]
    assert set(facts["redis"]) == {"url", "state", "latency_ms"}
    for row in facts["workers"]:
        assert {key: type(value) for key, value in row.items()} == WORKER
        assert row["state"] == "listening"
        assert row["rss"] > 1 << 20
        assert row["handed_off"] == 3
    assert {"restarts", "reloads", "redispatched", "migrated", "gaps"} <= set(facts["counters"])


def test_the_control_socket_is_private(start_cluster: StartCluster) -> None:
    """Socket 0600 in a folder 0700, removed at the end."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none")
    path = cluster.control
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert cluster.stop() == 0
    assert not path.exists()


def test_the_table_is_for_people(start_cluster: StartCluster) -> None:
    """`status` without --json names the state as a word and each worker on a line of plain ASCII."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none")
    text = cluster.cli("status").stdout
    assert text.isascii()
    assert "online" in text.splitlines()[0]
    assert sum("listening" in line for line in text.splitlines()) == 2


def test_two_clusters_of_one_app_have_two_names(start_cluster: StartCluster) -> None:
    """A second run gets a name with a number; without a name the commands ask which one is meant."""
    first = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none")
    second = start_cluster(
        "tests.apps.plain:app", "-w", "1", "--redis", "none", ready=False,
        env={"SHAREDCLUSTER_RUNTIME_DIR": str(first.runtime)},
    )  # fmt: skip
    wait_until(lambda: len(list(first.runtime.glob("*.sock"))) == 2, "both answer")
    asked = first.cli("status")
    assert asked.returncode == 2
    assert "tests.apps.plain, tests.apps.plain-2" in asked.stderr
    assert json.loads(first.cli("status", "tests.apps.plain-2", "--json").stdout)["name"] == "tests.apps.plain-2"
    assert first.cli("stop", "--name", "tests.apps.plain-2").returncode == 0
    assert second.wait(10) == 0


def test_a_dead_primarys_socket_is_no_cluster(start_cluster: StartCluster) -> None:
    """After kill -9 the file stays; commands see that nobody answers, and the next run takes the name."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none")
    cluster.note_processes()
    cluster.signal(signal.SIGKILL)
    cluster.wait()
    gone = cluster.cli("status")
    assert gone.returncode == 1
    assert "No cluster is running" in gone.stderr
    cluster.start()
    assert cluster.status()["name"] == "tests.apps.plain"


def test_stop_waits_until_it_is_gone(start_cluster: StartCluster) -> None:
    """`stop` returns when the primary has exited, `stop --now` at once even with a request in flight."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none")
    assert cluster.process is not None
    pid = cluster.process.pid
    stopped = cluster.cli("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert cluster.wait(5) == 0
    assert not os.path.exists(f"/proc/{pid}")


def test_garbage_on_the_control_socket_is_survived(start_cluster: StartCluster) -> None:
    """Whatever is written there, the answer is an error and the cluster lives."""
    import socket

    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none")
    for junk in (b"\xff\xfe\n", b"[]\n", b'{"command":"no"}\n', b'{"command":["x"]}\n', b"x" * 70000, b""):
        with socket.socket(socket.AF_UNIX) as end:
            end.connect(str(cluster.control))
            end.sendall(junk)
            end.shutdown(socket.SHUT_WR)
            answer = end.recv(4096)
            assert answer == b"" or json.loads(answer)["ok"] is False
    assert cluster.get("/").status == 200
