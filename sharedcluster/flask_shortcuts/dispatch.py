"""From the request to the response: the view, and Flask's steps around it that have something to do."""

from __future__ import annotations

from types import FunctionType
from typing import Any, Final

import flask
from flask import Flask
from flask.globals import _cv_request
from flask.signals import request_finished, request_started

from sharedcluster.flask_shortcuts.contexts import RECEIVERS_OF_THE_END
from sharedcluster.flask_shortcuts.functions import PlainFunctions
from sharedcluster.flask_shortcuts.responses import LATER, Response, Unmade, json_response, text_response

VIEWS_LIMIT: Final = 1000

_request_context = _cv_request.get  # a method of what was imported is looked up and bound anew with each call


class Dispatch:
    """`Flask.full_dispatch_request` of one application."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        self._plain_views: set[Any] = set()
        self._interface: Any = None
        self._submit: Any = None  # of a session interface that need not be waited for

    def __call__(self) -> flask.Response:
        """The response to the request whose context has been pushed. Raises what Flask raises."""
        app = self._app
        app._got_first_request = True
        request = _request_context().request
        answer: Any = None
        try:
            if request_started.receivers:
                request_started.send(app, _async_wrapper=app.ensure_sync)
            if app.before_request_funcs or app.url_value_preprocessors:
                answer = app.preprocess_request()
            if answer is None:
                rule = request.url_rule
                if rule is None or request.routing_exception is not None or request.method == "OPTIONS":
                    answer = app.dispatch_request()
                else:
                    view = app.view_functions[rule.endpoint]
                    if type(view) is not FunctionType or view not in self._plain_views:
                        view = self._ensure_sync(view)
                    given = request.view_args
                    answer = view(**given) if given else view()
        except Exception as error:
            answer = app.handle_user_exception(error)

        response: flask.Response | None = None
        if app.response_class is Response:
            kind = type(answer)
            if kind is str:
                response = text_response(answer)
            elif kind is dict or kind is list:
                response = json_response(app.json, app.debug, answer)
        if response is None:
            response = app.make_response(answer)
        context = _request_context()
        if context._after_request_functions or app.after_request_funcs:
            response = app.process_response(response)
        else:
            session: Any = context._session
            interface: Any = app.session_interface
            if interface is not self._interface:
                self._interface = interface
                self._submit = interface.submit_session if getattr(interface, "can_submit", False) else None
            if self._submit is None:
                if not interface.is_null_session(session):
                    interface.save_session(app, session, response)
            elif (
                type(response) is Unmade or (type(response) is Response and _ends_here(response))
            ) and _may_answer_later(app, request):
                saved = self._submit(app, session, response)
                if saved is not None:
                    response.wait_for(saved)
            else:
                interface.save_session(app, session, response)
        if request_finished.receivers:
            request_finished.send(app, _async_wrapper=app.ensure_sync, response=response)
        return response

    def _ensure_sync(self, view: Any) -> Any:
        """What runs a view, remembered if that is the view itself: an application has few, and keeps them."""
        ensure = self._app.ensure_sync
        ensured = ensure(view)
        is_known = ensured is view and type(view) is FunctionType and type(ensure) is PlainFunctions
        if is_known and len(self._plain_views) < VIEWS_LIMIT:
            self._plain_views.add(view)
        return ensured


def _may_answer_later(app: Flask, request: flask.Request) -> bool:
    """Whether nobody would see that a session is stored behind the end of the request, before the answer is sent.

    Who could: a hook or a receiver that runs between the two, or a server that cannot wait for it without a greenlet.
    """
    return not (
        LATER not in request.environ
        or app.teardown_request_funcs
        or app.teardown_appcontext_funcs
        or request_finished.receivers
        or any(RECEIVERS_OF_THE_END)
    )


def _ends_here(response: Response) -> bool:
    """Whether the body is there, and nothing is called when it has been sent."""
    pieces = response.response
    return type(pieces) is list and len(pieces) == 1 and not response._on_close and not response.direct_passthrough
