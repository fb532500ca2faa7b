"""How workers end: by accident, by a signal, asked to, all together, and when their primary is gone."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.program_process import StartLab, StartProgram, is_alive, who
from tests.redis_process import free_port
from tests.waiting import wait_until


@pytest.mark.parametrize("code", [0, 1, 42])
def test_an_exit_code_is_told_once(start_lab: StartLab, code: int) -> None:
    """`os._exit(code)`: one disconnect, one exit with the code, not asked for; the process is gone."""
    lab = start_lab(1)
    pid = lab.pid(1)
    lab.do(f"cluster.workers[1].send({{'lab': -1, 'code': 'os._exit({code})'}})")
    assert lab.wait_exit(1) == (code, None, False)
    assert not is_alive(pid)
    assert [len(lab.events(name, 1)) for name in ("disconnect", "exit")] == [1, 1]
    assert lab.do("cluster.workers") == {}


def test_sys_exit_in_a_handler_and_an_exception_in_the_script(start_lab: StartLab, tmp_path: Path) -> None:
    """`sys.exit(7)` in a message handler ends it with 7; a script that raises ends with 1 and its traceback."""
    lab = start_lab(1)
    lab.do("cluster.workers[1].send({'lab': -1, 'code': 'sys.exit(7)'})")
    assert lab.wait_exit(1) == (7, None, False)
    (tmp_path / "raises.py").write_text("import nothing_of_that_name\n")
    lab.do(f"cluster.setup_primary(exec={str(tmp_path / 'raises.py')!r})")
    lab.fork(1)
    assert lab.wait_exit(2) == (1, None, False)
    assert "No module named 'nothing_of_that_name'" in lab.output
    assert "entry.py" not in lab.output.split("ModuleNotFoundError")[0].splitlines()[-1]


def test_sigkill(start_lab: StartLab) -> None:
    """`kill("SIGKILL")`: no code, the signal's name, not asked for, once."""
    lab = start_lab(2)
    pid = lab.pid(1)
    lab.do("cluster.workers[1].kill('SIGKILL')")
    assert lab.wait_exit(1) == (None, "SIGKILL", False)
    assert not is_alive(pid)
    assert [len(lab.events(name, 1)) for name in ("disconnect", "exit")] == [1, 1]
    assert lab.do("list(cluster.workers)") == [2]


def test_kill_lets_it_finish(start_lab: StartLab) -> None:
    """`kill()` is TERM, and TERM drains: what is in flight is answered (in Node it is cut)."""
    lab = start_lab(1)
    port = lab.serve(1)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(who, port, "/slow/0.7")
        lab.wait_begun()
        lab.do("cluster.workers[1].kill()")
        assert answer.result()["id"] == 1
    assert lab.wait_exit(1) == (0, None, True)


def test_term_by_hand_drains_too(start_lab: StartLab) -> None:
    """TERM sent to the worker's process by somebody else: it says that it goes, answers what it has, exits with 0."""
    lab = start_lab(1)
    port = lab.serve(1)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(who, port, "/slow/0.7")
        lab.wait_begun()
        os.kill(lab.pid(1), signal.SIGTERM)
        assert answer.result()["id"] == 1
    assert lab.wait_exit(1) == (0, None, True)


@pytest.mark.parametrize("stuck", ["while True: pass", "sleep_in_c(60)"])
def test_a_worker_that_stands_still_is_ended(start_lab: StartLab, stuck: str) -> None:
    """kill() of a worker in an endless loop or in C: TERM after the deadline, then KILL."""
    lab = start_lab()
    lab.do("cluster.setup_primary(graceful_timeout=0.5)")
    lab.fork(1)
    lab.do(f"cluster.workers[1].send({{'lab': -1, 'code': {stuck!r}}})")
    lab.do("cluster.workers[1].kill()")  # what it is sent is taken in order, so it is stuck before it can hear this
    assert lab.wait_exit(1) == (None, "SIGKILL", True)
    assert "gets TERM" in lab.output


@pytest.mark.parametrize("how", ["cluster.worker.disconnect()", "cluster.worker.kill()", "cluster.worker.destroy()"])
def test_a_worker_leaves_by_itself(start_lab: StartLab, how: str) -> None:
    """From inside: asked for is true on both sides, whichever of its events comes first."""
    lab = start_lab(1)
    port = lab.serve(1)
    assert who(port)["id"] == 1
    assert lab.at(1, "cluster.worker.exited_after_disconnect") is None
    assert lab.at(1, f"{how} or cluster.worker.exited_after_disconnect") is True
    assert lab.wait_exit(1) == (0, None, True)
    assert lab.events("disconnect", 1, level="inside")


def test_disconnect_waits_for_what_is_in_flight_up_to_a_deadline(start_lab: StartLab) -> None:
    """A request within `graceful_timeout` is answered, one beyond it is cut, and the worker is gone then."""
    lab = start_lab()
    lab.do("cluster.setup_primary(graceful_timeout=1.5)")
    lab.fork(2)
    first, second = (lab.at(id, f"serve({free_port()})") for id in (1, 2))
    with ThreadPoolExecutor(2) as pool:
        short, long = pool.submit(who, first, "/slow/0.7"), pool.submit(who, second, "/slow/60", 30)
        lab.wait_begun(2)
        lab.do("[w.disconnect() for w in cluster.workers.values()]")
        assert short.result()["id"] == 1
        assert lab.wait_exit(1) == (0, None, True)
        assert long.exception() is not None
    assert lab.wait_exit(2) == (0, None, True)
    assert "1 requests were cut" in lab.output


def test_idle_connections_move_to_another_worker(start_lab: StartLab) -> None:
    """A keep-alive client of a worker that is let go never notices: its next request is answered by another one."""
    lab = start_lab(2)
    port = lab.serve(1, 2)
    clients = [http.client.HTTPConnection("127.0.0.1", port, timeout=10) for _ in range(4)]
    for client in clients:
        client.request("GET", "/")
        client.getresponse().read()
        assert client.sock is not None
    sockets = [client.sock for client in clients]
    lab.do("cluster.workers[1].disconnect()")
    lab.wait_exit(1)
    for client, before in zip(clients, sockets, strict=True):
        client.request("GET", "/")
        answer = client.getresponse()
        assert b'"id": 2' in answer.read()
        assert client.sock is before
        client.close()


def test_the_callback_of_disconnect_comes_after_the_last_exit(start_lab: StartLab) -> None:
    """Workers that need different times: Node calls back after the first exit, here it is after the last."""
    lab = start_lab(3)
    ports = [lab.at(id, f"serve({free_port()})") for id in (1, 2, 3)]
    with ThreadPoolExecutor(2) as pool:
        answers = [
            pool.submit(who, port, f"/slow/{seconds}") for port, seconds in zip(ports, (0.6, 1.6), strict=False)
        ]
        lab.wait_begun(2)
        lab.do("cluster.disconnect(lambda: say(called=[len(lab_exits), list(cluster.workers)]))\n"
               "lab_exits = []; cluster.on('exit', lambda w, *how: lab_exits.append(w.id))")  # fmt: skip
        called = wait_until(lambda: [f for f in lab.facts if "called" in f], "it calls back")
        assert called[0]["called"] == [3, []]
        assert [answer.result()["id"] for answer in answers] == [1, 2]
    exits = [lab.events("exit", id)[0]["at"] for id in (1, 2, 3)]
    assert called[0]["at"] >= max(exits) > min(exits) + 1


def test_disconnect_without_workers_calls_back_later(start_lab: StartLab) -> None:
    """Not inside the call, but in the next turn."""
    lab = start_lab()
    lab.do("cluster.disconnect(lambda: say(called=True))\nsay(after='the call')")
    wait_until(lambda: [f for f in lab.facts if "called" in f], "it calls back")
    assert [next(iter(set(f) & {"after", "called"})) for f in lab.facts if {"after", "called"} & set(f)] == [
        "after",
        "called",
    ]


def test_disconnect_serves_the_queue_first(start_lab: StartLab) -> None:
    """Who was accepted, or waits in the kernel, is answered before the listener closes; later ones are refused."""
    lab = start_lab(1)
    port = lab.serve(1)
    clients = [http.client.HTTPConnection("127.0.0.1", port, timeout=20) for _ in range(10)]
    for client in clients:
        client.request("GET", "/block/0.1")  # so it is connected, and at least in the kernel's queue
    lab.wait_begun()
    lab.do("cluster.disconnect()")
    assert [json.loads(client.getresponse().read())["id"] for client in clients] == [1] * 10
    for client in clients:
        client.close()
    assert lab.wait_exit(1) == (0, None, True)
    with pytest.raises(OSError, match="refused"):
        who(port)


def test_everything_again_in_the_same_primary(start_lab: StartLab) -> None:
    """4 workers with 2 servers each serve, are let go, and the whole is started again on the same ports."""
    lab = start_lab()
    ports = free_port(), free_port()
    for turn in range(2):
        ids = lab.fork(4)
        for id in ids:
            assert [lab.at(id, f"serve({port})") for port in ports] == list(ports)
        assert {who(port)["id"] for port in ports for _ in range(8)} == set(ids)
        lab.do(f"cluster.disconnect(lambda: say(called={turn}))")
        wait_until(lambda: [fact for fact in lab.facts if "called" in fact][turn:], "all are gone")  # noqa: B023 - called here
        assert [lab.wait_exit(id) for id in ids] == [(0, None, True)] * 4


def test_disconnecting_twice_and_killing_afterwards_is_one_end(start_lab: StartLab) -> None:
    """Every mixture of the ways out is one disconnect and one exit."""
    lab = start_lab(4)
    lab.do("a, b, c, d = cluster.workers.values()\na.disconnect(); a.disconnect(); b.disconnect(); b.kill()")
    lab.do("c.kill(); c.disconnect()")
    lab.do("d.disconnect()\ncluster.disconnect(); cluster.disconnect()")
    assert [lab.wait_exit(id) for id in (1, 2, 3, 4)] == [(0, None, True)] * 4
    assert [len(lab.events(name)) for name in ("disconnect", "exit")] == [4, 4]


def test_a_storm_leaves_nothing_behind(start_lab: StartLab) -> None:
    """Every way out for 5 workers, four times over: each end told once; no process, descriptor or row is left."""
    lab = start_lab()
    before = None
    for turn in range(4):
        ids = lab.fork(5)
        lab.serve(*ids[:3], port=0)
        ways = [
            "disconnect()",
            "kill()",
            "kill('SIGKILL')",
            "kill('SIGQUIT')",
            "send({'lab': -1, 'code': 'os._exit(3)'})",
        ]
        lab.do(";".join(f"cluster.workers[{id}].{ways[(id + turn) % 5]}" for id in ids))
        lab.do("cluster.disconnect()") if turn % 2 else None
        for id in ids:
            lab.wait_exit(id)
        wait_until(
            lambda: lab.do("[len(cluster.workers), len(cluster.on.__self__._departures)]") == [0, 0], "all are gone"
        )
        lab.do("cluster.on.__self__.servers.close()")
        held = lab.do("[len(os.listdir('/proc/self/fd')), len(cluster.on.__self__._board._free)]")
        before = before or held
        assert held == before
    assert len(lab.events("exit")) == len(lab.events("disconnect")) == 20


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_primary_ends(start_lab: StartLab, number: signal.Signals) -> None:
    """Killed or told to stop: the workers answer what is in flight and go (Node's workers cut it at once)."""
    lab = start_lab(2)
    port = lab.serve(1, 2)
    lab.note_processes()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(who, port, "/slow/0.7")
        lab.wait_begun()
        lab.signal(number)
        assert answer.result()["id"] in (1, 2)
    lab.process.stdin.close()  # type: ignore[union-attr]
    assert lab.wait() == (0 if number is signal.SIGTERM else -9)
    wait_until(lambda: not lab.left_over(), "no worker is left")
    with pytest.raises(OSError, match="refused"):
        who(port)


def test_ctrl_c_reaches_all_and_drains_once(start_lab: StartLab) -> None:
    """INT to the whole process group, as from a terminal: the primary drains, no traceback anywhere, code 0."""
    lab = start_lab(2)
    port = lab.serve(1, 2)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(who, port, "/slow/0.7")
        lab.wait_begun()
        os.killpg(lab.process.pid, signal.SIGINT)
        assert answer.result()["id"] in (1, 2)
    lab.process.stdin.close()  # type: ignore[union-attr]
    assert lab.wait() == 0
    assert "Traceback" not in lab.output


@pytest.mark.parametrize("pause", [0.0, 0.1, 0.2])
def test_ctrl_c_while_workers_start(start_program: StartProgram, tmp_path: Path, pause: float) -> None:
    """INT to the group before the workers' interpreters are up: no traceback, nothing left, code 0."""
    script = tmp_path / "starts.py"
    script.write_text(
        "from sharedcluster import cluster\n"
        "if cluster.is_primary:\n    for _ in range(3): cluster.fork()\n"
        "    cluster.on('fork', lambda w: print('forked', flush=True))\n"
        "else:\n    cluster.serve(lambda environ, start: [], port=0)\n"
    )
    program = start_program(str(script))
    program.wait_for("forked")
    time.sleep(pause)
    program.note_processes()
    os.killpg(program.process.pid, signal.SIGINT)
    assert program.wait() == 0
    assert "Traceback" not in program.output
    assert not program.left_over()


def test_a_second_signal_stops_now(start_lab: StartLab) -> None:
    """The first INT drains, the second one cuts what is in flight."""
    lab = start_lab(1)
    port = lab.serve(1)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(who, port, "/slow/60", 30)
        lab.wait_begun()
        lab.process.send_signal(signal.SIGINT)
        time.sleep(0.6)
        lab.process.send_signal(signal.SIGINT)
        assert answer.exception() is not None
    lab.process.stdin.close()  # type: ignore[union-attr]
    assert lab.wait() == 0


def test_a_handler_for_the_signal_is_the_scripts(start_lab: StartLab) -> None:
    """What the script installed with signal.signal is called, in the loop, and nothing else happens."""
    lab = start_lab(1)
    lab.do("import signal\nsignal.signal(signal.SIGTERM, lambda number, frame: say(got=number))")
    lab.process.send_signal(signal.SIGTERM)
    assert wait_until(lambda: [f for f in lab.facts if "got" in f], "it is called")[0]["got"] == 15
    assert lab.do("[w.state for w in cluster.workers.values()]") == ["online"]


@pytest.mark.parametrize("fork", ["cluster.fork()", "cluster.call_later(0, cluster.fork)"])
def test_a_supervisor_that_always_forks_still_stops(start_program: StartProgram, tmp_path: Path, fork: str) -> None:
    """`on("exit", fork)` without a condition: TERM drains and ends; no worker is started on the way out."""
    script = tmp_path / "always.py"
    script.write_text(
        "from sharedcluster import cluster\n"
        "if cluster.is_primary:\n    for _ in range(2): cluster.fork()\n"
        f"    cluster.on('exit', lambda w, c, s: {fork})\n"
        "    cluster.on('online', lambda w: print('online', w.id, flush=True))\n"
    )
    program = start_program(str(script))
    program.wait_for("online 2")
    os.kill(int(program.process.pid), signal.SIGTERM)
    assert program.wait() == 0
    assert "online 3" not in program.output
    assert "Traceback" not in program.output


def test_a_script_that_raises_after_forking(start_program: StartProgram, tmp_path: Path) -> None:
    """The primary's own exception: its traceback, its excepthook, exit code 1, and the workers are let go."""
    script = tmp_path / "raises.py"
    script.write_text(
        "import sys\nfrom sharedcluster import cluster\n"
        "if cluster.is_primary:\n    cluster.on('exit', lambda w, *how: print('exit', how, flush=True))\n"
        "    cluster.fork()\n    sys.excepthook = lambda kind, e, tb: print('mine:', e, flush=True)\n    1 / 0\n"
    )
    program = start_program(str(script))
    assert program.wait() == 1
    assert "mine: division by zero" in program.output


def test_sys_exit_in_a_handler_ends_the_primary(start_program: StartProgram, tmp_path: Path) -> None:
    """As process.exit() in Node: the code is the primary's, and the workers go by themselves."""
    script = tmp_path / "leaves.py"
    script.write_text(
        "import sys\nfrom sharedcluster import cluster\n"
        "if cluster.is_primary:\n    cluster.fork().on('online', lambda: sys.exit(5))\n"
    )
    program = start_program(str(script))
    assert program.wait() == 5
    wait_until(lambda: not program.left_over(), "no worker is left")


def test_a_script_that_never_ends_is_let_go_too(start_lab: StartLab, tmp_path: Path) -> None:
    """A worker whose script loops for ever: its `finally` runs when it is let go, and it exits with 0."""
    (tmp_path / "forever.py").write_text(
        "import time\nfrom sharedcluster import cluster\n"
        "try:\n    while True: time.sleep(1)\nfinally:\n    print('cleaned up', flush=True)\n"
    )
    lab = start_lab()
    lab.do(f"cluster.setup_primary(exec={str(tmp_path / 'forever.py')!r})")
    lab.fork(1)
    lab.do("cluster.workers[1].disconnect()")
    assert lab.wait_exit(1) == (0, None, True)
    lab.wait_for("cleaned up")
