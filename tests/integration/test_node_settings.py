"""`setup_primary` and `fork(env)`: what workers are started with."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.program_process import StartLab
from tests.waiting import wait_until


def test_fork_env_adds_and_overrides(start_lab: StartLab) -> None:
    """Variables for one worker, on top of the primary's."""
    lab = start_lab(env={"COLOUR": "red", "SIZE": "big"})
    lab.fork(1, COLOUR="blue", TASTE="sweet")
    assert lab.at(1, "[os.environ.get(n) for n in ('COLOUR', 'SIZE', 'TASTE')]") == ["blue", "big", "sweet"]
    assert lab.do("os.environ['COLOUR']") == "red"


def test_setup_is_cumulative_and_emitted_once_per_call_and_later(start_lab: StartLab) -> None:
    """What is not named stays; `setup` comes in the next turn, with all settings, and only later forks see them."""
    lab = start_lab()
    lab.do("cluster.setup_primary(args=['one'])\nsay(after='the call')\ncluster.setup_primary(graceful_timeout=7)")
    wait_until(lambda: len(lab.events("setup")) == 2, "both were told")
    assert [f.get("event", "call") for f in lab.facts if "after" in f or f.get("event") == "setup"] == [
        "call", "setup", "setup",
    ]  # fmt: skip
    first, second = (fact["arguments"][0][1] for fact in lab.events("setup"))
    assert (first["args"], first["graceful_timeout"]) == (["one"], 30.0)
    assert (second["args"], second["graceful_timeout"]) == (["one"], 7)
    lab.fork(1)
    lab.do("cluster.setup_primary(args=['two'])")
    lab.fork(1)
    assert [lab.at(id, "sys.argv[1:]") for id in (1, 2)] == [["one"], ["two"]]


def test_settings_are_known_before_and_after(start_lab: StartLab) -> None:
    """The defaults are those of this process: its script, its arguments, its interpreter's options."""
    lab = start_lab()
    assert lab.do("cluster.settings.exec").endswith("tests/programs/lab.py")
    assert lab.do("list(cluster.settings.args)") == []
    lab.fork(1)
    assert lab.do("cluster.settings.scheduling_policy") == "round-robin"


def test_the_script_the_folder_and_the_interpreters_options(start_lab: StartLab, tmp_path: Path) -> None:
    """`exec`, `cwd` and `exec_argv`; the script's own folder is where it imports from."""
    (tmp_path / "goods.py").write_text("NAME = 'tea'\n")
    (tmp_path / "other.py").write_text(
        "import os, sys, goods\nfrom sharedcluster import cluster\n"
        "cluster.worker.send([os.getcwd(), goods.NAME, sys.dont_write_bytecode, sys.argv])\n"
    )
    lab = start_lab(env={"PYTHONDONTWRITEBYTECODE": ""})
    path = str(tmp_path / "other.py")
    lab.do(f"cluster.setup_primary(exec={path!r}, cwd='/', exec_argv=['-B'], args=['x'])")
    lab.fork(1)
    assert lab.wait_event("message", 1)["message"] == ["/", "tea", True, [path, "x"]]


def test_silent_workers_write_to_the_primary(start_lab: StartLab) -> None:
    """What a silent worker writes comes as `stdout` and `stderr`, to its last byte, and nowhere else."""
    lab = start_lab()
    lab.do("cluster.setup_primary(silent=True)\nout, err = [], []")
    lab.do(
        "w = cluster.fork()\nw.on('stdout', lambda d: out.append(d.decode()))\n"
        "w.on('stderr', lambda d: err.append(d.decode()))"
    )
    lab.wait_event("online", 1)
    lab.at(1, "print('to out', flush=True); print('to err', file=sys.stderr, flush=True)")
    lab.do("cluster.workers[1].send({'lab': -1, 'code': \"os.write(1, b'x' * 300000) and os._exit(0)\"})")
    lab.wait_exit(1)
    assert lab.do("len(''.join(out))") == len("to out\n") + 300_000
    assert lab.do("''.join(err)") == "to err\n"
    assert not any(line.startswith("to ") for line in lab.lines)


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        ("setup_primary(silnt=True)", "TypeError", "silnt"),
        ("setup_primary(args='one two')", "TypeError", "list of words"),
        ("setup_primary(scheduling_policy='random')", "ConfigError", "least-connections"),
        ("setup_primary(serialization='pickle')", "ConfigError", "msgpack"),
        ("__setattr__('scheduling_policy', 'random')", "ConfigError", "random"),
    ],
)
def test_bad_settings_are_refused(start_lab: StartLab, call: str, kind: str, says: str) -> None:
    """An unknown name or a value without sense raises where it is said."""
    lab = start_lab()
    found = lab.do(f"cluster.{call}")
    assert found["raised"] == kind
    assert says in found["text"]


def test_a_process_that_cannot_be_started_raises(start_lab: StartLab) -> None:
    """`fork` raises OSError, holds no worker for it, and leaks nothing; the next one starts."""
    lab = start_lab()
    lab.do("cluster.setup_primary(cwd='/no/such/folder')")
    lab.do("cluster.fork()")  # what the first fork opens stays
    held = lab.do("len(os.listdir('/proc/self/fd'))")
    assert [lab.do("cluster.fork()")["raised"] for _ in range(3)] == ["FileNotFoundError"] * 3
    assert lab.do("len(os.listdir('/proc/self/fd'))") == held
    assert lab.do("cluster.workers") == {}
    lab.do("cluster.setup_primary(cwd=None)")
    lab.fork(1)


def test_the_policy_by_its_names_and_by_the_environment(start_lab: StartLab) -> None:
    """Node's constants, the names of `--policy`, the attribute, and SHAREDCLUSTER_POLICY, which takes Node's words."""
    lab = start_lab(env={"SHAREDCLUSTER_POLICY": "none"})
    assert lab.do("cluster.scheduling_policy == cluster.SCHED_NONE == 'shared'") is True
    lab.do("cluster.scheduling_policy = cluster.SCHED_RR")
    assert lab.do("[cluster.scheduling_policy, cluster.settings.scheduling_policy]") == ["round-robin"] * 2
    lab.do("cluster.setup_primary(scheduling_policy='sticky')")
    assert lab.do("cluster.scheduling_policy") == "sticky"


def test_uid_and_gid(start_lab: StartLab) -> None:
    """Workers of another user and group, where the primary may do that; else `fork` raises."""
    lab = start_lab()
    lab.do(f"cluster.setup_primary(uid={os.getuid()}, gid=65534)")
    if os.getuid() != 0:
        assert lab.do("cluster.fork()")["raised"] == "PermissionError"
        return
    lab.fork(1)
    status = Path(f"/proc/{lab.pid(1)}/status").read_text()
    assert "Gid:\t65534" in status


def test_a_private_redis_for_this_run(start_lab: StartLab) -> None:
    """`redis="auto"`: workers find its URL; it outlives kill -9 of its keeper, and is gone with the last process."""
    lab = start_lab(1)
    assert "SHAREDCLUSTER_REDIS_URL" not in lab.at(1, "dict(os.environ)")
    lab.do("cluster.setup_primary(redis='auto')")
    lab.fork(1)
    url = lab.at(2, "os.environ['SHAREDCLUSTER_REDIS_URL']")
    ask = f"__import__('redis').Redis.from_url({url!r}).ping()"
    assert lab.at(2, ask) is True
    family = psutil.Process(lab.process.pid).children()
    workers = {lab.pid(1), lab.pid(2)}
    keeper = next(child for child in family if child.pid not in workers)
    keeper.kill()
    lab.wait_for("started again")
    wait_until(lambda: lab.at(2, ask) is True, "it answers again")
    folder = Path(url.removeprefix("unix://").partition("?")[0]).parent
    lab.note_processes()
    lab.process.stdin.close()  # type: ignore[union-attr]
    lab.signal(signal.SIGTERM)
    assert lab.wait() == 0
    wait_until(lambda: not lab.left_over() and not folder.exists(), "nothing is left")
