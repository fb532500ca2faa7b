"""Reading log files: the last lines, and whatever is added, across rotations.

When a file was rotated, the old one is read on for a while, since writers reopen at their own pace, and files that
came and went between two looks are read as well: a follower sees every line that is in a file that was kept.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from sharedcluster.operating.rotation import rotated_files

STAMPED: Final = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) (\S+) (out|err) \| (.*)", re.DOTALL)
OLD_FILE_GRACE: Final = 5.0
"""Seconds without a new line after which a renamed file is not read any more."""
CHUNK: Final = 65536


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a log. `role` is "" for what went past Python; `raw` is the line as it stands in the file."""

    text: str
    raw: str
    stream: str
    role: str = ""
    time: str = ""


def parse(raw: str, stream: str) -> Line:
    """A line of a file: stamped, JSON, or neither."""
    if match := STAMPED.fullmatch(raw):
        return Line(match[4], raw, match[3], match[2], match[1])
    if raw.startswith("{"):
        with suppress(ValueError):
            fact = json.loads(raw)
            if isinstance(fact, dict) and "role" in fact:
                text = str(fact.get("message", ""))
                if fact.get("traceback"):
                    text += f"\n{fact['traceback']}"
                return Line(text, raw, str(fact.get("stream", stream)), str(fact["role"]), str(fact.get("time", "")))
    return Line(raw, raw, stream)


def stream_of(path: str) -> str:
    """Which stream a file is of, for lines that do not say so."""
    return "out" if path.endswith("out.log") else "err"


def last_lines(paths: Iterable[str], count: int, wanted: Callable[[Line], bool] = lambda line: True) -> list[Line]:
    """The last lines of some files together, in the order of their times; rotated files are looked into if needed."""
    found: list[tuple[str, Line]] = []
    for path in dict.fromkeys(paths):
        moment = ""
        tail: list[tuple[str, Line]] = []
        for line in reversed(list(_tail(path, count, wanted))):
            moment = line.time or moment
            tail.append((moment, line))
        found += tail
    found.sort(key=lambda pair: pair[0])
    return [line for _, line in found[max(0, len(found) - count) :]]


def _tail(path: str, count: int, wanted: Callable[[Line], bool]) -> Iterator[Line]:
    """Lines from the end, newest first, at the most `count`."""
    stream = stream_of(path)
    for each in [Path(path), *reversed(rotated_files(path))]:
        try:
            for raw in _newest_first(each):
                if count <= 0:
                    return
                line = parse(raw, stream)
                if wanted(line):
                    count -= 1
                    yield line
        except FileNotFoundError:
            continue


def _newest_first(path: Path) -> Iterator[str]:
    """The lines of a file, which may be compressed between our finding and our opening it."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        path = path.with_name(path.name + ".gz")
        file = path.open("rb")
    with file:
        if path.suffix == ".gz":
            yield from _backwards_gz(file)
        else:
            yield from _backwards(file)


def _backwards(file: BinaryIO) -> Iterator[str]:
    position = size = file.seek(0, os.SEEK_END)
    rest = b""
    is_end = True
    while position > 0:
        step = min(CHUNK, position)
        position -= step
        file.seek(position)
        rest = file.read(step) + rest
        if is_end:
            rest, is_end = rest.removesuffix(b"\n"), False
        first, *complete = rest.split(b"\n")
        for raw in reversed(complete):
            yield raw.decode("utf-8", "replace")
        rest = first
    if size:
        yield rest.decode("utf-8", "replace")


def _backwards_gz(file: BinaryIO) -> Iterator[str]:
    with gzip.open(file, "rt", encoding="utf-8", errors="replace") as text:
        lines = [line.removesuffix("\n") for line in text]
    return reversed(lines)


@dataclass(slots=True)
class _Open:
    file: BinaryIO
    inode: int
    pending: bytes = b""
    quiet_since: float = field(default_factory=time.monotonic)


class Follower:
    """Yields what is added to one log file.

    Args:
        path: The file; it may not be there yet.
        from_start: Whether to begin at its beginning instead of its end.
    """

    def __init__(self, path: str, *, from_start: bool = False) -> None:
        self._path = path
        self._stream = stream_of(path)
        self._known = {_plain(each) for each in rotated_files(path)}
        self._old: list[_Open] = []
        self._current = self._open(Path(path))
        if self._current and not from_start:
            self._current.file.seek(0, os.SEEK_END)

    def _open(self, path: Path) -> _Open | None:
        try:
            # Open for as long as the follower needs it.
            file = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115
        except FileNotFoundError:
            # It was compressed just now; or there is none.
            return None if path.suffix == ".gz" else self._open(path.with_name(path.name + ".gz"))
        return _Open(file, os.fstat(file.fileno()).st_ino)  # type: ignore[arg-type]  # gzip's file reads bytes too

    def lines(self) -> list[Line]:
        """What came since the last call."""
        self._look_for_rotation()
        found: list[Line] = []
        now = time.monotonic()
        for each in [*self._old, *([self._current] if self._current else [])]:
            raws = self._read(each)
            if raws:
                each.quiet_since = now
            found += [parse(raw, self._stream) for raw in raws]
        for each in [old for old in self._old if now - old.quiet_since > OLD_FILE_GRACE]:
            self._old.remove(each)
            each.file.close()
            if each.pending:
                found.append(parse(each.pending.decode("utf-8", "replace"), self._stream))
        return found

    def _look_for_rotation(self) -> None:
        try:
            inode = os.stat(self._path).st_ino
        except FileNotFoundError:
            return  # between a rename and the first writer that reopens
        if self._current is None:
            self._current = self._open(Path(self._path))
            return
        if inode == self._current.inode:
            self._truncated(self._current)
            return
        fresh = self._open(Path(self._path))
        came = [each for each in rotated_files(self._path) if _plain(each) not in self._known]
        self._known |= {_plain(each) for each in came}
        self._old.append(self._current)
        for each in came[1:]:  # the first one is the file that was being read
            if opened := self._open(each):
                self._old.append(opened)
        self._current = fresh

    def _truncated(self, current: _Open) -> None:
        """`flush` makes the file empty: begin again."""
        if os.fstat(current.file.fileno()).st_size < current.file.tell():
            current.file.seek(0)
            current.pending = b""

    def _read(self, each: _Open) -> list[str]:
        data = each.file.read()
        if not data:
            return []
        *complete, each.pending = (each.pending + data).split(b"\n")
        return [raw.decode("utf-8", "replace") for raw in complete]

    def close(self) -> None:
        """Close what is open."""
        for each in [*self._old, *([self._current] if self._current else [])]:
            each.file.close()


def _plain(path: Path) -> str:
    return path.name.removesuffix(".gz")
