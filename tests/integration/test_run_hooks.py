"""`hooks = "module"`: events of `sharedcluster run`, outside the primary and inside the workers."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import StartCluster
from tests.waiting import wait_until


def lines(log: Path) -> list[dict[str, Any]]:
    """What the hooks wrote."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def names(log: Path) -> list[str]:
    """Their names, in order."""
    return [line["hook"] for line in lines(log)]


def test_every_hook_in_its_place(start_cluster: StartCluster, tmp_path: Path) -> None:
    """A life with a crash and a reload: each hook as often as it should, in the right process, with the facts."""
    log = tmp_path / "log"
    (tmp_path / "conf.toml").write_text('hooks = "tests.apps.hooks"\nworkers = 2\nredis = "none"\n')
    cluster = start_cluster("tests.apps.plain:app", "-c", str(tmp_path / "conf.toml"), env={"HOOKS_LOG": str(log)})
    assert cluster.process is not None
    wait_until(lambda: "when_ready" in names(log), "all are there")
    first = cluster.workers()[0]
    os.kill(first["pid"], signal.SIGKILL)
    wait_until(
        lambda: "child_exit" in names(log) and len(cluster.workers()) == 2 and cluster.is_ready(), "it is replaced"
    )
    killed = next(line for line in lines(log) if line["hook"] == "on_exit")
    assert killed["arguments"] == [
        {"id": first["id"], "slot": first["slot"], "generation": 1, "pid": first["pid"]}, None, "SIGKILL",
    ]  # fmt: skip
    assert cluster.cli("reload").returncode == 0
    assert cluster.stop() == 0
    told = names(log)
    for name in ("on_fork", "on_online", "on_listening", "on_disconnect", "on_exit", "child_exit"):
        assert told.count(name) == 5, name
    assert [told.count(name) for name in ("post_fork", "post_worker_init", "worker_exit")] == [5, 5, 4]
    assert [told.count(name) for name in ("on_ready", "when_ready", "on_reload", "on_stop")] == [1, 1, 1, 1]
    assert told[-1] == "on_stop"
    by_place = {line["hook"]: line["pid"] for line in lines(log)}
    assert by_place["on_exit"] == by_place["on_fork"] != cluster.process.pid
    pids = {line["arguments"][0]["pid"] for line in lines(log) if line["hook"] == "on_fork"}
    assert {line["pid"] for line in lines(log) if line["hook"] == "post_worker_init"} == pids
    assert "pre_fork" not in told
    assert "the hook pre_fork is never called" in cluster.output()
    assert "a mistake in a hook" in cluster.output()
    wait_until(lambda: not cluster.left_over(), "nothing is left")


def test_the_observer_is_started_again(start_cluster: StartCluster, tmp_path: Path) -> None:
    """kill -9 of the process that calls the hooks: said, and later events arrive."""
    log = tmp_path / "log"
    cluster = start_cluster(
        "tests.apps.plain:app", "-w", "1", "--redis", "none", "--hooks", "tests.apps.hooks",
        env={"HOOKS_LOG": str(log)},
    )  # fmt: skip
    wait_until(lambda: "on_ready" in names(log), "it is there")
    assert cluster.process is not None
    family = psutil.Process(cluster.process.pid).children()
    observer = next(child for child in family if "sharedcluster.hooks" in child.cmdline())
    wait_until(lambda: observer.create_time() < time.time() - 4, "it is no crash at its start")
    observer.kill()
    wait_until(lambda: "it is started again" in cluster.output(), "it is said")
    before = names(log).count("on_reload")
    assert cluster.cli("reload").returncode == 0
    wait_until(lambda: names(log).count("on_reload") == before + 1, "it hears again")
    assert cluster.stop() == 0


def test_a_module_that_does_not_load_is_an_error_at_the_start(start_cluster: StartCluster, tmp_path: Path) -> None:
    """Exit code 3, with its own traceback, before anything serves."""
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for name, says in (("broken", "ZeroDivisionError"), ("nowhere", 'no module "nowhere"')):
        cluster = start_cluster("tests.apps.plain:app", "--hooks", name, "--redis", "none", ready=False, cwd=tmp_path)
        assert cluster.wait() == 3
        assert says in cluster.output()


def test_the_cluster_module_under_run(start_cluster: StartCluster, tmp_path: Path) -> None:
    """An app sees which worker it is in; one that forks or serves by itself does not load, and is told why."""
    (tmp_path / "sees.py").write_text(
        "from flask import Flask\nfrom sharedcluster import cluster\napp = Flask(__name__)\n"
        "@app.get('/')\ndef who(): return [cluster.is_primary, cluster.is_worker, cluster.worker.id]\n"
    )
    cluster = start_cluster("sees", "-w", "1", "--redis", "none", cwd=tmp_path)
    assert cluster.get("/").json == [False, True, 1]
    assert cluster.stop() == 0
    for call in ("fork()", "serve(app)"):
        (tmp_path / "forks.py").write_text(
            f"from flask import Flask\nfrom sharedcluster import cluster\napp = Flask(__name__)\ncluster.{call}\n"
        )
        refused = start_cluster("forks", "-w", "1", "--redis", "none", cwd=tmp_path, ready=False)
        assert refused.wait() == 3
        assert "belongs to a program of its own" in refused.output()
