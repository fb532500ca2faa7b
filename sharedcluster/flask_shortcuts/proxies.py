"""`flask.session`, `request`, `g` and `current_app`, which lead to what they stand for in one step.

Werkzeug's proxy makes a function for each use, by way of a descriptor that stands for every special method: five calls
and an object to read one value of the session, 340 ns instead of 90. A view uses several. So what is used most is
spelled out here, in classes that are put in the place of the proxies' own: who has imported `session` has it, too. All
else, and what is said where there is no context, is Werkzeug's.

Flask's proxies are of the whole process, so other applications in it have these, too, and see no difference.
"""

from __future__ import annotations

from contextvars import ContextVar
from operator import attrgetter
from typing import Any

from flask import globals as flask_globals
from flask.ctx import RequestContext
from werkzeug.local import LocalProxy

_context_of_request = flask_globals._cv_request.get
_SESSION = RequestContext.session
_DOC = vars(LocalProxy)["__doc__"]  # of what a proxy stands for; a class without one would say None


def spell_out() -> None:
    """Do this to Flask's proxies, for all of this process; done twice it is done once."""
    for proxy, name, variable in (
        (flask_globals.request, "request", flask_globals._cv_request),
        (flask_globals.g, "g", flask_globals._cv_app),
        (flask_globals.current_app, "app", flask_globals._cv_app),
    ):
        _change(proxy, variable, _proxy_class(variable, name))
    _change(flask_globals.session, flask_globals._cv_request, _Session)


def _change(proxy: Any, variable: ContextVar[Any], own: type[LocalProxy[Any]]) -> None:
    if type(proxy) is LocalProxy and object.__getattribute__(proxy, "_LocalProxy__wrapped") is variable:
        own.__name__ = own.__qualname__ = LocalProxy.__name__
        own.__module__ = LocalProxy.__module__
        # Not by assignment: that would be the class of what it stands for.
        object.__dict__["__class__"].__set__(proxy, own)


def _proxy_class(variable: ContextVar[Any], name: str) -> type[LocalProxy[Any]]:
    find, current = variable.get, attrgetter(name)

    class Proxy(LocalProxy[Any]):
        __slots__ = ()
        __doc__ = _DOC

        def __getattr__(self, name: str) -> Any:
            context = find(None)
            return getattr(self._get_current_object() if context is None else current(context), name)

        def __setattr__(self, name: str, value: object) -> None:
            context = find(None)
            setattr(self._get_current_object() if context is None else current(context), name, value)

        def __contains__(self, key: object) -> bool:
            context = find(None)
            return key in (self._get_current_object() if context is None else current(context))

    return Proxy


class _Session(LocalProxy[Any]):
    # What a request's `session` does, a property that notes that the session was looked at, stands in each method.
    __slots__ = ()
    __doc__ = _DOC

    def __getattr__(self, name: str) -> Any:
        context = _context_of_request(None)
        session = context._session if context is not None and type(context).session is _SESSION else None
        if session is None:
            session = self._get_current_object()
        else:
            session.accessed = True
        return getattr(session, name)

    def __getitem__(self, key: str) -> Any:
        context = _context_of_request(None)
        session = context._session if context is not None and type(context).session is _SESSION else None
        if session is None:
            session = self._get_current_object()
        else:
            session.accessed = True
        return session[key]

    def __setitem__(self, key: str, value: object) -> None:
        context = _context_of_request(None)
        session = context._session if context is not None and type(context).session is _SESSION else None
        if session is None:
            session = self._get_current_object()
        else:
            session.accessed = True
        session[key] = value

    def __contains__(self, key: object) -> bool:
        context = _context_of_request(None)
        session = context._session if context is not None and type(context).session is _SESSION else None
        if session is None:
            session = self._get_current_object()
        else:
            session.accessed = True
        return key in session
