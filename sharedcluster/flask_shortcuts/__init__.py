"""What Flask works out anew with each request although it comes to the same, or to nothing: half of a small request.

Laws
----
1. Flask decides. What is remembered is what it answered, under everything that it read to come to that; and what it
   would have to do something about (a host that is bad or not trusted, an upgrade, a redirect, a body that is not
   counted yet) it is asked each time.
2. A step is left out only when nothing could come of it, seen at that moment: no hook registered, no receiver
   connected, no file to be closed. If something could, Flask's own step is taken, whole.
3. Only steps that we have read are left out (`texts`). Of another release of Flask all are taken.
4. Requests share nothing that one of them could change.
5. Clients choose host and path, so what is remembered is bounded, in number and length.
6. An application that does one of these things in a way of its own is left alone.
"""

from __future__ import annotations

import logging

from flask import Flask
from werkzeug.routing import Map

from sharedcluster.flask_shortcuts.functions import PlainFunctions
from sharedcluster.flask_shortcuts.hosts import UrlAdapters
from sharedcluster.flask_shortcuts.responses import Response
from sharedcluster.flask_shortcuts.texts import DISPATCH, unknown

log = logging.getLogger("sharedcluster.flask")

STEPS = (
    "request_context",
    "app_context",
    "full_dispatch_request",
    "preprocess_request",
    "dispatch_request",
    "make_response",
    "finalize_request",
    "process_response",
    "do_teardown_request",
    "do_teardown_appcontext",
)
"""What `Dispatch` and the contexts leave out or stand in for."""


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
    if (
        all(_is_flask_s_own(app, name) for name in STEPS)
        and type(app.url_map) is Map
        and "add" not in vars(app.url_map)
    ):
        others = unknown(DISPATCH)
        if others:
            log.info("Flask's own steps are all taken: %s is not as this release knows it", ", ".join(others))
        else:
            # Not before: a Flask that we have not read may not have what they import.
            from sharedcluster.flask_shortcuts.contexts import context_maker
            from sharedcluster.flask_shortcuts.dispatch import Dispatch
            from sharedcluster.flask_shortcuts.proxies import spell_out

            spell_out()
            app.request_context = context_maker(app)  # type: ignore[method-assign, assignment]
            app.full_dispatch_request = Dispatch(app)  # type: ignore[method-assign]


def _is_flask_s_own(app: Flask, name: str) -> bool:
    return getattr(type(app), name) is getattr(Flask, name) and name not in vars(app)
