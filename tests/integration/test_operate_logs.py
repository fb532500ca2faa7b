"""Log files of a kept application: nothing is lost through rotation, a reader follows through it, a full disk does
not hold up a worker.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharedcluster.operating.rotation import rotated_files
from tests.kept_apps import Desk, read_logs
from tests.waiting import wait_until


@pytest.fixture
def desk() -> Iterator[Desk]:
    """A folder of the test's own."""
    made = Desk()
    yield made
    made.close()


def numbers(desk: Desk) -> list[int]:
    """What /print wrote, out of all files of standard output, in their order."""
    path = desk.state / "logs" / "shop.out.log"
    found: list[int] = []
    for data in read_logs(path):
        found += [int(n) for n in re.findall(rb"w\d out \| number (\d+)$", data, re.MULTILINE)]
    return found


def test_nothing_is_lost_through_rotation(desk: Desk) -> None:
    """Three workers print 60000 lines through some rotations, while a reader follows: all are in the files once,
    the reader saw all, and the old files are compressed.
    """
    desk.start("-w", "3", "--log-max-size", "200K", "--log-keep", "1000")
    reader_output = desk.folder / "reader"
    with reader_output.open("wb") as output:
        reader = subprocess.Popen(
            [sys.executable, "-m", "sharedcluster", "logs", "shop", "--out", "--lines", "0"],
            cwd=desk.folder, env={**desk.env, "PYTHONUNBUFFERED": "1"}, stdout=output,
        )  # fmt: skip
    try:
        desk.get("/print/0/1")
        wait_until(lambda: b"number 0\n" in _nudged(desk, reader_output), "the reader follows")
        for first in range(1, 60001, 1000):
            assert desk.get(f"/print/{first}/1000").status == 200
        wait_until(lambda: _seen(reader_output) >= set(range(1, 60001)), "the reader saw all", deadline=20)
    finally:
        reader.terminate()
        reader.wait(10)
    found = [n for n in numbers(desk) if n]
    assert sorted(found) == list(range(1, 60001))
    path = str(desk.state / "logs" / "shop.out.log")
    wait_until(lambda: any(each.suffix == ".gz" for each in rotated_files(path)), "an old file is compressed")
    assert len(rotated_files(path)) >= 2


def _nudged(desk: Desk, reader_output: Path) -> bytes:
    """A reader that starts late begins at the end: print until it sees something."""
    desk.get("/print/0/1")
    return reader_output.read_bytes()


def _seen(reader_output: Path) -> set[int]:
    return {int(n) for n in re.findall(rb"number (\d+)\n", reader_output.read_bytes())}


def test_only_so_many_files_are_kept(desk: Desk) -> None:
    """--log-keep 2: the oldest go."""
    desk.start("--log-max-size", "20K", "--log-keep", "2")
    path = str(desk.state / "logs" / "shop.out.log")
    rounds = iter(range(0, 10**9, 400))

    def rotated_often() -> bool:
        desk.get(f"/print/{next(rounds)}/400")
        return 0 not in numbers(desk) and len(rotated_files(path)) <= 3

    wait_until(rotated_often, "the first file is gone")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_does_not_hold_up_a_worker(desk: Desk) -> None:
    """Every line that is printed fails with ENOSPC: requests are answered, and the loss is counted in the status."""
    desk.start("--out-file", "/dev/full", "--error-file", str(desk.folder / "err.log"))
    assert desk.get("/print/0/500").status == 200
    wait_until(lambda: desk.status()["counters"].get("log_lines_lost") == 500, "the loss is counted")
    assert "500 log lines lost" in desk.cli("list").stdout


def test_logs_chooses_and_says_who(desk: Desk) -> None:
    """--worker, --err, --out, --lines, --json; JSON files are read as well as text."""
    desk.start("-w", "2", "--log-format", "json")
    for _ in range(4):
        desk.get("/print/7/1")
    out = desk.cli("logs", "shop", "--no-follow", "--out").stdout.splitlines()
    assert len(out) == 4
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d{3} +w[01] +\| number 7$", line) for line in out), out
    assert len(desk.cli("logs", "shop", "--no-follow", "--out", "--worker", "1").stdout.splitlines()) == 2
    assert len(desk.cli("logs", "--no-follow", "--out", "--lines", "1").stdout.splitlines()) == 1
    err = desk.cli("logs", "shop", "--no-follow", "--err", "--json").stdout.splitlines()
    assert '"role": "primary"' in err[0]
    assert '"message": "ready in' in err[-1]
    desk.cli("flush", "shop")
    assert desk.cli("logs", "shop", "--no-follow").stdout == ""


def test_an_own_file_takes_both_streams(desk: Desk) -> None:
    """--out-file alone merges the two; the folder is the app's own."""
    desk.start("--out-file", "both.log")
    desk.get("/print/1/1")
    text = (desk.folder / "both.log").read_text()
    assert "w0 out | number 1" in text
    assert "primary err | " in text
    assert os.listdir(desk.state / "logs") == []
