"""`flask.session`, `request`, `g` and `current_app`, which lead to what they stand for in one step.

Werkzeug's proxy makes a function for each use, by way of a descriptor that stands for every special method: five calls
and an object to read one value of the session, 340 ns instead of 100. A view uses several. So what is used most is
spelled out here, in classes that are put in the place of the proxies' own: who has imported `session` has it, too. All
else, and what is said where there is no context, is Werkzeug's.

Flask's proxies are of the whole process, so other applications in it have these, too, and see no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from operator import attrgetter
from typing import Any

from flask import globals as flask_globals
from flask.ctx import RequestContext
from werkzeug.local import LocalProxy

_SESSION = RequestContext.session
_DOC = vars(LocalProxy)["__doc__"]  # of what a proxy stands for; a class without one would say None


def spell_out() -> None:
    """Do this to Flask's proxies, for all of this process; done twice it is done once."""
    _change(flask_globals.session, flask_globals._cv_request, _session_of)
    _change(flask_globals.request, flask_globals._cv_request, attrgetter("request"))
    _change(flask_globals.g, flask_globals._cv_app, attrgetter("g"))
    _change(flask_globals.current_app, flask_globals._cv_app, attrgetter("app"))


def _session_of(context: RequestContext) -> Any:
    """What the property of Flask's own contexts does: the session was looked at."""
    session = context._session
    if session is None or type(context).session is not _SESSION:
        return context.session
    session.accessed = True
    return session


def _change(proxy: Any, variable: ContextVar[Any], current: Callable[[Any], Any]) -> None:
    if type(proxy) is LocalProxy and object.__getattribute__(proxy, "_LocalProxy__wrapped") is variable:
        # Not by assignment: that would be the class of what it stands for.
        object.__dict__["__class__"].__set__(proxy, _proxy_class(variable.get, current))


def _proxy_class(find: Callable[[None], Any], current: Callable[[Any], Any]) -> type[LocalProxy[Any]]:
    class Proxy(LocalProxy[Any]):
        __slots__ = ()
        __doc__ = _DOC

        def __getattr__(self, name: str) -> Any:
            context = find(None)
            return getattr(self._get_current_object() if context is None else current(context), name)

        def __setattr__(self, name: str, value: object) -> None:
            context = find(None)
            setattr(self._get_current_object() if context is None else current(context), name, value)

        def __getitem__(self, key: object) -> Any:
            context = find(None)
            return (self._get_current_object() if context is None else current(context))[key]

        def __setitem__(self, key: object, value: object) -> None:
            context = find(None)
            (self._get_current_object() if context is None else current(context))[key] = value

        def __contains__(self, key: object) -> bool:
            context = find(None)
            return key in (self._get_current_object() if context is None else current(context))

    Proxy.__name__ = Proxy.__qualname__ = LocalProxy.__name__
    Proxy.__module__ = LocalProxy.__module__
    return Proxy
