"""Values to bytes and back, the types Flask's session keeps kept: JSON with tags (the default), or msgpack.

A value that JSON has no word for travels as an object with one key that names its type: ``{" t": [1, 2]}`` is a tuple.
The tags of tuple, bytes, Markup, UUID, datetime and "a dict that looks like a tag" are Flask's own (`flask.json.tag`),
so what was stored by one is read by the other; set, frozenset, Decimal, date, time and timedelta are ours in addition.
There is no pickle: whoever can write to Redis must not be able to run code here.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from email.utils import format_datetime, parsedate_to_datetime
from typing import Any, Protocol
from uuid import UUID

from markupsafe import Markup

from sharedcluster.errors import ConfigError


class CodecError(TypeError):
    """A value cannot be stored; the message names its type."""


class Codec(Protocol):
    """Turns values into bytes. `decode(encode(x))` equals x, and encoding that again gives the same bytes."""

    name: str

    def encode(self, value: Any) -> bytes:
        """Raises CodecError for a type that cannot be stored."""

    def decode(self, data: bytes) -> Any:
        """Raises ValueError for bytes that no `encode` of this codec made."""


def _http_date(value: datetime) -> str:
    aware = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    return format_datetime(aware, usegmt=True)


def _parse_http_date(text: str) -> datetime:
    return parsedate_to_datetime(text).replace(tzinfo=UTC)


def _key_of(mapping: Mapping[str, Any]) -> str:
    return next(iter(mapping))


_FROM_TAG: dict[str, Callable[[Any], Any]] = {
    " di": lambda value: {_key_of(value)[:-2]: value[_key_of(value)]},
    " t": tuple,
    " b": b64decode,
    " m": Markup,
    " u": UUID,
    " d": _parse_http_date,
    " s": set,
    " fs": frozenset,
    " dec": Decimal,
    " date": date.fromisoformat,
    " time": time.fromisoformat,
    " td": lambda value: timedelta(days=value[0], seconds=value[1], microseconds=value[2]),
}

_SCALARS = (str, int, bool, type(None), float)


# Longer ones go the common way, where Python's own limit for such numbers speaks.
DIGITS_LIMIT = 20
ZERO = ord("0")

_quote: Callable[[str], str] = json.encoder.encode_basestring
_encoder = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def _tag_dict(value: dict[Any, Any]) -> Any:
    tagged = {key: _tag(item) for key, item in value.items()}
    if len(value) == 1 and (key := _key_of(value)) in _FROM_TAG:
        return {" di": {f"{key}__": tagged[key]}}
    return tagged


_TO_TAG: dict[type, Callable[[Any], Any]] = {
    dict: _tag_dict,
    list: lambda value: [_tag(item) for item in value],
    tuple: lambda value: {" t": [_tag(item) for item in value]},
    bytes: lambda value: {" b": b64encode(value).decode("ascii")},
    Markup: lambda value: {" m": str(value)},
    UUID: lambda value: {" u": value.hex},
    datetime: lambda value: {" d": _http_date(value)},
    # Sorted by their text, so that one set always has one encoding.
    set: lambda value: {" s": sorted(map(_tag, value), key=_encoder)},
    frozenset: lambda value: {" fs": sorted(map(_tag, value), key=_encoder)},
    Decimal: lambda value: {" dec": str(value)},
    date: lambda value: {" date": value.isoformat()},
    time: lambda value: {" time": value.isoformat()},
    timedelta: lambda value: {" td": [value.days, value.seconds, value.microseconds]},
}


def _tag(value: Any) -> Any:
    kind = type(value)
    if kind in _SCALARS:
        return value
    if (to_tag := _TO_TAG.get(kind)) is not None:
        return to_tag(value)
    return _tag_unusual(value)


def _tag_unusual(value: Any) -> Any:
    """Subclasses of the known types, and everything with `__html__`, are stored as what they extend, as Flask does."""
    for known in (dict, tuple, list, bytes):
        if isinstance(value, known):
            return _TO_TAG[known](value)
    if callable(html := getattr(value, "__html__", None)):
        return {" m": str(html())}
    for kind in (UUID, datetime, date, time, timedelta, Decimal, set, frozenset):
        if isinstance(value, kind):
            return _TO_TAG[kind](value)
    if isinstance(value, str | int | float):
        return value
    raise CodecError(f"a {type(value).__qualname__} cannot be stored; make it a dict, list, str or number first")


def _untag(value: dict[str, Any]) -> Any:
    if len(value) == 1 and (from_tag := _FROM_TAG.get(key := _key_of(value))) is not None:
        return from_tag(value[key])
    return value


_decoder = json.JSONDecoder(object_hook=_untag).decode


class TaggedJson:
    """Flask's tagged JSON; readable in redis-cli."""

    name = "json"

    def encode(self, value: Any) -> bytes:
        """See `Codec`."""
        kind = type(value)
        # What sessions mostly hold; `json` would set up an encoder for each call.
        if kind is int:
            return b"%d" % value
        if kind is str:
            return _quote(value).encode("utf-8", "surrogatepass")
        return _encoder(value if kind in _SCALARS else _tag(value)).encode("utf-8", "surrogatepass")

    def decode(self, data: bytes) -> Any:
        """See `Codec`."""
        if data.isdigit() and len(data) < DIGITS_LIMIT and (data[0] != ZERO or len(data) == 1):
            return int(data)
        text = data.decode("utf-8", "surrogatepass")
        if text[:1] == '"' and text[-1] == '"' and text.count('"') == 2 and "\\" not in text and text.isprintable():
            return text[1:-1]  # nothing in it is written otherwise than it is
        return _decoder(text)


class MessagePack:
    """msgpack through msgspec: smaller and faster for large values, the same types, not readable in redis-cli."""

    name = "msgpack"

    def __init__(self) -> None:
        try:
            import msgspec  # optional: the extra `fast`
        except ImportError:
            raise ConfigError(
                'The codec "msgpack" needs msgspec, which is not installed.',
                advice="pip install 'sharedcluster[fast]'",
            ) from None
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder().decode
        self._error = msgspec.DecodeError

    def encode(self, value: Any) -> bytes:
        """See `Codec`."""
        return self._encode(value if type(value) in _SCALARS else _tag(value))

    def decode(self, data: bytes) -> Any:
        """See `Codec`."""
        try:
            return _untag_deep(self._decode(data))
        except self._error as error:
            raise ValueError(str(error)) from None


def _untag_deep(value: Any) -> Any:
    if type(value) is dict:
        return _untag({key: _untag_deep(item) for key, item in value.items()})
    if type(value) is list:
        return [_untag_deep(item) for item in value]
    return value


def make_codec(name: str) -> Codec:
    """The codec of that name: "json" or "msgpack".

    Raises:
        ConfigError: There is none of that name, or what it needs is not installed.
    """
    if name == "json":
        return TaggedJson()
    if name == "msgpack":
        return MessagePack()
    raise ConfigError(f'There is no codec "{name}".', advice='Use "json" or "msgpack".')
