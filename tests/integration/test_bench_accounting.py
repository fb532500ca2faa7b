"""The benchmarks' account of CPU, on real processes."""

from __future__ import annotations

import subprocess
import sys

from benchmarks import processes


def test_time_of_a_dead_child_is_not_lost() -> None:
    """What a child used is still in its parent's account when it is gone."""
    burn = (
        "import os, time\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    end = time.process_time() + 0.2\n"
        "    while time.process_time() < end: pass\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "print('gone', flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "gone\n"
        spent = processes.cpu(process.pid)
        process.communicate("\n")
    assert spent >= 0.18
