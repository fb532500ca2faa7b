"""The application's word that it is ready, for `wait_ready`: said through the extension, heard by the worker.

Both run in one process that was patched before this module was imported, so waiting lets greenlets run.
"""

from __future__ import annotations

import threading

_said = threading.Event()


def say() -> None:
    """This worker may serve from now on. Without `wait_ready`, and under another server, it means nothing."""
    _said.set()


def wait(seconds: float) -> bool:
    """Wait for the word, at the most so long; returns whether it was said."""
    return _said.wait(seconds)
