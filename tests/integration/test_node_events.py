"""Node's cluster module in Python: events, their order and arguments, and the states of a worker."""

from __future__ import annotations

import os
from pathlib import Path

from tests.program_process import StartLab, StartProgram, who
from tests.waiting import wait_until


def test_events_come_in_order_once_and_with_their_arguments(start_lab: StartLab) -> None:
    """fork, online, listening, disconnect, exit: once per worker, the worker's own before the cluster's."""
    lab = start_lab(2)
    port = lab.serve(1, 2)
    lab.do("cluster.disconnect()")
    for id in (1, 2):
        assert lab.wait_exit(id) == (0, None, True)
        mine = [(f["event"], f["level"]) for f in lab.facts if f.get("id") == id or f.get("level") == f"worker {id}"]
        own = [(e, level) for e, level in mine if level != "inside"]
        names = ("fork", "online", "listening", "disconnect", "exit")
        assert own == [(name, level) for name in names for level in (f"worker {id}", "cluster")]
        told = lab.events("listening", id)[0]["arguments"]
        fields = {"address": "127.0.0.1", "port": port, "address_type": 4, "fd": None}
        assert told == [["ListeningAddress", fields]]


def test_states_and_predicates_in_each_phase(start_lab: StartLab) -> None:
    """forked, online, listening, disconnected, dead; connected until `disconnect`, dead only at `exit`."""
    lab = start_lab(1)
    lab.serve(1)
    lab.do("cluster.workers[1].disconnect()")
    lab.wait_exit(1)
    seen = {name: lab.events(name, 1)[0] for name in ("fork", "online", "listening", "disconnect", "exit")}
    assert [seen[name]["state"] for name in seen] == ["forked", "online", "listening", "disconnected", "dead"]
    assert [seen[name]["connected"] for name in seen] == [True, True, True, False, False]
    assert [seen[name]["dead"] for name in seen] == [False, False, False, False, True]
    assert [seen[name]["asked"] for name in seen] == [None, None, None, True, True]
    assert lab.do("list(cluster.workers)") == []


def test_fork_answers_at_once_and_its_event_comes_later(start_lab: StartLab) -> None:
    """The worker is there when `fork` returns, so that handlers can be added before the first event."""
    lab = start_lab()
    found = lab.do("w = cluster.fork({'LAB': 'worker'}); result = [w.id, w.state, w.is_connected(), w.is_dead()]")
    assert found == [1, "forked", True, False]
    order = [fact.get("event", "answer") for fact in lab.facts if "event" in fact or "answer" in fact]
    lab.wait_event("online", 1)
    assert order[0] == "answer"
    assert [f["event"] for f in lab.facts if "event" in f] == ["setup", "fork", "online"]


def test_ids_count_up_and_slots_are_used_again(start_lab: StartLab) -> None:
    """A replacement has a new id and the slot of the one it replaces; both are in its environment."""
    lab = start_lab(2)
    os.kill(lab.pid(1), 9)
    lab.wait_exit(1)
    assert lab.fork() == [3]
    assert lab.do("[(w.id, w.slot) for w in cluster.workers.values()]") == [[2, 1], [3, 0]]
    assert lab.at(3, "[os.environ['SHAREDCLUSTER_WORKER_ID'], os.environ['SHAREDCLUSTER_SLOT']]") == ["3", "0"]


def test_a_workers_children_are_no_workers(start_lab: StartLab) -> None:
    """What says that a process is a worker is gone from its environment, and it is patched, before its first line."""
    lab = start_lab(1)
    assert lab.at(1, "'SHAREDCLUSTER_CHANNEL' in os.environ") is False
    code = "from sharedcluster import cluster; print(cluster.is_primary, cluster.worker)"
    wish = f"__import__('subprocess').check_output([sys.executable, '-c', {code!r}], text=True)"
    assert lab.at(1, wish) == "True None\n"
    assert lab.at(1, "__import__('gevent.monkey').monkey.is_module_patched('socket')") is True


def test_what_each_side_is(start_lab: StartLab) -> None:
    """The two roles see what is theirs; asking for the other's is an error that says so."""
    lab = start_lab(1)
    assert lab.do("[cluster.is_primary, cluster.is_worker, cluster.worker]") == [True, False, None]
    found = lab.at(1, "[cluster.is_primary, cluster.is_worker, cluster.worker.id, cluster.worker.process.pid]")
    assert found == [False, True, 1, lab.pid(1)]
    missing = lab.at(1, "cluster.fork()")
    assert missing["raised"] == "AttributeError"
    assert "primary's" in missing["text"]
    assert lab.do("cluster.serve(None)")["raised"] == "ConfigError"


def test_a_misspelt_event_is_an_error(start_lab: StartLab) -> None:
    """`on` with an unknown name raises, and names the nearest one."""
    lab = start_lab()
    found = lab.do("cluster.on('onlin', print)")
    assert found["raised"] == "ValueError"
    assert "'online'" in found["text"]


def test_once_off_and_decorators(start_lab: StartLab) -> None:
    """`once` is called once, `off` takes away, `on` without a function decorates."""
    lab = start_lab()
    lab.do(
        "seen = []\n"
        "cluster.once('online', lambda w: seen.append('once'))\n"
        "gone = cluster.on('online', lambda w: seen.append('gone')); cluster.off('online', gone)\n"
        "@cluster.on('online')\ndef online(worker): seen.append(worker.id)"
    )
    lab.fork(2)
    assert sorted(map(str, lab.do("seen"))) == ["1", "2", "once"]


def test_a_handler_that_raises_ends_nothing(start_lab: StartLab) -> None:
    """Its traceback is logged; the other handlers and the primary go on (in Node all processes end)."""
    lab = start_lab()
    lab.do("cluster.on('online', lambda w: 1 / 0)")
    lab.fork(1)
    lab.wait_for("ZeroDivisionError")
    assert who(lab.serve(1))["id"] == 1


def test_it_runs_a_module_with_m(start_program: StartProgram, tmp_path: Path) -> None:
    """`python -m shop` is the primary, and its workers run the module too, with its package."""
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "goods.py").write_text("NAME = 'tea'\n")
    (package / "__main__.py").write_text(
        "import sys\nfrom sharedcluster import cluster\nfrom .goods import NAME\n"
        "if cluster.is_primary:\n    cluster.fork()\n"
        "    cluster.on('message', lambda w, m: (print(m, flush=True), w.disconnect()))\n"
        "else:\n    cluster.worker.send([NAME, __name__, __package__, sys.argv[1:]])\n"
    )
    program = start_program("-m", "shop", "one", "two", cwd=tmp_path)
    assert program.wait() == 0
    assert "['tea', '__main__', 'shop', ['one', 'two']]" in program.output


def test_run_may_be_called_or_left_out(start_program: StartProgram, tmp_path: Path) -> None:
    """The loop runs in `cluster.run()`, which returns after the last exit, or at the end of the script."""
    common = (
        "from sharedcluster import cluster\n"
        "if cluster.is_worker:\n    cluster.worker.disconnect()\n"
        "else:\n    cluster.fork().on('exit', lambda *how: print('exit', how, flush=True))\n"
    )
    for name, ending in (
        ("implicit", "    print('end', flush=True)\n"),
        ("explicit", "    cluster.run()\n    print('end')\n"),
    ):
        script = tmp_path / f"{name}.py"
        script.write_text(common + ending)
        program = start_program(str(script))
        assert program.wait() == 0
        lines = [line for line in program.lines if line in ("end", "exit (0, None)")]
        assert lines == (["end", "exit (0, None)"] if name == "implicit" else ["exit (0, None)", "end"])


def test_a_script_without_workers_just_ends(start_program: StartProgram, tmp_path: Path) -> None:
    """Importing and asking keeps nobody alive."""
    script = tmp_path / "alone.py"
    script.write_text("from sharedcluster import cluster\nprint(cluster.is_primary, cluster.workers)\n")
    program = start_program(str(script))
    assert program.wait() == 0
    assert program.lines == ["True {}"]


def test_timers_are_called_in_the_loop_and_can_be_cancelled(start_lab: StartLab) -> None:
    """Node's setTimeout and clearTimeout."""
    lab = start_lab()
    lab.do("told = []; cluster.call_later(0.05, told.append, 'late'); cluster.call_later(0.01, told.append, 'soon')")
    lab.do("cluster.call_later(0.02, told.append, 'never').cancel()")
    wait_until(lambda: lab.do("told") == ["soon", "late"], "both timers")


def test_importing_the_package_loads_nothing_of_this(start_program: StartProgram) -> None:
    """The primary of `run` imports its own modules from the same package; the programs' side stays out of it."""
    code = (
        "import sys; from sharedcluster.cluster import events, primary; import sharedcluster.cluster.worker_handle\n"
        "print([name for name in sys.modules if name.startswith(('sharedcluster.program', 'gevent'))])"
    )
    program = start_program("-c", code)
    assert program.wait() == 0
    assert program.lines == ["[]"]
