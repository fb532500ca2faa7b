"""A parent for the tests of child_process.fork; in a patched process if its first argument is "gevent"."""

import sys

if sys.argv[1] == "gevent":
    from gevent import monkey

    monkey.patch_all()


import json
import os
import time
from pathlib import Path
from typing import Any

from sharedcluster import child_process

ECHO = str(Path(__file__).parent / "echo.py")


def say(*words: Any) -> None:
    """One line for the test."""
    shown = [["long", len(word)] if isinstance(word, str) and len(word) > 1000 else word for word in words]
    os.write(1, (json.dumps(shown, default=str) + "\n").encode())


def started(**options: Any) -> child_process.ChildProcess:
    """A child whose events are told."""
    child = child_process.fork(ECHO, **options)
    for event in ("message", "disconnect", "exit", "stdout", "stderr"):
        child.on(event, lambda *arguments, event=event: say(event, *arguments))
    return child


def conversation() -> None:
    """Messages both ways, a callback, the end of it."""
    child = started(args=["one", "two"], env={"COLOUR": "red"}, cwd="/")
    child.send("arguments")
    child.send({"n": [1, None]}, lambda error: say("taken", error))
    child.send("x" * 800_000)
    child.send("leave")
    say("code", child.wait(20), child.is_dead(), child.is_connected())
    say("late", child.send(1, lambda error: say("why", error)))
    time.sleep(0.01)


def endings() -> None:
    """Every way a child can end."""
    child = started()
    child.send({"exit": 3})
    say("code", child.wait(20), child.signal_code)
    child = started()
    say("killed", child.kill())
    say("code", child.wait(20), child.signal_code)
    say("killed", child.kill())
    child = started()
    child.disconnect()
    say("code", child.wait(20))


def silent() -> None:
    """What a silent child writes comes as events."""
    child = started(silent=True)
    child.send("write")
    child.send("leave")
    child.wait(20)


def grandchild() -> None:
    """A program that another one starts in between has no parent here."""
    code = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, {ECHO!r}], close_fds=False))"
    path = Path(sys.argv[3]) / "between.py"
    path.write_text(code)
    child = child_process.fork(path)
    say("code", child.wait(20))


def several() -> None:
    """Ten at a time, while this process does something else."""
    counts = dict.fromkeys(range(10), 0)
    children = []
    for number in counts:
        child = child_process.fork(ECHO)
        child.on("message", lambda _message, number=number: counts.__setitem__(number, counts[number] + 1))
        for n in range(20):
            child.send(n)
        child.send("leave")
        children.append(child)
    codes = [child.wait(20) for child in children]
    say(codes, counts)


def missing() -> None:
    """A program that does not exist ends with Python's own code; a folder that does not exist raises."""
    child = child_process.fork("/no/such/program.py", silent=True)
    say("code", child.wait(20))
    try:
        child_process.fork(ECHO, cwd="/no/such/folder")
    except OSError as error:
        say("raised", type(error).__name__)


if __name__ == "__main__":
    say("pid", os.getpid())
    globals()[sys.argv[2]]()
