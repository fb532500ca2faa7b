"""Flask's proxies, spelled out: whatever is done with one, it is what Werkzeug's own does."""

from __future__ import annotations

import copy
import operator
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from flask import Flask, Request, current_app, g, request, session
from flask import globals as flask_globals
from flask.ctx import RequestContext
from flask.sessions import SecureCookieSession
from werkzeug.local import LocalProxy

from sharedcluster.flask_shortcuts import take_shortcuts, texts

if texts.unknown(texts.DISPATCH):
    pytest.skip("a Flask that has not been read: its proxies stay as they are", allow_module_level=True)

from sharedcluster.flask_shortcuts.proxies import spell_out

PROXIES: dict[str, Any] = {"session": session, "request": request, "g": g, "current_app": current_app}
PLAIN: dict[str, Any] = {
    "session": LocalProxy(flask_globals._cv_request, "session", unbound_message=flask_globals._no_req_msg),
    "request": LocalProxy(flask_globals._cv_request, "request", unbound_message=flask_globals._no_req_msg),
    "g": LocalProxy(flask_globals._cv_app, "g", unbound_message=flask_globals._no_app_msg),
    "current_app": LocalProxy(flask_globals._cv_app, "app", unbound_message=flask_globals._no_app_msg),
}
"""What Flask had before."""


def set_attribute(proxy: Any) -> Any:
    """Set one and read it."""
    proxy.own = 7
    return proxy.own, vars(proxy._get_current_object())["own"]


def set_item(proxy: Any) -> Any:
    """Set one and read it."""
    proxy["own"] = 7
    return proxy["own"], proxy._get_current_object()["own"]


def delete_attribute(proxy: Any) -> Any:
    """It is gone then."""
    proxy.own = 7
    del proxy.own
    return hasattr(proxy, "own")


def change_in_place(proxy: Any) -> Any:
    """`|=` gives the proxy back, not what it stands for."""
    before = proxy
    proxy |= {"b": 2}
    return proxy is before, proxy.get("b")


USES: dict[str, Callable[[Any], Any]] = {
    "a method": lambda proxy: proxy.get("a", 5),
    "an attribute": lambda proxy: (proxy.method, proxy.path),
    "an attribute of all": lambda proxy: proxy.__class__.__name__,
    "none such": lambda proxy: proxy.nothing,
    "none such, with a default": lambda proxy: getattr(proxy, "nothing", 3),
    "one that is there": lambda proxy: hasattr(proxy, "name"),
    "set an attribute": set_attribute,
    "delete an attribute": delete_attribute,
    "delete none such": lambda proxy: delattr(proxy, "nothing"),
    "an item": lambda proxy: proxy["a"],
    "no item": lambda proxy: proxy["nothing"],
    "set an item": set_item,
    "delete an item": lambda proxy: (set_item(proxy), operator.delitem(proxy, "own"), "own" in proxy),
    "in": lambda proxy: ("a" in proxy, "nothing" in proxy),
    "in place": change_in_place,
    "truth": bool,
    "length": len,
    "iteration": list,
    "text": str,
    "representation": lambda proxy: repr(proxy).split(" at ")[0],
    "names": dir,
    "equal to what it stands for": lambda proxy: proxy == proxy._get_current_object(),
    "instance": lambda proxy: isinstance(proxy, (SecureCookieSession, Request, Flask)),
    "is a proxy": lambda proxy: isinstance(proxy, LocalProxy),
    "name of its type": lambda proxy: (type(proxy).__name__, type(proxy).__module__),
    "documentation": lambda proxy: (proxy.__doc__, type(proxy).__doc__ == LocalProxy.__doc__),
    "copy": lambda proxy: type(copy.copy(proxy)).__name__,
    "wrapped": lambda proxy: proxy.__wrapped__,
    "dict": lambda proxy: type(vars(proxy)).__name__,
    "called": lambda proxy: proxy(),
}


def outcome(use: Callable[[Any], Any], proxy: Any) -> object:
    """What comes of it: a value, or an error as its reader sees it."""
    try:
        return use(proxy)
    except Exception as error:
        return type(error), str(error), error.__suppress_context__


@pytest.fixture(autouse=True)
def spelled_out() -> None:
    """As in a process whose application takes the shortcuts."""
    spell_out()


def make_app() -> Flask:
    """With a secret key, and no more."""
    app = Flask("proxies")
    app.secret_key = "x"
    return app


@contextmanager
def in_request(app: Flask) -> Iterator[None]:
    """A request, with something in its session and in g."""
    with app.test_request_context("/path"):
        session["a"] = 1
        g.name = "ann"
        yield


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("name", PROXIES)
def test_every_use_is_what_it_was(name: str, use: Callable[[Any], Any]) -> None:
    """Values, errors and their texts, in a request and outside of any context."""
    assert type(PROXIES[name]) is not LocalProxy
    found = []
    for proxy in (PROXIES[name], PLAIN[name]):
        with in_request(make_app()):
            inside = outcome(use, proxy)
        found.append((inside, outcome(use, proxy)))
    if use is USES["iteration"]:
        # Outside of a context Werkzeug's says that it is not iterable; ours, what is missing.
        assert "Working outside of" in str(found[0][1])
        found = [(each[0], None) for each in found]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["session", "request"])
def test_an_application_s_context_alone_has_no_request(name: str) -> None:
    """g and current_app are there, the others say what is missing."""
    with make_app().app_context():
        g.x = 1
        assert g.x == 1
        assert current_app.name == "proxies"
        with pytest.raises(RuntimeError, match="outside of request context"):
            PROXIES[name].get("x")


LOOKS: dict[str, Callable[[], object]] = {
    "get": lambda: session.get("a"),
    "item": lambda: session["a"],
    "in": lambda: "a" in session,
    "set": lambda: operator.setitem(session, "a", 2),
    "attribute": lambda: session.modified,
    "length": lambda: len(session),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_a_look_is_noted(look: Callable[[], object]) -> None:
    """Who looks at the session in any way has looked at it, for Vary: Cookie; who does not, has not."""
    with in_request(make_app()):
        kept: Any = session._get_current_object()  # type: ignore[attr-defined]
        kept.accessed = False
        assert request.path == "/path"
        assert not kept.accessed
        look()
        assert kept.accessed


def test_a_context_with_a_session_of_its_own_is_asked() -> None:
    """An application's own context class may make `session` what it likes."""

    class Context(RequestContext):
        @property
        def session(self) -> Any:
            return {"mine": 1}

    class Mine(Flask):
        def request_context(self, environ: Any) -> RequestContext:
            return Context(self, environ)

    app = Mine("mine")
    app.secret_key = "x"
    with app.test_request_context("/"):
        assert session["mine"] == 1
        assert "mine" in session
        assert session.get("mine") == 1
        session["new"] = 1
        assert "new" not in session


def test_a_session_of_a_class_that_knows_nothing_of_this() -> None:
    """What an interface of somebody's own opens need not have `accessed`: Flask only sets it."""

    class Plain(dict[str, Any]):
        pass

    for look in LOOKS.values():
        with in_request(make_app()):
            context: Any = flask_globals._cv_request.get()
            context._session = Plain(a=1)
            context._session.modified = False
            look()
            assert context._session.accessed is True


def test_a_session_that_is_not_open_yet() -> None:
    """Flask's assertion, not an error about None."""
    app = make_app()
    with app.test_request_context("/"):
        context: Any = flask_globals._cv_request.get()
        context._session = None
        for look in (LOOKS["get"], LOOKS["item"], LOOKS["in"], LOOKS["set"]):
            with pytest.raises(AssertionError, match="not yet been opened"):
                look()


def test_without_a_secret_key() -> None:
    """Flask's null session refuses to be written, in Flask's words, and may be read."""
    with Flask("no key").test_request_context("/"):
        assert session.get("a") is None
        assert "a" not in session
        with pytest.raises(RuntimeError, match="no secret key"):
            session["a"] = 1


@pytest.mark.parametrize("shortcuts", [True, False])
def test_an_application_with_shortcuts_has_them(*, shortcuts: bool) -> None:
    """In a process of its own: taking the shortcuts puts the classes in, and an application that wants none leaves all
    as it is.
    """
    code = f"""
import flask
from werkzeug.local import LocalProxy
from sharedcluster.flask_shortcuts import take_shortcuts
app = flask.Flask("own")
app.config["SHAREDCLUSTER_SHORTCUTS"] = {shortcuts}
take_shortcuts(app)
print([type(proxy) is LocalProxy for proxy in (flask.session, flask.request, flask.g, flask.current_app)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([not shortcuts] * 4)


def test_done_twice_and_for_several_applications() -> None:
    """The classes are put in once, whoever asks first; an application without shortcuts works with them, too."""
    classes = {name: type(proxy) for name, proxy in PROXIES.items()}
    app = make_app()
    take_shortcuts(app)
    spell_out()
    assert {name: type(proxy) for name, proxy in PROXIES.items()} == classes
    with in_request(make_app()):
        assert (session["a"], g.name, current_app.name, request.path) == (1, "ann", "proxies", "/path")
        with in_request(app):
            session["a"] = 3
        assert session["a"] == 1
