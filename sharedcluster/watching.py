"""`--reload`, for development: a process of its own that watches files and has the primary reload when one changes.

Its own process, because the libraries that watch files start threads, and the primary must have none. It uses
watchfiles (the extra `reload`) where that is installed, and looks at modification times twice a second where not.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from sharedcluster.cluster.forking import be_child
from sharedcluster.cluster.primary import Primary
from sharedcluster.config import Config
from sharedcluster.log import logger

POLL_INTERVAL: Final = 0.5
SUFFIXES: Final = frozenset((".py", ".html", ".jinja", ".jinja2", ".toml", ".env"))
IGNORED: Final = frozenset(
    (
        ".git",
        ".hg",
        ".venv",
        "venv",
        "node_modules",
        "__pycache__",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
        ".tox",
    )
)


@contextmanager
def watching(config: Config, primary: Primary) -> Iterator[None]:
    """While the block runs, reload the primary whenever a source file below the current folder changes."""
    if not config.reload:
        yield
        return
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        be_child(lambda: _watch(Path.cwd(), parent))
    logger.info("watching %s for changes (pid %d)", Path.cwd(), pid)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _watch(folder: Path, parent: int) -> int:
    """In the child: until the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it is ended by its parent, and by nobody else's Ctrl+C
    # The listening sockets must not stay open because of us.
    os.closerange(3, 4096)
    for changed in changes(folder):
        if os.getppid() != parent:
            return 0
        if changed:
            os.write(2, f"          reload   {', '.join(sorted(changed)[:3])} changed\n".encode())
            os.kill(parent, signal.SIGHUP)
    return 0


def changes(folder: Path) -> Iterable[set[str]]:
    """Sets of changed files, an empty one now and then so that the caller can look around."""
    try:
        from watchfiles import watch
    except ImportError:
        yield from _poll(folder)
        return
    for found in watch(
        folder, watch_filter=lambda _change, path: is_source(path), yield_on_timeout=True, rust_timeout=1000
    ):
        yield {os.path.relpath(path, folder) for _, path in found}


def _poll(folder: Path) -> Iterable[set[str]]:
    seen = _times(folder)
    while True:
        time.sleep(POLL_INTERVAL)
        now = _times(folder)
        yield {path for path in now.keys() | seen.keys() if now.get(path) != seen.get(path)}
        seen = now


def _times(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in IGNORED]
        for name in files:
            path = os.path.join(where, name)
            if is_source(path):
                with suppress(OSError):
                    found[os.path.relpath(path, folder)] = os.stat(path).st_mtime_ns
    return found


def is_source(path: str) -> bool:
    """Whether a change of this file is a reason to reload."""
    parts = Path(path).parts
    return (Path(path).suffix in SUFFIXES or Path(path).name == ".env") and not IGNORED.intersection(parts)
