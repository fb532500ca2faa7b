"""What Flask works out anew with each request although it comes to the same: a quarter of a small request.

Laws
----
1. Flask decides. What is remembered is what it answered, under everything that it read to come to that; and what it
   would have to do something about (a host that is bad or not trusted, an upgrade, a redirect, a body that is not
   counted yet) it is asked each time.
2. Requests share nothing that one of them could change.
3. Clients choose the Host field, so what is remembered is bounded, in number and length.
4. An application that does one of these things in a way of its own is left alone.
"""

from __future__ import annotations

from flask import Flask
from werkzeug.routing import Map

from sharedcluster.flask_shortcuts.functions import PlainFunctions
from sharedcluster.flask_shortcuts.hosts import UrlAdapters
from sharedcluster.flask_shortcuts.responses import Response


def take_shortcuts(app: Flask) -> None:
    """Spare an application what it need not do again; all it does and says is what it was (the laws above).

    Not if its configuration says SHAREDCLUSTER_SHORTCUTS = False. Called twice it does nothing the second time.
    """
    if not app.config.get("SHAREDCLUSTER_SHORTCUTS", True):
        return
    if _is_flask_s_own(app, "create_url_adapter") and all(
        getattr(type(app.url_map), name) is getattr(Map, name) for name in ("bind", "bind_to_environ")
    ):
        app.create_url_adapter = UrlAdapters(app)  # type: ignore[method-assign]
    if _is_flask_s_own(app, "ensure_sync"):
        app.ensure_sync = PlainFunctions(app)  # type: ignore[method-assign]
    if _is_flask_s_own(app, "response_class"):
        app.response_class = Response


def _is_flask_s_own(app: Flask, name: str) -> bool:
    return getattr(type(app), name) is getattr(Flask, name) and name not in vars(app)
