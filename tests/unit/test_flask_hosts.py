"""Remembered hosts: what Flask would have said, each time."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from flask import Flask, Request, request, url_for
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, MapAdapter

from sharedcluster.flask_hosts import HOST_LENGTH_LIMIT, HOSTS_LIMIT, UrlAdapters, remember_hosts

HOSTS = (
    "example.org", "EXAMPLE.org", "example.org:80", "example.org:443", "example.org:8000", "www.example.org",
    "a.b.test", "127.0.0.1:8000", "[::1]:8000", "bücher.example", "b\xc3\xbccher.example", "x" * 300, "evil/", "a b",
    "", "..", "\xff",
)  # fmt: skip
NAMES = (None, "example.org", "example.org:80", "test:8000", "EXAMPLE.ORG")
TRUSTED: tuple[Any, ...] = (
    None,
    [],
    ["example.org"],
    [".example.org"],
    "example.org",
    ("a.b.test", "example.org"),
    ["bücher.example"],
)

USUAL = {
    "REQUEST_METHOD": "GET",
    "SCRIPT_NAME": "",
    "PATH_INFO": "/item/7",
    "QUERY_STRING": "",
    "wsgi.url_scheme": "http",
    "SERVER_NAME": "localhost",
    "SERVER_PORT": "8000",
    "HTTP_HOST": "example.org:80",
}
CHANGES: dict[str, tuple[Any, ...]] = {
    "REQUEST_METHOD": ("POST", "get", "OPTIONS"),
    "SCRIPT_NAME": ("/shop", "/shop/", "/caf\xc3\xa9", None),
    "PATH_INFO": ("/", "/caf\xc3\xa9", "/\xff", "//x", "", None),
    "QUERY_STRING": ("a=1&b=2", "a=caf\xc3\xa9", "\xff", None),
    "wsgi.url_scheme": ("https",),
    "SERVER_NAME": ("0.0.0.0", "::1", "/run/app.sock", None),
    "SERVER_PORT": ("80", "443", "", None),
    "HTTP_HOST": (*HOSTS, None),
    "HTTP_CONNECTION": ("keep-alive", "Upgrade", "upgrade, keep-alive"),
    "HTTP_UPGRADE": ("websocket", "WebSocket", "h2c"),
    "config SERVER_NAME": NAMES,
    "config TRUSTED_HOSTS": TRUSTED,
    "subdomain_matching": (True,),
    "host_matching": (True,),
    "default_subdomain": ("www",),
}
"""What may be another way with the next request; None: it is not there."""

changes = st.lists(
    st.sampled_from(sorted(CHANGES)).flatmap(lambda key: st.tuples(st.just(key), st.sampled_from(CHANGES[key]))),
    max_size=3,
).map(dict)


def make_app() -> Flask:
    """An application with a route or two."""
    app = Flask("hosts")
    app.add_url_rule("/", "index", lambda: request.host)
    app.add_url_rule("/item/<int:number>", "item", lambda number: url_for("item", number=number, _external=True))
    return app


def answer(app: Flask, changed: dict[str, Any]) -> tuple[Any, ...]:
    """Everything that can be told of the adapter an application makes, or how it refuses."""
    now = USUAL | changed
    app.config.update({name: now.pop(f"config {name}", None) for name in ("SERVER_NAME", "TRUSTED_HOSTS")})
    app.subdomain_matching = now.pop("subdomain_matching", False)
    app.url_map.host_matching = now.pop("host_matching", False)
    app.url_map.default_subdomain = now.pop("default_subdomain", "")
    made = Request({key: value for key, value in now.items() if value is not None})
    try:
        adapter = app.create_url_adapter(made)
    except (HTTPException, KeyError, RuntimeError) as error:
        return type(error), str(error)
    assert adapter is not None
    assert adapter.map is app.url_map
    facts = {key: value for key, value in vars(adapter).items() if key != "map"}
    try:
        matched: Any = adapter.match()
    except HTTPException as error:
        matched = type(error), error.code, getattr(error, "new_url", "")
    return facts, vars(made).get("host"), made.trusted_hosts, matched


def check(sequence: list[dict[str, Any]]) -> None:
    """Ask Flask and Flask with a memory the same."""
    plain, remembering = make_app(), make_app()
    remember_hosts(remembering)
    assert isinstance(remembering.create_url_adapter, UrlAdapters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a host is none of SERVER_NAME's
        for changed in sequence:
            assert answer(remembering, changed) == answer(plain, changed), changed


@given(changes, st.lists(changes, min_size=1, max_size=6))
def test_the_same_as_flask_s(usual: dict[str, Any], sequence: list[dict[str, Any]]) -> None:
    """Whatever is asked, and whatever the configuration says by then: adapters, hosts and errors are Flask's own."""
    check([usual, *({**usual, **changed} for changed in sequence)] * 2)


@pytest.mark.parametrize("key", sorted(CHANGES))
@pytest.mark.parametrize(
    "usual",
    [
        {},
        {"config SERVER_NAME": "example.org"},
        {"config SERVER_NAME": "example.org", "HTTP_HOST": "www.example.org"},
        {"HTTP_CONNECTION": "upgrade"},
    ],
)
def test_no_fact_is_missed(key: str, usual: dict[str, Any]) -> None:
    """One request after another that differs in one thing, and in that and the way subdomains are found."""
    for more in ({}, {"subdomain_matching": True, "config SERVER_NAME": "example.org"}):
        for value in CHANGES[key]:
            check([{**usual, **more}, {**usual, **more, key: value}, {**usual, **more}])


def test_an_adapter_of_its_own() -> None:
    """A request that changes its adapter changes nobody else's, the first as little as a later one."""
    app = make_app()
    remember_hosts(app)
    for _ in range(3):
        with app.test_request_context("/item/7") as context:
            adapter = context.url_adapter
            assert adapter is not None
            assert adapter.script_name == "/"
            adapter.script_name = "/changed/"
            adapter.server_name = "changed"


@pytest.mark.parametrize("name", [None, "example.org"])
def test_a_whole_application(name: str | None) -> None:
    """Views, redirects, refusals and URLs outside of a request are what they were."""
    plain, remembering = make_app(), make_app()
    remember_hosts(remembering)
    said = []
    for app in (plain, remembering, remembering):
        app.config["SERVER_NAME"] = name
        client = app.test_client()
        answers = [
            client.get("/"),
            client.get("/item/7", base_url="https://www.test/shop"),
            client.get("//item/7"),
            client.post("/"),
            client.get("/nothing"),
            client.get("/", headers={"Host": "a b"}),
        ]
        said.append([(each.status, each.text, each.location) for each in answers])
        if name:
            with app.app_context():
                assert url_for("item", number=7) == "http://example.org/item/7"
    assert said[0] == said[1] == said[2]
    assert "/shop/item/7" in said[0][1][1]


def test_what_is_remembered_is_bounded() -> None:
    """Clients that make up hosts fill no memory."""
    app = make_app()
    remember_hosts(app)
    adapters = app.create_url_adapter
    assert isinstance(adapters, UrlAdapters)
    client = app.test_client()
    for number in range(HOSTS_LIMIT + 10):
        assert client.get("/", headers={"Host": f"h{number}.test"}).status_code == 200
        assert 0 < len(adapters._known) <= HOSTS_LIMIT
    adapters._known.clear()
    assert client.get("/", headers={"Host": "h." * HOST_LENGTH_LIMIT + "h"}).status_code == 200
    assert client.get("/", headers={"Host": "bad host"}).text == ""
    assert len(adapters._known) == 1
    assert all(len(facts[0]) <= HOST_LENGTH_LIMIT for facts in adapters._known)


class OwnApp(Flask):
    """One that has a way of its own."""

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """As Flask does."""
        return super().create_url_adapter(request)


class OwnMap(Map):
    """One that binds in a way of its own."""

    def bind(self, *args: Any, **options: Any) -> MapAdapter:
        """As Werkzeug does."""
        return super().bind(*args, **options)


class AppWithOwnMap(Flask):
    """One whose map is its own."""

    url_map_class = OwnMap


@pytest.mark.parametrize("kind", [OwnApp, AppWithOwnMap])
def test_a_way_of_their_own(kind: type[Flask]) -> None:
    """An application or a map that does it in another way is left alone."""
    app = kind("own")
    remember_hosts(app)
    assert not isinstance(app.create_url_adapter, UrlAdapters)


def test_it_can_be_switched_off_and_comes_once() -> None:
    """SHAREDCLUSTER_REMEMBER_HOSTS = False leaves Flask as it is; a second call changes nothing."""
    app = make_app()
    app.config["SHAREDCLUSTER_REMEMBER_HOSTS"] = False
    remember_hosts(app)
    assert not isinstance(app.create_url_adapter, UrlAdapters)
    app.config["SHAREDCLUSTER_REMEMBER_HOSTS"] = True
    remember_hosts(app)
    first: Any = app.create_url_adapter
    remember_hosts(app)
    assert app.create_url_adapter is first
