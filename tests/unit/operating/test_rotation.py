"""When a log file is rotated, what its pieces are called, and that nobody's open file is compressed."""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import pytest

from sharedcluster.operating.rotation import Rotator, compress, is_due, is_unwritten, rotated_files
from sharedcluster.operating.spec import Upkeep

DAY = 86400.0
MIDNIGHT = time.mktime((2026, 11, 20, 0, 0, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("size", "last_write", "now", "upkeep", "due"),
    [
        (0, 0.0, 9 * DAY, Upkeep(log_max_age=DAY), False),
        (99, 0.0, 0.0, Upkeep(log_max_size=100), False),
        (100, 0.0, 0.0, Upkeep(log_max_size=100), True),
        (10**9, 0.0, 0.0, Upkeep(log_max_size=0), False),
        (1, MIDNIGHT - 1, MIDNIGHT + 1, Upkeep(log_max_size=0, log_max_age=DAY), True),
        (1, MIDNIGHT + 1, MIDNIGHT + DAY - 1, Upkeep(log_max_size=0, log_max_age=DAY), False),
        (1, MIDNIGHT, MIDNIGHT + 3601, Upkeep(log_max_size=0, log_max_age=3600.0), True),
    ],
)
def test_when_it_is_due(size: int, last_write: float, now: float, upkeep: Upkeep, due: bool) -> None:
    """By size, and when a period begins; an empty file never."""
    assert is_due(size, last_write, now, upkeep) is due


def test_the_names_sort_by_time(tmp_path: Path) -> None:
    """Rotating twice in one moment gives two names; a file and its compressed copy count once."""
    log = tmp_path / "a.out.log"
    rotator = Rotator([str(log)], Upkeep(), lambda: True)
    for text in ("one", "two", "three"):
        log.write_text(text)
        rotator.rotate(str(log), MIDNIGHT)
    files = rotated_files(str(log))
    assert [each.read_text() for each in files] == ["one", "two", "three"]
    compress(files[0])
    again = rotated_files(str(log))
    assert [each.suffix for each in again] == [".gz", ".001", ".002"]
    assert gzip.decompress(again[0].read_bytes()) == b"one"
    assert (tmp_path / "a.out.log.old").write_text("") == 0
    assert len(rotated_files(str(log))) == 3


def test_a_file_that_is_written_is_left_alone(tmp_path: Path) -> None:
    """As long as anybody has it open for writing, it is neither compressed nor removed, however many are kept."""
    log = tmp_path / "a.out.log"
    log.write_text("x")
    with log.open("a"):
        assert not is_unwritten(log, time.time())
        rotator = Rotator([str(log)], Upkeep(log_keep=0, log_max_size=1), lambda: True)
        rotator.turn(time.time())
        assert len(rotated_files(str(log))) == 1
    assert is_unwritten(rotated_files(str(log))[0], time.time())
    rotator.turn(time.time() + 10)
    assert rotated_files(str(log)) == []


def test_writers_are_told_until_they_can_hear(tmp_path: Path) -> None:
    """A primary that is still starting cannot take the signal: it is asked again in the next turn."""
    log = tmp_path / "a.out.log"
    log.write_text("xx")
    answers = [False, False, True]
    rotator = Rotator([str(log)], Upkeep(log_max_size=1, log_compress=False), lambda: answers.pop(0))
    for _ in range(3):
        rotator.turn(time.time())
    assert answers == []
    rotator.turn(time.time())
