"""The accounting of CPU and memory."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks import processes
from benchmarks.processes import Stat, family, parse_smaps, parse_stat

LINE = "4242 (a (strange) name) S 1 4242 4000 0 -1 4194560 99 0 0 0 150 50 30 20 20 0 1 0 8000 1 1\n"


def test_stat_of_a_process_with_brackets_in_its_name() -> None:
    """The fields are counted from the last bracket; times of children that are gone are apart."""
    found = parse_stat(LINE)
    assert found == Stat(pid=4242, parent=1, session=4000, own=200, children=50)
    assert found.seconds == 250 / processes.TICKS


def test_family_is_descendants_and_session() -> None:
    """A daemon that changed its parent still belongs, a stranger does not."""
    stats = [
        Stat(10, 1, 10, 1, 0),
        Stat(11, 10, 11, 1, 0),  # a child in a session of its own
        Stat(12, 11, 11, 1, 0),  # its child
        Stat(13, 1, 10, 1, 0),  # left its parent, not the session
        Stat(14, 13, 14, 1, 0),
        Stat(99, 1, 99, 1, 0),
    ]
    assert {stat.pid for stat in family(stats, 10)} == {10, 11, 12, 13, 14}


def test_our_own_process_is_accounted() -> None:
    """What is read of this very process is what the process says of itself."""
    assert processes.cpu_by_process(os.getpid())[os.getpid()] > 0


def test_a_server_is_quiet_when_it_uses_no_cpu() -> None:
    """One that computes is waited for as long as is allowed, one that has stopped computing until it is known."""
    code = "import sys, time\nend = time.process_time() + float(sys.argv[1])\nwhile time.process_time() < end: pass\n"
    code += "print('done', flush=True)\nsys.stdin.read()"
    for seconds, expected in (("60", False), ("0.2", True)):
        with subprocess.Popen(
            [sys.executable, "-c", code, seconds], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert processes.wait_quiet(process.pid, at_most=1.0 if expected is False else 30.0) is expected
            if expected:
                assert process.stdout is not None
                assert process.stdout.readline() == b"done\n"
            process.kill()


def test_smaps_rollup() -> None:
    """Private pages are USS, shared ones count by their share in PSS; bytes, not kilobytes."""
    text = "55-7f [rollup]\nRss: 900 kB\nPss: 300 kB\nPrivate_Clean: 40 kB\nPrivate_Dirty: 160 kB\n"
    found = parse_smaps(text)
    assert (found.uss, found.pss) == (200 * 1024, 300 * 1024)
