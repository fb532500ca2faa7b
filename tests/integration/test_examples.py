"""The programs of examples/, started as a newcomer starts them."""

from __future__ import annotations

import http.client
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from tests.cluster_process import ROOT, Answer, request
from tests.program_process import Program, StartProgram
from tests.redis_process import free_port
from tests.waiting import wait_until


def started(start: StartProgram, name: str, workers: int = 2, **env: str) -> tuple[Program, int]:
    """Start an example; wait until all workers are there."""
    port = free_port()
    program = start(f"examples/{name}.py", env={"PORT": str(port), "WORKERS": str(workers), **env}, cwd=ROOT)

    def ready() -> bool:
        return len([line for line in program.lines if "listens on" in line or "is ready" in line]) >= workers

    wait_until(ready, "all workers listen", deadline=30)
    return program, port


def get(port: int, path: str = "/") -> str:
    """The body of an answer."""
    answer: Answer = request(port, "GET", path, timeout=30)
    assert answer.status == 200
    return answer.body.decode()


def stop(program: Program) -> None:
    """Ctrl+C, as from a terminal; it drains and ends with 0, without a word of Python's."""
    program.note_processes()
    os.killpg(program.process.pid, signal.SIGINT)
    assert program.wait() == 0
    assert "Traceback" not in program.output
    assert not program.left_over()


def test_hello(start_program: StartProgram) -> None:
    """Every worker answers, in turn; the primary says where."""
    program, port = started(start_program, "hello", workers=3)
    answers = [get(port) for _ in range(6)]
    assert {re.search(r"worker (\d)", answer)[1] for answer in answers} == {"1", "2", "3"}  # type: ignore[index]
    assert f"listens on http://127.0.0.1:{port}/" in program.output
    stop(program)


def test_hello_uses_all_cpus(start_program: StartProgram) -> None:
    """Without WORKERS there are as many as CPUs."""
    program = start_program("examples/hello.py", env={"PORT": "0"}, cwd=ROOT)
    count = os.cpu_count() or 1
    wait_until(lambda: program.output.count("listens on") == count, "one worker a CPU", deadline=30)
    stop(program)


def test_restart(start_program: StartProgram) -> None:
    """A crash is said and repaired, and nobody is refused, not even while the only worker is away."""
    program, port = started(start_program, "restart", workers=1)
    with suppress(OSError, http.client.HTTPException):
        get(port, "/crash")
    assert get(port) == "Hello from worker 2\n"
    assert "worker 1 died (1): starting another one" in program.output
    stop(program)
    assert "worker 2 left" in program.output
    assert "worker 3" not in program.output


def test_messages(start_program: StartProgram) -> None:
    """The sum comes to all workers; on TERM each says goodbye with its share, and what is in flight is answered."""
    program, port = started(start_program, "messages")
    for _ in range(6):
        get(port)
    wait_until(lambda: "6 in all workers" in get(port) or "7 in" in get(port), "the sum is known")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    said = [int(n) for n in re.findall(r"served (\d+) requests and says goodbye", program.output)]
    assert len(said) == 2
    assert sum(said) >= 7
    assert program.output.count("exited with 0") == 2
    assert not program.left_over()


def test_sum(start_program: StartProgram) -> None:
    """While one worker computes, the other one answers everybody else."""
    program, port = started(start_program, "sum")
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(get, port, "/sum/60000000")
        quick = []
        while not long.done():
            quick.append(get(port))
    assert "1800000030000000" in long.result()
    busy = re.match(r"worker \d", long.result())[0]  # type: ignore[index]
    assert any(not answer.startswith(busy) for answer in quick)
    stop(program)


def test_sessions(start_program: StartProgram) -> None:
    """One client, both workers, one count; a private Redis is started for it and is gone afterwards."""
    program, port = started(start_program, "sessions")
    cookie, workers = "", set()
    for visit in range(1, 7):
        answer = request(port, "GET", "/", headers={"Cookie": cookie} if cookie else {})
        cookie = answer.headers.get("set-cookie", cookie).split(";")[0]
        found = re.fullmatch(r"worker (\d): visit (\d) of nobody\n", answer.body.decode())
        assert found is not None
        assert int(found[2]) == visit
        workers.add(found[1])
    assert workers == {"1", "2"}
    form = {"Cookie": cookie, "Content-Type": "application/x-www-form-urlencoded"}
    login = request(port, "POST", "/login", body=b"user=ann", headers=form)
    assert login.status == 302
    cookie = login.headers["set-cookie"].split(";")[0]  # who asks with an older one may be answered from an older copy
    assert "visit 7 of ann" in request(port, "GET", "/", headers={"Cookie": cookie}).body.decode()
    stop(program)
