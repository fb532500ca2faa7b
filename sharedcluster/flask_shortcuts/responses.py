"""Responses without what comes to nothing for most of them.

That is looking for a content type among no headers (by an exception), a copy of all headers, each looked through for
line breaks again, in which nothing is changed, an iterator around a body of one piece, and the response itself where
nobody looks at it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from json import JSONEncoder
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, Protocol

import flask
from flask.json.provider import DefaultJSONProvider
from werkzeug.datastructures import Headers
from werkzeug.utils import get_content_type

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


class WholeBody(list[bytes]):
    """A body that is there, and what is to be called when it has been sent (PEP 3333).

    `on_close` is empty where calling that does nothing; the HTTP engine looks for it.
    """

    __slots__ = ("close", "on_close")
    close: Callable[[], None]
    on_close: list[Callable[[], Any]]


LATER: Final = "sharedcluster.later"
"""In an environ: `http.exchange.Later`, of a server that can wait for an answer without a greenlet."""


class Saved(Protocol):
    """What an answer waits for: a session that was submitted."""

    app: flask.Flask
    when_done: Callable[[Callable[[], object]], object]

    def settle(self) -> None:
        """Make the response what it is then; waits if it must."""


class _AsFlaskResponse(type):
    """What is no `response_class`, Flask makes into one. Every `flask.Response` counts as one: those an application
    makes, of classes of its own too, stay what they are.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, flask.Response) if cls is Response else super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, flask.Response) if cls is Response else super().__subclasscheck__(subclass)


class Response(flask.Response, metaclass=_AsFlaskResponse):
    """`flask.Response` for an application's `response_class`; it leaves no trace of its own when it is pickled."""

    saved: Saved | None = None

    def __init__(
        self,
        response: Any = None,
        status: Any = None,
        headers: Any = None,
        mimetype: str | None = None,
        content_type: str | None = None,
        direct_passthrough: bool = False,
    ) -> None:
        if content_type is None and mimetype is None and not headers and self.default_mimetype is not None:
            content_type = _content_type_of(self.default_mimetype)
        super().__init__(response, status, headers, mimetype, content_type, direct_passthrough)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer as a WSGI application; later, where the session is not stored yet and the server understands that."""
        saved = self.saved
        if saved is None:
            return super().__call__(environ, start_response)
        return self._answer_later(saved, environ, start_response)

    def wait_for(self, saved: Saved) -> None:
        """Let the answer wait for a session that was submitted."""
        self.saved = saved

    def _answer_later(self, saved: Saved, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        answer = functools.partial(self._settle, saved, environ, start_response)
        later = environ[LATER]
        body: Iterable[bytes] = later(saved.when_done, answer) if later.is_for(start_response) else answer()
        return body

    def _settle(self, saved: Saved, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        _set_on(self, "saved", None)
        try:
            saved.settle()
        except Exception as error:  # as Flask does with what comes from saving a session
            with saved.app.request_context(environ):
                return saved.app.handle_exception(error)(environ, start_response)
        return self(environ, start_response)

    def get_wsgi_response(self, environ: WSGIEnvironment) -> tuple[Iterable[bytes], str, list[tuple[str, str]]]:
        """What goes to the server: the body, the status, the headers. See `werkzeug.Response.get_wsgi_response`."""
        headers = self.headers
        if type(self) is Response and type(headers) is Headers:
            fields = headers._list.copy()  # what `to_wsgi_list` makes by way of an iterator
            names = tuple(map(_name_of, fields))
            has_all = _have_all.get(names)
            if has_all is None:
                has_all = _learn_names(names)
            status = self.status_code
            if has_all and 200 <= status != 204 and status != 304:
                pieces = self.response
                if (
                    type(pieces) is not list
                    or len(pieces) != 1
                    or type(pieces[0]) is not bytes
                    or self.direct_passthrough
                    or environ["REQUEST_METHOD"] == "HEAD"
                ):
                    return self.get_app_iter(environ), self.status, fields
                body = WholeBody(pieces)
                body.close = self.close
                body.on_close = self._on_close
                return body, self.status, fields
        return super().get_wsgi_response(environ)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a `flask.Response`: what an application keeps of it must not depend on the server it had."""
        if type(self) is not Response:
            return super().__reduce_ex__(protocol)
        reduced: Any = super().__reduce_ex__(1)
        make, arguments, state = reduced
        return make, (flask.Response, *arguments[1:]), state


_name_of: Callable[[tuple[str, str]], str] = itemgetter(0)
_have_all: dict[tuple[str, ...], bool] = {}
NAMES_LIMIT: Final = 1000
NAMES_LENGTH_LIMIT: Final = 1000


def _learn_names(names: tuple[str, ...]) -> bool:
    """Whether Werkzeug would leave headers of these names as they are: it adds a length and makes locations whole."""
    lower = {name.lower() for name in names}
    has_all = "content-length" in lower and not lower & {"location", "content-location"}
    if len(_have_all) >= NAMES_LIMIT:
        _have_all.clear()
    if sum(map(len, names)) <= NAMES_LENGTH_LIMIT:
        _have_all[names] = has_all
    return has_all


class Unmade(Response):
    """A text on its way to the server, and the response that it becomes for whoever looks at it.

    Few do: without a hook or a receiver nobody sees a response between the view and the server. Until somebody reads
    or sets anything of it this is a body and the headers around it, which need not be made into what Werkzeug has for
    them to be changed, and back.

    Args:
        body: The text, encoded.
        fields: A type and a length, and what `add_field` adds.
    """

    unmade: tuple[bytes, list[tuple[str, str]]]

    def __init__(self, body: bytes, fields: list[tuple[str, str]]) -> None:
        _set_on(self, "unmade", (body, fields))

    def make(self) -> None:
        """Become the `Response` that it would have been; before that only its class and `vars` tell them apart."""
        body, fields = self.unmade
        _set_on(self, "__class__", Response)
        del self.unmade
        self.headers = headers = Headers.__new__(Headers)
        headers._list = fields
        self._status, self._status_code = _OK
        self.direct_passthrough = False
        self._on_close = []
        self.response = [body]

    def __getattr__(self, name: str) -> Any:
        self.make()
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.make()
        setattr(self, name, value)

    def __delattr__(self, name: str) -> None:
        self.make()
        delattr(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.make()
        return self.__reduce_ex__(protocol)

    def wait_for(self, saved: Saved) -> None:
        """See `Response.wait_for`; nobody has looked."""
        _set_on(self, "saved", saved)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """See `Response.__call__`."""
        if self.saved is not None:
            return self._answer_later(self.saved, environ, start_response)
        if environ["REQUEST_METHOD"] == "HEAD":
            self.make()
            return self(environ, start_response)
        body, fields = self.unmade
        start_response(_OK[0], fields.copy())  # which is the server's to change
        return [body]


_set_on = object.__setattr__


def add_field(response: flask.Response, field: tuple[str, str]) -> None:
    """Add a field that has no line breaks: Werkzeug looks for them with a pattern."""
    if type(response) is Unmade:
        response.unmade[1].append(field)
        return
    headers = response.headers
    if type(headers) is Headers:
        headers._list.append(field)
    else:
        headers.add(*field)


def text_response(text: str, mimetype: str | None = None) -> Response:
    """What `Response(text, mimetype=mimetype)` makes, made when somebody looks at it.

    For who has seen that Werkzeug's own making is known (`texts`).
    """
    if mimetype is None:
        mimetype = Response.default_mimetype
    if mimetype is None or not Response.automatically_set_content_length or Response.default_status != 200:
        return Response(text, mimetype=mimetype)
    body = text.encode()
    return Unmade(body, [_content_type_field(mimetype), ("Content-Length", str(len(body)))])


def json_response(provider: Any, is_debug: bool, value: Any) -> Response | None:
    """What `DefaultJSONProvider.response(value)` makes; None if that is not this provider's way. As `text_response`.

    Flask makes an encoder for each value; this one is made once for each way in which Flask's own can be set.
    """
    if type(provider) is not DefaultJSONProvider or not vars(provider).keys() <= _PROVIDER_FACTS:
        return None
    if provider.default is not _FLASK_S_DEFAULT or provider.mimetype is None:
        return None
    is_wide = (provider.compact is None and is_debug) or provider.compact is False
    encode = _encoder_of(provider.ensure_ascii, provider.sort_keys, is_wide)
    return text_response(f"{encode(value)}\n", provider.mimetype)


_FLASK_S_DEFAULT = DefaultJSONProvider.default
_PROVIDER_FACTS = frozenset({"_app", "compact", "ensure_ascii", "mimetype", "sort_keys"})


@functools.lru_cache(16)
def _encoder_of(ensure_ascii: bool, sort_keys: bool, is_wide: bool) -> Callable[[Any], str]:
    return JSONEncoder(
        default=_FLASK_S_DEFAULT,
        ensure_ascii=ensure_ascii,
        sort_keys=sort_keys,
        indent=2 if is_wide else None,
        separators=None if is_wide else (",", ":"),
    ).encode


@functools.lru_cache(16)
def _content_type_field(mimetype: str) -> tuple[str, str]:
    made = Response(mimetype=mimetype).headers.to_wsgi_list()
    return made[0]


_OK: Final = (flask.Response(status=200).status, 200)

_content_type_of = functools.lru_cache(16)(functools.partial(get_content_type, charset="utf-8"))
