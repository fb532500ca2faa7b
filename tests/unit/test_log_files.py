"""Lines that reach a log file, and lines that cannot: each test writes from a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} "


def run(folder: Path, program: str, style: str = "text") -> None:
    """Run a program whose streams are `out` and `err` of the folder."""
    start = (
        "import os, sys, resource, logging\n"
        "from sharedcluster.log import set_up, logger\n"
        "from sharedcluster.log_files import LogFiles, lost_lines\n"
        f"files = LogFiles({str(folder / 'out')!r}, {str(folder / 'err')!r})\n"
        f"set_up('w3', level='info', style={style!r}, files=files)\n"
    )
    done = subprocess.run([sys.executable, "-c", start + program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + (folder / "err").read_text()


def test_every_line_has_time_and_role(tmp_path: Path) -> None:
    """print, bytes, several lines at once, a line in two pieces, and one without an end."""
    run(tmp_path, "print('one'); sys.stdout.buffer.write(b'two\\nthree\\n'); print('fo', end=''); print('ur'); "
                  "sys.stdout.write('five')")  # fmt: skip
    lines = (tmp_path / "out").read_text().splitlines()
    assert [re.sub("^" + STAMP + r"w3 out \| ", "", line) for line in lines] == ["one", "two", "three", "four", "five"]


def test_the_log_goes_to_the_error_file(tmp_path: Path) -> None:
    """A logged traceback is stamped on each of its lines."""
    run(tmp_path, "try: 1/0\nexcept ZeroDivisionError: logger.exception('oh')")
    lines = (tmp_path / "err").read_text().splitlines()
    assert all(re.match(STAMP + r"w3 err \| ", line) for line in lines)
    assert lines[0].endswith("error: oh")
    assert lines[-1].endswith("ZeroDivisionError: division by zero")


def test_json_lines_are_json(tmp_path: Path) -> None:
    """What is printed becomes an object; what is logged is one already and is not wrapped twice."""
    run(tmp_path, "print('hello'); logger.info('fact')", style="json")
    printed = json.loads((tmp_path / "out").read_text())
    assert (printed["role"], printed["stream"], printed["message"]) == ("w3", "out", "hello")
    logged = json.loads((tmp_path / "err").read_text())
    assert (logged["role"], logged["level"], logged["message"]) == ("w3", "info", "fact")


def test_a_renamed_file_is_written_until_reopening(tmp_path: Path) -> None:
    """Rotation by rename: what is written before the second `set_up` is in the old file, the rest in the new one."""
    run(tmp_path, "print('a'); os.rename(files.out, files.out + '.1'); print('b'); "
                  "set_up('w3', level='info', style='text', files=files); print('c')")  # fmt: skip
    assert [line[-1] for line in (tmp_path / "out.1").read_text().splitlines()] == ["a", "b"]
    assert [line[-1] for line in (tmp_path / "out").read_text().splitlines()] == ["c"]


def test_a_program_that_is_started_writes_too(tmp_path: Path) -> None:
    """The real descriptors are the files, so what a child writes is there, without a stamp."""
    run(tmp_path, "import subprocess; subprocess.run(['echo', 'from a child'])")
    assert (tmp_path / "out").read_text() == "from a child\n"


def test_a_full_disk_drops_counts_and_says(tmp_path: Path) -> None:
    """Writing fails in the middle of a line and goes on failing; print never raises; when there is room again, the
    torn line is ended and the loss is said before the next line. (A file size limit fails like a full disk.)
    """
    run(
        tmp_path,
        "resource.setrlimit(resource.RLIMIT_FSIZE, (210, resource.RLIM_INFINITY))\n"
        "for n in range(20): print('line', n)\n"
        "lost = lost_lines()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "print('after'); print('again', lost, lost_lines())\n",
    )
    lines = (tmp_path / "out").read_text().splitlines()
    whole = [line for line in lines if re.search(r"\| line \d+$", line)]
    lost = 20 - 5  # a line has 40 bytes
    assert len(whole) == 5
    assert re.search(rf"w3 out \| {lost} lines before this one were lost: ", lines[-3])
    assert lines[-2].endswith("| after")
    assert lines[-1].endswith(f"| again {lost} {lost}")


def test_many_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    """Four processes, a thousand long lines each, one file: every line is whole and none is missing."""
    run(
        tmp_path,
        "pids = []\n"
        "for n in range(4):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        set_up(f'w{n}', level='info', style='text', files=files)\n"
        "        for i in range(1000): print(str(n) * 500, i)\n"
        "        os._exit(0)\n"
        "    pids.append(pid)\n"
        "for pid in pids: os.waitpid(pid, 0)\n",
    )
    seen: dict[str, list[int]] = {}
    for line in (tmp_path / "out").read_text().splitlines():
        match = re.fullmatch(STAMP + r"w(\d) out \| (\1{500}) (\d+)", line)
        assert match, line
        seen.setdefault(match[1], []).append(int(match[3]))
    assert seen == {str(n): list(range(1000)) for n in range(4)}
