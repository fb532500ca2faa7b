"""`child_process.fork`: a program with a message channel, from a plain process and from a patched one."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.program_process import PROGRAMS, Program, StartLab, StartProgram, who
from tests.waiting import wait_until

pytestmark = pytest.mark.parametrize("kind", ["plain", "gevent"])


def facts(program: Program) -> list[list[Any]]:
    """What the parent said."""
    return [json.loads(line) for line in program.lines if line.startswith("[")]


def run(start: StartProgram, kind: str, what: str, *more: str) -> list[list[Any]]:
    """Run one of the conversations of tests/programs/parent.py to its end."""
    program = start(str(PROGRAMS / "parent.py"), kind, what, *more)
    assert program.wait() == 0, program.output
    assert "Traceback" not in program.output
    return facts(program)[1:]


def test_messages_both_ways(start_program: StartProgram, kind: str) -> None:
    """Arguments, environment and folder arrive; messages come back in order; then disconnect, then exit."""
    said = run(start_program, kind, "conversation")
    messages = [rest[0] for word, *rest in said if word == "message"]
    assert messages == [[["one", "two"], "/", "red", False], {"n": [1, None]}, ["long", 800_000]]
    words = [word for word, *_ in said]
    assert words.index("disconnect") < words.index("exit") < words.index("code") < words.index("late")
    assert ["taken", None] in said
    assert ["code", 0, True, False] in said
    assert ["late", False] in said


def test_every_ending(start_program: StartProgram, kind: str) -> None:
    """sys.exit in a handler, a signal, and a child that ends because nobody speaks to it any more."""
    said = [fact for fact in run(start_program, kind, "endings") if fact[0] in ("exit", "code", "killed")]
    assert said == [
        ["exit", 3, None], ["code", 3, None],
        ["killed", True], ["exit", None, "SIGTERM"], ["code", None, "SIGTERM"], ["killed", False],
        ["exit", 0, None], ["code", 0],
    ]  # fmt: skip


def test_silent_children(start_program: StartProgram, kind: str) -> None:
    """Their output is told and not written."""
    said = run(start_program, kind, "silent")
    out = "".join(fact[1] for fact in said if fact[0] == "stdout")
    assert "to out" in out
    assert any("to err" in fact[1] for fact in said if fact[0] == "stderr")


def test_a_program_in_between_is_not_the_child(start_program: StartProgram, kind: str, tmp_path: Path) -> None:
    """A grandchild that inherits the environment, and even the descriptor, is nobody's child."""
    assert ["code", 4] in run(start_program, kind, "grandchild", str(tmp_path))


def test_ten_at_a_time(start_program: StartProgram, kind: str) -> None:
    """Each gets its own messages and ends well."""
    codes, counts = run(start_program, kind, "several")[-1]
    assert codes == [0] * 10
    assert counts == {str(n): 20 for n in range(10)}


def test_what_cannot_be_started(start_program: StartProgram, kind: str) -> None:
    """A missing file is the child's error, a missing folder ours."""
    said = run(start_program, kind, "missing")
    assert said == [["code", 2], ["raised", "FileNotFoundError"]]


def test_a_parent_that_is_killed(start_program: StartProgram, kind: str) -> None:
    """The child hears `disconnect` and ends by itself: nothing is left."""
    program = start_program("-c", _FOREVER.format(patch=kind == "gevent", echo=str(PROGRAMS / "echo.py")))
    program.wait_for("started")
    program.signal(signal.SIGKILL)
    program.wait()
    wait_until(lambda: not program.left_over(), "the child is gone")


_FOREVER = """
if {patch}:
    from gevent import monkey; monkey.patch_all()
from sharedcluster import child_process
child = child_process.fork({echo!r})
child.on("message", lambda m: print("started", flush=True))
child.send("hello")
child.wait()
"""


def test_from_a_worker_and_from_a_primary(start_lab: StartLab, kind: str) -> None:
    """In a cluster's processes too; a worker goes on serving while a child works."""
    lab = start_lab(1)
    echo = str(PROGRAMS / "echo.py")
    code = (
        "from sharedcluster import child_process; got = []\n"
        f"child = child_process.fork({echo!r}); child.on('message', got.append)\n"
        "child.send('hello'); child.send('leave')\n"
    )
    if kind == "plain":
        lab.do(code)
        wait_until(lambda: lab.do("[got, child.exit_code]") == [["hello"], 0], "it came back and ended")
    else:
        port = lab.serve(1)
        lab.at(1, code)
        assert who(port)["id"] == 1
        assert lab.at(1, "[child.wait(10), got]") == [0, ["hello"]]
