"""Hooks for tests: each writes a line into the file that $HOOKS_LOG names."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def _note(name: str, *arguments: Any) -> None:
    shown = [vars_of(each) for each in arguments]
    line = json.dumps({"hook": name, "pid": os.getpid(), "arguments": shown, "gevent": "gevent" in sys.modules})
    with open(os.environ["HOOKS_LOG"], "a") as file:
        file.write(line + "\n")


def vars_of(value: Any) -> Any:
    """A worker's or a cluster's fields."""
    return {name: getattr(value, name) for name in value.__slots__} if hasattr(value, "__slots__") else value


def _hook(name: str) -> Any:
    return lambda *arguments: _note(name, *arguments)


for _name in (
    "on_fork", "on_online", "on_listening", "on_drain", "on_disconnect", "on_exit", "on_ready", "on_reload", "on_stop",
    "when_ready", "child_exit", "post_fork", "post_worker_init", "worker_exit", "pre_fork",
):  # fmt: skip
    globals()[_name] = _hook(_name)


def on_online(worker: Any) -> None:
    """A hook with a mistake in it."""
    _note("on_online", worker)
    raise RuntimeError("a mistake in a hook")
