"""Which Flask and Werkzeug we have read.

Who leaves out a step of another one's has to know what the step would have done. So `contexts`, `dispatch`, `proxies`
and `rules` stand in for functions with the very text that was read when they were written, told by its digest. Of
another release, which may do something else there, nothing is left out until somebody has read it and added its digest
here; nor of a function that a tool for tracing has put one of its own before, whose text is not Flask's either.

Nothing is imported here, and the first three only when all is known: another release may not have what they need.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import pkgutil
from collections.abc import Mapping
from types import CodeType, FunctionType
from typing import Final

DISPATCH: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    # Flask 3.1.3. Earlier ones keep the session elsewhere.
    "flask.app:Flask": {
        "request_context": ("6a12add4c929649c",),
        "app_context": ("89003ab22fd79e3d",),
        "create_url_adapter": ("4cec6df4944a7494",),
        "full_dispatch_request": ("c3cc0ae62a1a21fb",),
        "preprocess_request": ("b2613988667d7bee",),
        "dispatch_request": ("d9d8bc2de10dc457",),
        "finalize_request": ("c0714a56bc04fec9",),
        "make_response": ("b3ba78bc5c00b266",),
        "process_response": ("df966aa7840a0e7d",),
        "do_teardown_request": ("88af89f4de871978",),
        "do_teardown_appcontext": ("da229d24e800ea62",),
    },
    "flask.ctx:RequestContext": {
        "__init__": ("be3dc80c8e1a11ad",),
        "push": ("819fbd33a462b27b",),
        "match_request": ("84262465c40f7d68",),
        "pop": ("561907e388b6231f",),
        "session": ("72fb9f87687c3069",),
    },
    "flask.ctx:AppContext": {
        "__init__": ("d9512df43aaa451c",),
        "push": ("4a507dd37c185339",),
        "pop": ("f0158d79424d4348",),
    },
    "flask.json.provider:DefaultJSONProvider": {
        "_prepare_response_obj": ("7e4067d9681a49b4",),
        "response": ("459e4a315c4e3383",),
        "dumps": ("ca58c776fe987002",),
    },
    "flask.json.provider": {"_default": ("b92d1bdb2af611fc",)},
    # Werkzeug 3.1.4 to 3.1.9, of which 3.1.7 and 3.1.9 changed how a path is matched.
    "werkzeug.local:LocalProxy": {
        "__init__": ("583ba751feb376cb",),
    },
    "werkzeug.local:_ProxyLookup": {
        "__init__": ("904df524c11da586",),
        "__get__": ("ca0625fbaeb1d5a0",),
        "__call__": ("2338916167fc42d6",),
    },
    "werkzeug.wrappers:Request": {
        "__init__": ("725895d016d69e29",),
        "close": ("f2f73e29cc33f8a9",),
    },
    "werkzeug.sansio.request:Request": {
        "__init__": ("323bc936087334af",),
    },
    "werkzeug.wsgi": {
        "_get_server": ("0776525d7f67757b",),
    },
    "werkzeug.wrappers:Response": {
        "__init__": ("85b059276e42ca42",),
        "set_data": ("f611509da10410cb",),
        "__call__": ("56a023dfb8deb500",),
        "get_wsgi_response": ("26c00851b3adb050",),
        "get_wsgi_headers": ("bafa8e0dfce5c647",),
        "get_app_iter": ("f1bea83f34d58666",),
        "close": ("1339019ac36d2d67",),
    },
    "werkzeug.sansio.response:Response": {
        "__init__": ("a6597f620b1e0d2b",),
        "_clean_status": ("4cddca523c2fbac2",),
    },
    "werkzeug.datastructures:EnvironHeaders": {
        "__init__": ("e2ef7d8778995700",),
    },
    "werkzeug.datastructures:Headers": {
        "__init__": ("f9b13d66a056c5ec",),
        "__iter__": ("ca9e960afd713545",),
    },
    "werkzeug.routing:Map": {
        "add": ("58668387c61afc78",),
    },
    "werkzeug.routing:MapAdapter": {
        "match": ("0bd88c05978998c6",),
        "get_default_redirect": ("9401bfda644ba055",),
    },
    "werkzeug.routing.matcher:StateMachineMatcher": {
        "match": ("306f8a6dd11085f4", "d229feea415c1031", "bc7b3d5ce74fafcf"),
    },
}
"""Where a part is left out: class or module, function, and the digests of the texts that we know."""


def unknown(known: Mapping[str, Mapping[str, tuple[str, ...]]]) -> list[str]:
    """The names of those functions, as they are now, whose text is none that we know, or that cannot be read."""
    return [
        f"{owner.rpartition(':')[2]}.{name}"
        for owner, functions in known.items()
        for name, digests in functions.items()
        if digest(_find(owner, name)) not in digests
    ]


def _find(owner: str, name: str) -> object:
    try:
        return getattr(pkgutil.resolve_name(owner), name, None)
    except (ImportError, AttributeError):
        return None


def digest(function: object) -> str:
    """What tells the text of a function, docstring and comments included; empty if it has none.

    A property counts as what reads it.
    """
    if type(function) is property:
        function = function.fget
    # Of the code, or we would be shown what a decorator has wrapped.
    return _digest(function.__code__) if type(function) is FunctionType else ""


@functools.cache
def _digest(code: CodeType) -> str:
    try:
        text = inspect.getsource(code)
    except (OSError, TypeError):
        return ""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
