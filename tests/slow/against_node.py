"""The same scenarios on Node's cluster and on ours, seen by the same client: `python -m tests.slow.against_node`.

Prints the table of docs/from-node.md. What a cell says was seen in this run; nothing is taken from anybody's manual.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tests.program_process import PROGRAMS, Lab, is_alive, who
from tests.redis_process import free_port
from tests.waiting import wait_until

PATIENCE = 5.0
"""Seconds a client waits for its answer."""


class NodeLab(Lab):
    """tests/programs/lab.js."""

    program = str(PROGRAMS / "lab.js")
    interpreter = shutil.which("node") or "node"


def choose(lab: Lab, node: str, ours: str) -> str:
    """The line in the lab's own language."""
    return node if isinstance(lab, NodeLab) else ours


def outcome(answer: Future[Any]) -> str:
    """What the client saw."""
    try:
        return f"answered by worker {answer.result(PATIENCE + 5)['id']}"
    except TimeoutError:
        return f"no answer within {PATIENCE:g} s"
    except Exception as error:
        text = str(error)
        if "timed out" in text:
            return f"no answer within {PATIENCE:g} s"
        if "refused" in text:
            return "refused"
        return "cut off"


def handed_to(lab: Lab, port: int, path: str, pool: ThreadPoolExecutor, timeout: float = 60) -> Future[Any]:
    """Send a request that a worker is busy with."""
    answer = pool.submit(who, port, path, timeout)
    time.sleep(0.4)
    return answer


def crash_before_it_was_read(lab: Lab) -> str:
    """A worker that stands still is killed while a connection is on its way to it; another worker is there."""
    lab.fork(1)
    port = lab.serve(1, port=free_port())
    with ThreadPoolExecutor(2) as pool:
        handed_to(lab, port, "/block/60", pool)
        waiting = handed_to(lab, port, "/", pool, PATIENCE)
        lab.fork(1)
        lab.serve(2, port=port)
        os.kill(lab.pid(1), signal.SIGKILL)
        return outcome(waiting)


def last_worker_dies(lab: Lab) -> str:
    """The only worker is killed; a client connects before its replacement listens."""
    lab.fork(1)
    port = lab.serve(1, port=free_port())
    os.kill(lab.pid(1), signal.SIGKILL)
    lab.wait_exit(1)
    with ThreadPoolExecutor(1) as pool:
        waiting = handed_to(lab, port, "/", pool, PATIENCE)
        lab.fork(1)
        lab.serve(2, port=port)
        return outcome(waiting)


def out_of_descriptors(lab: Lab) -> str:
    """One of two workers is at its limit of descriptors; 6 clients; then the limit is lifted, and 6 more come."""
    lab.fork(2)
    port = lab.serve(1, 2, port=free_port())
    for _ in range(4):
        who(port)
    pid = lab.pid(1)
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (next(n for n in range(1000) if n not in used), limits[1]))
    with ThreadPoolExecutor(6) as pool:
        answers = [outcome(each) for each in [pool.submit(who, port, "/", PATIENCE) for _ in range(6)]]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    time.sleep(0.5)
    with ThreadPoolExecutor(6) as pool:
        later = [outcome(each) for each in [pool.submit(who, port, "/", PATIENCE) for _ in range(6)]]
    answered = sum(each.startswith("answered") for each in answers)
    back = "has work again" if "answered by worker 1" in later else "gets nothing any more"
    return f"{answered} of 6 answered; afterwards the worker {back}"


def kill_with_a_request_in_flight(lab: Lab) -> str:
    """`worker.kill()` while it answers."""
    lab.fork(1)
    port = lab.serve(1, port=free_port())
    with ThreadPoolExecutor(1) as pool:
        answer = handed_to(lab, port, "/slow/1", pool)
        lab.do("cluster.workers[1].kill()")
        seen = outcome(answer)
    code, name, asked = lab.wait_exit(1)
    flag = choose(lab, "exitedAfterDisconnect", "exited_after_disconnect")
    return f"{seen}; exit {name or code}, {flag} {str(asked).lower()}"


def primary_is_killed(lab: Lab) -> str:
    """kill -9 of the primary while a worker answers."""
    lab.fork(1)
    port = lab.serve(1, port=free_port())
    with ThreadPoolExecutor(1) as pool:
        answer = handed_to(lab, port, "/slow/1", pool)
        lab.signal(signal.SIGKILL)
        seen = outcome(answer)
    wait_until(lambda: not lab.left_over(), "the worker is gone")
    return seen


def disconnect_calls_back(lab: Lab) -> str:
    """`cluster.disconnect(callback)` with two workers, one of which needs 1.5 s more."""
    lab.fork(2)
    first, second = (lab.serve(id, port=free_port()) for id in (1, 2))
    with ThreadPoolExecutor(2) as pool:
        handed_to(lab, first, "/slow/0.5", pool)
        handed_to(lab, second, "/slow/2.5", pool)
        lab.do(
            choose(
                lab, "cluster.disconnect(() => say({called: true}))", "cluster.disconnect(lambda: say(called=True))"
            )
        )
        wait_until(lambda: [fact for fact in lab.facts if "called" in fact], "it calls back")
        lab.wait_event("exit", 2)
        exits = [fact for fact in lab.facts if fact.get("event") == "exit" and fact["level"] == "cluster"]
        before = sum(lab.facts.index(fact) < called_at(lab) for fact in exits)
        return f"called after {before} of 2 exits"


def called_at(lab: Lab) -> int:
    """Which line says that the callback was called."""
    return next(number for number, fact in enumerate(lab.facts) if "called" in fact)


def worker_with_a_timer(lab: Lab) -> str:
    """`worker.disconnect()` for a worker that has a timer of its own running, as a library's refresh would be."""
    lab.fork(1)
    lab.serve(1, port=free_port())
    pid = lab.pid(1)
    every = "def tick():\n    while True: time.sleep(0.1)\nimport threading; threading.Thread(target=tick).start()"
    lab.at(1, choose(lab, "setInterval(() => {}, 100) && null", every))
    lab.do(
        "cluster.workers[1].disconnect() && null" if isinstance(lab, NodeLab) else "cluster.workers[1].disconnect()"
    )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and is_alive(pid):
        time.sleep(0.05)
    return f"still there after {PATIENCE:g} s" if is_alive(pid) else "gone"


def disconnect_and_the_primary_ends(lab: Lab) -> str:
    """A worker that is disconnecting, with a request in flight, when the primary exits."""
    lab.fork(1)
    port = lab.serve(1, port=free_port())
    with ThreadPoolExecutor(1) as pool:
        answer = handed_to(lab, port, "/slow/1", pool)
        lab.do(
            "cluster.workers[1].disconnect() && null"
            if isinstance(lab, NodeLab)
            else "cluster.workers[1].disconnect()"
        )
        time.sleep(0.2)
        lab.signal(signal.SIGKILL)
        seen = outcome(answer)
    wait_until(lambda: not lab.left_over(), "the worker is gone")
    time.sleep(0.2)
    crashed = next((word for word in ("ERR_IPC_DISCONNECTED", "ERR_IPC_CHANNEL_CLOSED") if word in lab.output), "")
    return f"{seen}; the worker {'crashes with ' + crashed if crashed else 'exits in order'}"


def reserved_words(lab: Lab) -> str:
    """A worker sends `{"cmd": "NODE_ROUTE", "to": "Ulm"}` to the primary."""
    lab.fork(1)
    wish = choose(lab, "process.send({cmd: 'NODE_ROUTE', to: 'Ulm'}) && null",
                  "cluster.worker.send({'cmd': 'NODE_ROUTE', 'to': 'Ulm'}) and None")  # fmt: skip
    lab.at(1, wish)
    time.sleep(0.5)
    found = [fact for fact in lab.facts if fact.get("event") == "message"]
    return "arrives" if found else "never arrives, and nobody is told"


def kept_alive_client(lab: Lab) -> str:
    """A keep-alive client between two requests while its worker is disconnected and another one stays."""
    import http.client

    lab.fork(2)
    port = lab.serve(1, 2, port=free_port())
    clients = [http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE) for _ in range(4)]
    for client in clients:
        client.request("GET", "/")
        client.getresponse().read()
    sockets = [client.sock for client in clients]
    lab.do(
        "cluster.workers[1].disconnect() && null" if isinstance(lab, NodeLab) else "cluster.workers[1].disconnect()"
    )
    lab.wait_exit(1)
    kept = 0
    for client, before in zip(clients, sockets, strict=True):
        client.auto_open = 0
        try:
            client.request("GET", "/")
            kept += client.getresponse().status == 200 and client.sock is before
        except (OSError, http.client.HTTPException):
            continue
        finally:
            client.close()
    return f"{kept} of 4 connections live on"


SCENARIOS: dict[str, Callable[[Lab], str]] = {
    "a worker is killed with a connection on its way to it, another worker is there": crash_before_it_was_read,
    "the only worker is killed, a client connects before its replacement listens": last_worker_dies,
    "one of two workers is out of descriptors": out_of_descriptors,
    "`worker.kill()` with a request in flight": kill_with_a_request_in_flight,
    "the primary is killed with a request in flight": primary_is_killed,
    "`cluster.disconnect(callback)`, two workers, one slow": disconnect_calls_back,
    "`worker.disconnect()`, and the worker has a timer of its own": worker_with_a_timer,
    "`worker.disconnect()` with a request in flight, then the primary is killed": disconnect_and_the_primary_ends,
    "`worker.disconnect()`, keep-alive clients between two requests": kept_alive_client,
    '`send({"cmd": "NODE_ROUTE", ...})`': reserved_words,
}


def run(scenario: Callable[[Lab], str], kind: type[Lab]) -> str:
    """One scenario in one lab."""
    lab = kind()
    try:
        return scenario(lab)
    except AssertionError as error:
        return f"(failed: {error})"
    finally:
        lab.close()


def main() -> None:
    """Print the table."""
    version = subprocess.check_output(["node", "--version"], text=True).strip()
    print(f"| scenario | Node {version} | sharedcluster |\n|---|---|---|")
    for name, scenario in SCENARIOS.items():
        print(f"| {name} | {run(scenario, NodeLab)} | {run(scenario, Lab)} |", flush=True)


if __name__ == "__main__":
    main()
