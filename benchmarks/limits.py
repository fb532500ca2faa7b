"""Raise the number of open files as far as it goes: ten thousand idle connections need as many, twice."""

from __future__ import annotations

import resource


def raise_open_files() -> int:
    """Set the soft limit to the hard one, for us and all we start; returns it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
