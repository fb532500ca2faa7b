"""What an operator or a service manager does to a cluster, and what it is told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sharedcluster.control import client
from sharedcluster.control.protocol import ControlError
from tests.cluster_process import ROOT
from tests.conftest import StartCluster
from tests.strict_clients import Client, Crowd
from tests.waiting import wait_until

APP = "tests.apps.faults:app"
GOOD = "from flask import Flask\napp = Flask(__name__)\n@app.get('/')\ndef version(): return 'good'\n"

# -- one worker ---------------------------------------------------------------------------------------------------


def test_drain_of_one_worker(start_cluster: StartCluster) -> None:
    """drain ID: a replacement has its slot before it leaves; keep-alive clients keep their connections."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none")
    leaving = cluster.workers()[0]
    with Crowd(*[Client(("127.0.0.1", cluster.port)) for _ in range(6)]) as crowd:
        wait_until(crowd.all_got(5), "all are served")
        assert client.call(cluster.control, "drain", id=leaving["id"])["slot"] == 0
        wait_until(lambda: cluster.has(2, without=(leaving["pid"],)), "it is replaced")
        wait_until(crowd.all_got(5), "all are served")
    assert (crowd.lost, crowd.refused, crowd.closed) == ([], 0, 0)
    assert [w["slot"] for w in cluster.workers()] == [0, 1]
    assert cluster.status()["counters"]["restarts"] == 0


def test_drain_of_the_only_worker_with_work(start_cluster: StartCluster) -> None:
    """The only worker answers its slow request while its replacement serves already; asked twice, it says so."""
    cluster = start_cluster(APP, "-w", "1", "--redis", "none")
    (leaving,) = cluster.workers()
    slow = Client(("127.0.0.1", cluster.port), target="/slow/2.0", keep_alive=False)
    with Crowd(slow) as crowd:
        wait_until(lambda: cluster.workers()[0]["in_flight"] == 1, "it is in flight")
        client.call(cluster.control, "drain", id=leaving["id"])
        with pytest.raises(ControlError, match=r"leaving|draining"):
            client.call(cluster.control, "drain", id=leaving["id"])
        wait_until(lambda: len(cluster.workers()) == 2, "the replacement is forked")
        wait_until(lambda: cluster.get("/").json["id"] != leaving["id"], "the replacement serves")
        slow.over.set()
    assert crowd.lost == []
    wait_until(lambda: cluster.has(1, without=(leaving["pid"],)), "it is gone")


def test_describe(start_cluster: StartCluster) -> None:
    """describe ID says what status does not; an id that is none names those that are."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none")
    facts = client.call(cluster.control, "describe", id=2)["worker"]
    assert facts["pid"] == cluster.workers()[1]["pid"]
    assert facts["heartbeat_age"] < 5
    assert facts["unacknowledged"] == 0
    for command in ("describe", "drain"):
        with pytest.raises(ControlError, match=r"no worker '99'"):
            client.call(cluster.control, command, id=99)


# -- systemd -------------------------------------------------------------------------------------------------------


@pytest.fixture
def notices(tmp_path: Path) -> Iterator[socket.socket]:
    """systemd's end of sd_notify(3)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.settimeout(15)
        yield end


def until(end: socket.socket, state: str) -> dict[str, str]:
    """Read until a notice has this state; its fields."""
    while True:
        fields = dict(line.split("=", 1) for line in end.recv(4096).decode().splitlines())
        if state in fields:
            return fields


def test_systemd_is_told(start_cluster: StartCluster, tmp_path: Path, notices: socket.socket) -> None:
    """READY when all workers serve, RELOADING with the time and READY after it, even if the reload failed, WATCHDOG
    all the time, STOPPING at the end; workers do not inherit the socket's name.
    """
    (tmp_path / "good.py").write_text(GOOD + "import os\nassert 'NOTIFY_SOCKET' not in os.environ\n")
    cluster = start_cluster(
        "good:app", "-w", "2", "--redis", "none", cwd=tmp_path,
        env={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "500000"},
    )  # fmt: skip
    assert cluster.process is not None
    ready = until(notices, "READY")
    assert ready["MAINPID"] == str(cluster.process.pid)
    assert ready["STATUS"] == "2 workers serve"
    before = int(until(notices, "WATCHDOG")["WATCHDOG"])
    assert before == 1
    cluster.signal(signal.SIGHUP)
    assert int(until(notices, "RELOADING")["MONOTONIC_USEC"]) > 0
    until(notices, "READY")
    (tmp_path / "good.py").write_text("1/0\n")
    cluster.signal(signal.SIGHUP)
    until(notices, "RELOADING")
    until(notices, "READY")
    assert "ZeroDivisionError" in cluster.output()
    cluster.signal(signal.SIGTERM)
    until(notices, "STOPPING")
    assert cluster.wait() == 0


# -- containers ----------------------------------------------------------------------------------------------------

CAN_UNSHARE = subprocess.run(
    ["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False
).returncode == 0  # fmt: skip


@pytest.mark.skipif(not CAN_UNSHARE, reason="this process may not make a PID namespace (unshare --pid)")
def test_as_process_1(start_cluster: StartCluster, tmp_path: Path) -> None:
    """As PID 1, as in a container: orphans are reaped, TERM drains and ends with code 0."""
    (tmp_path / "orphans.py").write_text(
        "import subprocess\nfrom flask import Flask\napp = Flask(__name__)\n"
        "@app.get('/orphan')\ndef orphan():\n    subprocess.run(['sh', '-c', 'sleep 0.3 & :'])\n    return 'ok'\n"
        "@app.get('/processes')\ndef processes():\n"
        "    lines = subprocess.run(['ps', '-eo', 'pid,ppid,stat,comm'], capture_output=True, text=True).stdout\n"
        "    return lines\n"
    )
    cluster = start_cluster(
        "orphans:app", "-w", "1", "--redis", "none", cwd=tmp_path,
        prefix=("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"), ready=False,
    )  # fmt: skip
    wait_until(lambda: cluster.get("/orphan").status == 200, "it serves", deadline=30)
    for _ in range(5):
        assert cluster.get("/orphan").status == 200

    def processes() -> list[list[str]]:
        return [line.split() for line in cluster.get("/processes").body.decode().splitlines()[1:]]

    wait_until(lambda: not [row for row in processes() if row[3].startswith("sleep")], "orphans are reaped")
    assert not [row for row in processes() if "Z" in row[2]]
    assert cluster.process is not None
    (first,) = psutil.Process(cluster.process.pid).children()
    first.send_signal(signal.SIGTERM)
    assert cluster.wait() == 0
    assert "stopped: " in cluster.output()


def test_orphans_below_a_preloading_primary_are_reaped(start_cluster: StartCluster) -> None:
    """With --preload the primary adopts what its workers leave behind: it is collected, and no worker is mistaken."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", "--preload")
    assert cluster.process is not None
    primary = psutil.Process(cluster.process.pid)
    orphan = cluster.get("/orphan").json["orphan"]
    wait_until(lambda: psutil.Process(orphan).ppid() == primary.pid, "the primary has adopted it", interval=0.005)
    os.kill(orphan, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(orphan), "it is collected")
    assert cluster.has(2)
    assert cluster.status()["counters"]["restarts"] == 0


# -- ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_exit_code_of_an_ordered_stop(start_cluster: StartCluster, number: signal.Signals) -> None:
    """TERM, INT and QUIT of an idle cluster end with 0."""
    cluster = start_cluster(APP, "-w", "1", "--redis", "none")
    cluster.note_processes()
    cluster.signal(number)
    assert cluster.wait() == 0
    wait_until(lambda: not cluster.left_over(), "nothing is left")


def test_stop_returns_after_the_last_worker(start_cluster: StartCluster) -> None:
    """One of two workers is busy for two seconds: the primary is there until both are gone."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none")
    with Crowd(Client(("127.0.0.1", cluster.port), target="/slow/2.0")) as crowd:
        wait_until(lambda: sum(w["in_flight"] for w in cluster.workers()) == 1, "it is in flight")
        crowd.clients[0].over.set()
        assert cluster.stop() == 0
        assert not cluster.left_over()
    assert (crowd.answered, crowd.lost) == (1, [])


def test_a_stop_during_a_reload(start_cluster: StartCluster) -> None:
    """HUP and then TERM while the old generation drains: idle clients that write at that moment are answered."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none")
    # Old workers that have nothing to do are gone before anybody could see them drain.
    slow = Client(("127.0.0.1", cluster.port), target="/slow/4.0", keep_alive=False)
    with Crowd(*[Client(("127.0.0.1", cluster.port)) for _ in range(8)]) as crowd, Crowd(slow) as patient:
        wait_until(crowd.all_got(5), "all are served")
        wait_until(lambda: any(w["in_flight"] for w in cluster.workers()), "the slow request is in flight")
        cluster.signal(signal.SIGHUP)
        wait_until(lambda: any(w["state"] == "draining" for w in cluster.workers()), "it drains", interval=0.002)
        assert cluster.stop() == 0
    assert (crowd.lost, patient.lost) == ([], [])
    assert len(slow.account.answered) == 1


# -- out of memory -------------------------------------------------------------------------------------------------


def test_a_worker_killed_for_want_of_memory_is_named(start_cluster: StartCluster, tmp_path: Path) -> None:
    """The kernel's counter of the control group rises with a KILL: the log says so. (The counter is a file here.)"""
    events = tmp_path / "sys/fs/cgroup/memory.events"
    events.parent.mkdir(parents=True)
    events.write_text("oom_kill 0\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nfrom sharedcluster import cgroup\n"
        f"real = cgroup.oom_kills\ncgroup.oom_kills = lambda root='/': real({str(tmp_path)!r})\n"
    )
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    first, second = (w["pid"] for w in cluster.workers())
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: cluster.has(2, without=(first,)), "it is replaced")
    assert "out of memory" not in cluster.output()
    events.write_text("oom_kill 1\n")
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: "out of memory, says the kernel" in cluster.output(), "it is named")
