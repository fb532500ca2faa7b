"""Noticing that a file changed, by looking at times and sizes: no thread, no package, half a second late."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch


class Watcher:
    """Compares pictures of some folders.

    Args:
        paths: Files and folders, absolute.
        ignored: Names, or patterns of names, that do not count; what is below such a folder neither.
    """

    def __init__(self, paths: Iterable[str], ignored: Iterable[str]) -> None:
        self._paths = tuple(paths)
        self._ignored = tuple(ignored)
        self._before = self._picture()
        self._restless = False

    def changed(self) -> bool:
        """Whether something changed, and has been at rest since the last call: an editor's burst is one change."""
        picture = self._picture()
        moved, self._before = picture != self._before, picture
        calm = self._restless and not moved
        self._restless = moved
        return calm

    def _picture(self) -> dict[str, tuple[int, int]]:
        return dict(self._walk(self._paths))

    def _walk(self, paths: Iterable[str]) -> Iterator[tuple[str, tuple[int, int]]]:
        for path in paths:
            if any(fnmatch(os.path.basename(path), pattern) for pattern in self._ignored):
                continue
            try:
                if os.path.isdir(path):
                    yield from self._walk(entry.path for entry in os.scandir(path) if not entry.is_symlink())
                else:
                    facts = os.stat(path)
                    yield path, (facts.st_mtime_ns, facts.st_size)
            except OSError:  # it went away between two looks
                continue
