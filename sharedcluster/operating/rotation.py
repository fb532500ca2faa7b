"""Rotating log files that others write: rename, have the writers reopen, compress what nobody writes any more.

Laws:

1. Renaming loses nothing: a writer goes on in the renamed file until it reopens.
2. A renamed file is compressed or removed only when the kernel says that no process has it open for writing (a read
   lease is granted, fcntl(2) F_SETLEASE). So a program that an application started, and that never reopens, keeps its
   file.
3. The names sort by time, and the compressed file appears under its name only when it is whole.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from sharedcluster.operating.records import ROTATED
from sharedcluster.operating.spec import Upkeep

SHORTEST_LOOK: Final = 0.05
LONGEST_LOOK: Final = 0.25
"""Seconds between two looks at the sizes; the faster a file grows, the sooner the next."""
PATIENCE: Final = 30.0
"""Seconds a renamed file rests before it is compressed, where the file system knows no leases."""


def rotated_files(path: str) -> list[Path]:
    """What a log file was rotated into, oldest first; a file and its compressed copy count once."""
    folder, stem = Path(path).parent, Path(path).name
    found: dict[str, Path] = {}
    with suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder)):
            if name.startswith(stem) and ROTATED.fullmatch(name, len(stem)):
                plain = name.removesuffix(".gz")
                found.setdefault(plain, folder / name)
    return [found[name] for name in sorted(found)]


def is_due(size: int, last_write: float, now: float, upkeep: Upkeep) -> bool:
    """Whether a file of this size, last written at that time, has to be rotated before the next line."""
    if size == 0:
        return False
    if upkeep.log_max_size and size >= upkeep.log_max_size:
        return True
    return bool(upkeep.log_max_age) and _period(last_write, upkeep.log_max_age) < _period(now, upkeep.log_max_age)


def _period(moment: float, length: float) -> int:
    """Periods begin at local midnight, so `1d` means the calendar's days."""
    return int((moment + time.localtime(moment).tm_gmtoff) // length)


class Rotator:
    """Looks after the log files of one application.

    Args:
        paths: The files.
        upkeep: When to rotate and what to keep.
        reopen: Tells every writer to open its log files anew; returns False if that cannot be done yet.
    """

    def __init__(self, paths: Iterable[str], upkeep: Upkeep, reopen: Callable[[], bool]) -> None:
        self._paths = sorted(set(paths))
        self._upkeep = upkeep
        self._reopen = reopen
        self._seen: dict[str, tuple[float, int]] = {}
        self._untold = False
        self._compressor = 0
        self._next_tidying = 0.0
        self.rotations = 0

    def turn(self, now: float) -> float:
        """Do what is due at `now` (seconds since 1970); returns the seconds until the next look."""
        wait = LONGEST_LOOK
        for path in self._paths:
            wait = min(wait, self._look_at(path, now))
        if self._untold:
            self._untold = not self._reopen()
            self._next_tidying = now + SHORTEST_LOOK
        if now >= self._next_tidying:
            self._tidy(now)
        return wait

    def _look_at(self, path: str, now: float) -> float:
        try:
            facts = os.stat(path)
        except OSError:
            return LONGEST_LOOK
        if is_due(facts.st_size, facts.st_mtime, now, self._upkeep):
            self.rotate(path, now)
            return SHORTEST_LOOK
        before, size = self._seen.get(path, (now - LONGEST_LOOK, facts.st_size))
        self._seen[path] = (now, facts.st_size)
        growth = (facts.st_size - size) / max(now - before, 1e-3)
        if growth <= 0 or not self._upkeep.log_max_size:
            return LONGEST_LOOK
        return max(SHORTEST_LOOK, min(LONGEST_LOOK, (self._upkeep.log_max_size - facts.st_size) / growth / 2))

    def rotate(self, path: str, now: float) -> None:
        """Rename a file; the writers are told in this turn."""
        while True:
            stamp = time.strftime("%Y%m%dT%H%M%S", time.localtime(now))
            target = f"{path}.{stamp}.{int(now % 1 * 1000):03d}"
            if not os.path.exists(target) and not os.path.exists(target + ".gz"):
                break
            now += 0.001
        with suppress(OSError):
            os.rename(path, target)
            self.rotations += 1
            self._untold = True
        self._seen[path] = (now, 0)

    def reaped(self, pid: int) -> bool:
        """Whether the child that ended was the compressor; then the next file may be compressed."""
        if pid != self._compressor:
            return False
        self._compressor = 0
        self._next_tidying = 0.0
        return True

    def _tidy(self, now: float) -> None:
        self._next_tidying = now + 5.0
        for path in self._paths:
            rotated = rotated_files(path)
            for old in rotated[: max(0, len(rotated) - self._upkeep.log_keep)]:
                if is_unwritten(old, now):
                    old.unlink(missing_ok=True)
            plain = [each for each in rotated if each.suffix != ".gz" and each.exists()]
            if self._upkeep.log_compress and not self._compressor:
                ready = next((each for each in plain if is_unwritten(each, now)), None)
                if ready is not None:
                    self._compressor = _compress_in_child(ready)


def is_unwritten(path: Path, now: float) -> bool:
    """Whether no process has a file open for writing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return False
        return now - os.fstat(fd).st_mtime > PATIENCE
    finally:
        os.close(fd)
    return True


def _compress_in_child(path: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.nice(10)
        compress(path)
        code = 0
    finally:
        os._exit(code)


def compress(path: Path) -> None:
    """Replace a file by its gzip copy; if the disk is full, the file stays as it is."""
    target = path.with_name(path.name + ".gz")
    draft = path.with_name("." + path.name + ".part")
    try:
        with path.open("rb") as source, gzip.open(draft, "wb", compresslevel=6) as packed:
            shutil.copyfileobj(source, packed, 1 << 20)
        os.chmod(draft, path.stat().st_mode & 0o777)
        shutil.copystat(path, draft)
        draft.rename(target)
        path.unlink()
    except OSError:
        draft.unlink(missing_ok=True)
        raise
