"""Reading logs: the last lines across rotated files, and following through rotations."""

from __future__ import annotations

import gzip
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sharedcluster.operating.following import Follower, last_lines, parse
from sharedcluster.operating.rotation import compress


def stamped(number: int, role: str = "w0", stream: str = "out") -> str:
    """A line as workers write it."""
    return f"2026-11-20 10:00:{number % 60:02d}.{number // 60:03d} {role} {stream} | line {number}\n"


def test_lines_are_parsed() -> None:
    """Text, JSON, and what is neither."""
    line = parse(stamped(1).rstrip(), "out")
    assert (line.role, line.stream, line.text) == ("w0", "out", "line 1")
    fact = parse('{"time": "t", "role": "w1", "message": "m", "traceback": "tb"}', "err")
    assert (fact.role, fact.stream, fact.text) == ("w1", "err", "m\ntb")
    assert parse("raw | text", "err").role == ""
    assert parse('{"other": 1}', "out").text == '{"other": 1}'


@given(st.lists(st.text(alphabet="abc\u00e9 ", max_size=200), max_size=60), st.integers(0, 70))
def test_the_last_lines_are_the_last_lines(texts: list[str], count: int) -> None:
    """Whatever their number and length, also without a line end at the end of the file."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.out.log")
        path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        assert [line.text for line in last_lines([str(path)], count)] == texts[len(texts) - min(count, len(texts)) :]


def test_last_lines_look_into_rotated_files(tmp_path: Path) -> None:
    """When the newest file has too few lines, older ones are read, compressed ones too; a filter counts what fits."""
    path = tmp_path / "a.out.log"
    for number, name in enumerate(("a.out.log.20261120T100000.000", "a.out.log.20261120T100001.000", "a.out.log")):
        (tmp_path / name).write_text("".join(stamped(i, f"w{i % 2}") for i in range(number * 3, number * 3 + 3)))
    compress(tmp_path / "a.out.log.20261120T100000.000")
    assert [line.text for line in last_lines([str(path)], 8)] == [f"line {i}" for i in range(1, 9)]
    only = last_lines([str(path)], 3, lambda line: line.role == "w1")
    assert [line.text for line in only] == ["line 3", "line 5", "line 7"]


def test_two_files_are_merged_by_time(tmp_path: Path) -> None:
    """Standard output and error in the order in which they were written."""
    (tmp_path / "a.out.log").write_text(stamped(1) + stamped(3))
    (tmp_path / "a.err.log").write_text(stamped(2, stream="err") + "no time of its own\n")
    lines = last_lines([str(tmp_path / "a.out.log"), str(tmp_path / "a.err.log")], 10)
    assert [line.text for line in lines] == ["line 1", "line 2", "no time of its own", "line 3"]


def test_a_follower_survives_rotation(tmp_path: Path) -> None:
    """The old file is written on for a while, two files come and go between two looks, one of them compressed."""
    path = tmp_path / "a.out.log"
    path.write_text("before\n")
    follower = Follower(str(path))
    with path.open("a") as old:
        old.write("1\nhal")
        old.flush()
        assert [line.text for line in follower.lines()] == ["1"]
        path.rename(tmp_path / "a.out.log.20261120T100000.000")
        old.write("f\n")
        old.flush()
        (tmp_path / "a.out.log.20261120T100001.000").write_text("2\n")
        (tmp_path / "a.out.log.20261120T100002.000.gz").write_bytes(gzip.compress(b"3\n"))
        path.write_text("4\n")
        assert [line.text for line in follower.lines()] == ["half", "2", "3", "4"]
        old.write("late\n")
        old.flush()
        assert [line.text for line in follower.lines()] == ["late"]
    follower.close()


def test_a_follower_waits_for_the_file_and_notices_flush(tmp_path: Path) -> None:
    """A file that is not there yet, and one that is made empty."""
    path = tmp_path / "a.out.log"
    follower = Follower(str(path))
    assert follower.lines() == []
    path.write_text("first\n")
    assert [line.text for line in follower.lines()] == ["first"]
    path.write_text("")
    assert follower.lines() == []
    with path.open("a") as file:
        file.write("second\n")
    assert [line.text for line in follower.lines()] == ["second"]
    follower.close()
