"""Scheduling policies by name: those of `--policy`, and Node's two."""

from __future__ import annotations

from typing import Final

from sharedcluster.config import POLICIES
from sharedcluster.errors import ConfigError

SCHED_RR: Final = "round-robin"
"""The primary accepts, and hands each connection to the next worker."""
SCHED_NONE: Final = "shared"
"""The workers accept for themselves, and the kernel decides."""

_ALIASES: Final = {"rr": SCHED_RR, "none": SCHED_NONE}


def policy(name: str) -> str:
    """A policy by its name or Node's.

    Raises:
        ConfigError: There is no such policy.
    """
    name = _ALIASES.get(name, name)
    if name not in POLICIES:
        raise ConfigError(f"{name!r} is no scheduling policy.", advice=f"Use one of {', '.join(POLICIES)}.")
    return name
