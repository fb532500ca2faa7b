"""--preload: workers forked from a mold share its memory and nothing that must differ; a mold may fail or die."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.cluster_process import Cluster
from tests.conftest import StartCluster
from tests.waiting import wait_until

APP = "tests.apps.faults:app"
GOOD = "from flask import Flask\napp = Flask(__name__)\n@app.get('/')\ndef version(): return {version!r}\n"


def mold_of(cluster: Cluster) -> int:
    """The process that workers are forked from."""
    assert cluster.process is not None
    workers = {w["pid"] for w in cluster.workers()}
    (mold,) = [c.pid for c in psutil.Process(cluster.process.pid).children() if c.pid not in workers]
    return mold


@pytest.fixture
def changing(start_cluster: StartCluster, tmp_path: Path) -> Cluster:
    """A preloaded cluster of two whose application a test can write anew; five seconds to load it."""
    (tmp_path / "changing.py").write_text(GOOD.format(version="one"))
    return start_cluster(
        "changing:app", "-w", "2", "--redis", "none", "--preload", "--boot-timeout", "5", cwd=tmp_path
    )


def test_memory_is_shared(start_cluster: StartCluster) -> None:
    """An application with 64 MB of data: a worker that has served holds less than 24 MB of its own."""
    cluster = start_cluster(APP, "-w", "3", "--redis", "none", "--preload", env={"BALLAST_PAGES": "1024"})
    for _ in range(12):
        assert cluster.get("/").status == 200
    own = [psutil.Process(w["pid"]).memory_full_info().uss >> 20 for w in cluster.workers()]
    print("MB of their own:", own)
    assert max(own) < 24


def test_loaded_once_a_generation(start_cluster: StartCluster) -> None:
    """All workers of a generation come from one import; a reload imports anew, in another process."""
    cluster = start_cluster(APP, "-w", "3", "--redis", "none", "--preload")
    first = {cluster.get("/loaded").json["loaded_in"] for _ in range(9)}
    assert first == {mold_of(cluster)}
    assert cluster.cli("reload").returncode == 0
    wait_until(lambda: len(cluster.workers()) == 3, "the old generation is gone")
    second = {cluster.get("/loaded").json["loaded_in"] for _ in range(9)}
    assert second == {mold_of(cluster)}
    assert second.isdisjoint(first)


def test_a_reload_loads_new_code(changing: Cluster, tmp_path: Path) -> None:
    """Preloading never serves stale code; the old mold leaves."""
    old = mold_of(changing)
    (tmp_path / "changing.py").write_text(GOOD.format(version="second"))
    assert changing.cli("reload").returncode == 0
    wait_until(lambda: len(changing.workers()) == 2, "the old generation is gone")
    assert {changing.get("/").body for _ in range(4)} == {b"second"}
    wait_until(lambda: not psutil.pid_exists(old), "the old mold is gone")


def test_chance_differs(start_cluster: StartCluster) -> None:
    """Workers forked from one origin draw different numbers, with `random` as with `secrets` and `uuid`."""
    cluster = start_cluster(APP, "-w", "3", "--redis", "none", "--preload")
    drawn = [cluster.get("/random").json for _ in range(9)]
    assert len({row["pid"] for row in drawn}) == 3
    for kind in ("random", "secrets", "uuid4", "uuid1"):
        assert len({row[kind] for row in drawn}) == 9, kind


def test_redis_clients_belong_to_their_worker(start_cluster: StartCluster, redis_url: str) -> None:
    """The demo, preloaded: 60 parallel requests with sessions over three workers; no answer is another's, and each
    worker has connections of its own to Redis.
    """
    cluster = start_cluster("demo_app", "-w", "3", "--redis", redis_url, "--preload")

    def count(_: int) -> list[int]:
        cookie, counts = "", []
        for _ in range(5):
            answer = cluster.post("/counter", headers={"Cookie": cookie} if cookie else {})
            cookie = answer.headers.get("set-cookie", cookie).split(";", 1)[0]
            counts.append(answer.json["count"])
        return counts

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(count, range(12))) == [[1, 2, 3, 4, 5]] * 12
    port = int(redis_url.rpartition(":")[2].partition("/")[0])
    ends = [
        connection.laddr
        for w in cluster.workers()
        for connection in psutil.Process(w["pid"]).net_connections("tcp")
        if connection.raddr and connection.raddr.port == port
    ]
    assert len(ends) >= 3
    assert len(set(ends)) == len(ends)  # a socket that two processes hold would be listed twice
    mold = psutil.Process(mold_of(cluster))
    assert not [c for c in mold.net_connections("tcp") if c.raddr and c.raddr.port == port]


def test_a_killed_worker_is_forked_again(start_cluster: StartCluster) -> None:
    """kill -9 of a worker: its replacement comes from the mold, and the primary reaps it itself."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", "--preload")
    mold, pid = mold_of(cluster), cluster.workers()[0]["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: cluster.has(2, without=(0, pid)), "it is replaced")
    assert mold_of(cluster) == mold
    assert not psutil.pid_exists(pid)
    assert cluster.process is not None
    assert all(psutil.Process(w["pid"]).ppid() == cluster.process.pid for w in cluster.workers())


def test_a_killed_mold_takes_nobody_with_it(changing: Cluster) -> None:
    """kill -9 of the mold: the workers serve on; the next worker that is wanted gets a new mold."""
    workers = [w["pid"] for w in changing.workers()]
    mold = mold_of(changing)
    os.kill(mold, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(mold), "it is reaped")
    assert [w["pid"] for w in changing.workers()] == workers
    assert changing.cli("scale", "3").returncode == 0
    wait_until(lambda: changing.has(3), "a third worker")
    assert {changing.get("/").body for _ in range(6)} == {b"one"}


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_a_mold_that_does_not_answer(changing: Cluster, end: signal.Signals | None) -> None:
    """Asked for a worker, the mold is stopped and killed, or stopped for ever: another mold makes the worker."""
    mold, pid = mold_of(changing), changing.workers()[0]["pid"]
    os.kill(mold, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: any(w["pid"] == 0 for w in changing.workers()), "it is asked")
    if end:
        os.kill(mold, end)
    wait_until(lambda: changing.has(2, without=(0, pid)), "the worker is there")
    assert mold_of(changing) != mold


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("1/0\n", "ZeroDivisionError"),
        ("import os\nos._exit(7)\n", "ended with code 7"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", "was killed by SIGSEGV"),
        ("import time\ntime.sleep(600)\n", "not loaded within 5 s"),
    ],
)
def test_broken_code_changes_nothing(changing: Cluster, tmp_path: Path, code: str, said: str) -> None:
    """A reload to code that raises, exits, crashes or hangs on import fails and says why; the old workers serve."""
    before = {w["pid"] for w in changing.workers()}
    (tmp_path / "changing.py").write_text(code)
    result = changing.cli("reload")
    assert result.returncode == 3
    assert said in result.stderr
    assert {w["pid"] for w in changing.workers()} == before
    assert changing.status()["state"] == "online"
    assert changing.get("/").body == b"one"
    (tmp_path / "changing.py").write_text(GOOD.format(version="mended"))
    assert changing.cli("reload").returncode == 0
    assert changing.get("/").body == b"mended"
    assert changing.stop() == 0
    wait_until(lambda: not changing.left_over(), "no process is left")


def test_a_new_mold_that_somebody_killed_is_replaced(start_cluster: StartCluster, tmp_path: Path) -> None:
    """KILL, as by the kernel for want of memory, of the mold that loads the new code: another one does it."""
    (tmp_path / "changing.py").write_text(GOOD.format(version="one"))
    cluster = start_cluster("changing:app", "-w", "1", "--redis", "none", "--preload", cwd=tmp_path)
    assert cluster.process is not None
    primary = psutil.Process(cluster.process.pid)
    serving = {c.pid for c in primary.children()}
    (tmp_path / "changing.py").write_text(
        GOOD.format(version="two") + "import os, time\nwhile not os.path.exists('gate'): time.sleep(0.02)\n"
    )
    with ThreadPoolExecutor(1) as pool:
        reload = pool.submit(cluster.cli, "reload")
        (first,) = wait_until(lambda: {c.pid for c in primary.children()} - serving, "a new mold loads")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: {c.pid for c in primary.children()} - serving - {first}, "another mold loads")
        (tmp_path / "gate").touch()
        assert reload.result(60).returncode == 0
    assert cluster.get("/").body == b"two"
    assert "was killed by SIGKILL. It is tried again." in cluster.output()


def test_a_mold_that_cannot_load_any_more_is_not_tried_without_a_pause(changing: Cluster, tmp_path: Path) -> None:
    """Broken code, a dead mold and a dead worker: the other worker serves, attempts get rarer, mended code heals."""
    (tmp_path / "changing.py").write_text("raise RuntimeError('broken')\n")
    pid = changing.workers()[0]["pid"]
    os.kill(mold_of(changing), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: changing.output().count("RuntimeError: broken") >= 4, "it is tried four times")
    start = time.monotonic()
    wait_until(lambda: changing.output().count("RuntimeError: broken") >= 7, "and three times more")
    assert time.monotonic() - start > 1.0
    assert changing.get("/").body == b"one"
    (tmp_path / "changing.py").write_text(GOOD.format(version="mended"))
    wait_until(lambda: changing.has(2, without=(0, pid)), "a second worker", deadline=20)
