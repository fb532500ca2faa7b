"""Workers that die: replaced, counted, and given up on when it is hopeless."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.conftest import StartCluster
from tests.waiting import wait_until


def test_a_killed_worker_is_replaced_in_its_slot(start_cluster: StartCluster) -> None:
    """After kill -9: the same slot, a new id, one restart counted, its end said once; the others are untouched."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none")
    first, other = cluster.workers()
    os.kill(first["pid"], signal.SIGKILL)
    wait_until(
        lambda: [w["id"] for w in cluster.workers()] == [3, 2] and cluster.is_ready(), "slot 0 is filled", deadline=5
    )
    replaced, same = cluster.workers()
    assert (replaced["slot"], replaced["restarts"]) == (0, 1)
    assert same["pid"] == other["pid"]
    assert cluster.status()["counters"]["restarts"] == 1
    assert cluster.output().count("was killed by SIGKILL") == 1


def test_an_exit_code_is_reported(start_cluster: StartCluster) -> None:
    """A view that calls os._exit(42): said with its code, and replaced."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none")
    with suppress(OSError):
        cluster.get("/exit/42")
    wait_until(lambda: "ended with code 42" in cluster.output(), "the code is said")
    wait_until(lambda: len(cluster.workers()) == 2 and cluster.is_ready(), "it is replaced")


def test_workers_that_never_come_up_end_the_cluster(start_cluster: StartCluster, tmp_path: Path) -> None:
    """An app that loads in the check and dies in each worker: a few attempts, then exit code 3."""
    (tmp_path / "dies.py").write_text(
        "import os\nfrom flask import Flask\napp = Flask(__name__)\n"
        "if 'SHAREDCLUSTER_SLOT' in os.environ: os._exit(9)\n"
    )
    cluster = start_cluster("dies", "-w", "2", "--redis", "none", ready=False, cwd=tmp_path)
    assert cluster.wait(60) == 3
    assert "No worker ever came up" in cluster.output()
    assert 5 <= cluster.output().count("ended with code 9") <= 10


def test_term_to_a_worker_drains_and_replaces_it(start_cluster: StartCluster) -> None:
    """TERM by hand is a request to leave: what is in flight is answered, then a new worker has its slot."""
    from concurrent.futures import ThreadPoolExecutor

    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none")
    pid = cluster.workers()[0]["pid"]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(cluster.get, "/slow/1.0")
        wait_until(lambda: cluster.workers()[0]["in_flight"] == 1, "it is in flight")
        os.kill(pid, signal.SIGTERM)
        assert answer.result(10).status == 200
    wait_until(lambda: [w["pid"] for w in cluster.workers()] != [pid] and cluster.is_ready(), "it is replaced")
    assert cluster.get("/").status == 200


def test_a_hung_worker_is_dumped_and_replaced(start_cluster: StartCluster) -> None:
    """A loop that stands still past the heartbeat timeout: its stack is in the log, and it is replaced."""
    from concurrent.futures import ThreadPoolExecutor

    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none", "--heartbeat-timeout", "2")
    before = {w["pid"] for w in cluster.workers()}
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cluster.get, "/block/60.0", timeout=30)
        wait_until(lambda: "its loop has stood still" in cluster.output(), "it is noticed")
        wait_until(lambda: len({w["pid"] for w in cluster.workers()} - before) == 1, "it is replaced")
    assert "in block" in cluster.output()
    assert cluster.get("/").status == 200


def test_the_private_redis_keeper_is_revived(start_cluster: StartCluster) -> None:
    """kill -9 of the process that keeps the private Redis: it is started again at the same address."""
    import psutil

    cluster = start_cluster("tests.apps.plain:app", "-w", "1")
    assert cluster.process is not None
    workers = {w["pid"] for w in cluster.workers()}
    keeper = next(c for c in psutil.Process(cluster.process.pid).children() if c.pid not in workers)
    keeper.kill()
    wait_until(lambda: "was started again" in cluster.output(), "it is noticed")
    assert cluster.stop() == 0
    wait_until(lambda: not cluster.left_over(), "nothing is left")
