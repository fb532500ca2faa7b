"""Whether a function is a coroutine function, asked once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any, Final

from flask import Flask

FUNCTIONS_LIMIT: Final = 1000


class PlainFunctions:
    """`Flask.ensure_sync` of one application, which asks once whether a function is a coroutine function."""

    def __init__(self, app: Flask) -> None:
        self._ensure = app.ensure_sync
        # By weak references, for some are made for one request (`after_this_request`).
        self._known: dict[int, weakref.ref[Callable[..., Any]]] = {}

    def __call__(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """The function itself, or what runs it and waits for it if it is a coroutine function."""
        known = self._known.get(id(func))
        if known is not None and known() is func:
            return func
        ensured = self._ensure(func)
        if ensured is func and type(func) is FunctionType:
            if len(self._known) >= FUNCTIONS_LIMIT:
                self._known.clear()
            self._known[id(func)] = weakref.ref(func)
        return ensured
