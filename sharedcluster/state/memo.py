"""Cache keys for function calls: which call is the same call.

Learned from the bugs of others: `repr` of an object contains its address, so such keys never hit (or, worse, hit the
next object at that address); `1`, `True` and `1.0` are equal but not the same argument; a default and the same value
given by name are the same call; a falsy default is not "no argument". So arguments are bound to the signature,
defaults applied, and every value is written with its type. What has no canonical form is refused with a clear error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from types import CodeType, ModuleType
from typing import Any
from uuid import UUID


class UncacheableArgumentError(TypeError):
    """An argument has no canonical form; the message says which and what to do."""


def function_name(function: Callable[..., Any]) -> str:
    """The function's name in keys and tags, the same in every worker."""
    function = inspect.unwrap(function)
    return f"{function.__module__}.{function.__qualname__}"


def call_key(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, ignore: Collection[str] = ()
) -> str:
    """The cache key of one call: name, version of the code, 128 bits of the arguments.

    Args:
        function: What is called.
        args: Positional arguments.
        kwargs: Named arguments.
        ignore: Names of parameters that do not matter.

    Raises:
        UncacheableArgumentError: An argument has no canonical form.
        TypeError: The arguments do not fit the function.
    """
    name, version, signature, plain = _facts(function)
    arguments: Iterable[tuple[str, Any]]
    if plain is not None and not kwargs and len(args) == len(plain):
        arguments = zip(plain, args, strict=True)
    else:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments.items()
    digest = blake2b(digest_size=16)
    for parameter, value in arguments:
        if parameter in ignore:
            continue
        digest.update(f"{parameter}=".encode())
        digest.update(_canonical(value, f"{name}({parameter})"))
    return f"f:{name}:{version}:{digest.hexdigest()}"


@lru_cache(maxsize=4096)
def _facts(function: Callable[..., Any]) -> tuple[str, str, inspect.Signature, tuple[str, ...] | None]:
    function = inspect.unwrap(function)
    digest = blake2b(digest_size=6)
    code = getattr(function, "__code__", None)
    if isinstance(code, CodeType):
        _digest_code(digest, code)
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    is_plain = all(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in parameters)
    # If all may be given by place, and as many are given, nothing has to be bound.
    plain = tuple(signature.parameters) if is_plain else None
    return function_name(function), digest.hexdigest(), signature, plain


def _digest_code(digest: blake2b, code: CodeType) -> None:
    """What the function does: its instructions and constants, not where it stands in a file."""
    digest.update(code.co_code)
    digest.update(repr(code.co_names).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _digest_code(digest, constant)
        elif isinstance(constant, frozenset):
            digest.update(repr(sorted(map(repr, constant))).encode())
        else:
            digest.update(repr(constant).encode())


_BY_REPR = (str, int, bool, type(None), float, complex, bytes, Decimal, UUID, datetime, date, time, timedelta)


def _canonical(value: Any, where: str) -> bytes:
    """Bytes that are equal exactly for arguments that are the same, type included."""
    kind = type(value)
    if kind in _BY_REPR:
        text = repr(value)
        return f"{kind.__name__}:{len(text)}:{text};".encode("utf-8", "surrogatepass")
    if isinstance(value, Enum):
        return f"enum:{kind.__module__}.{kind.__qualname__}.{value.name};".encode()
    if kind in (list, tuple):
        return _group(kind.__name__, [_canonical(item, where) for item in value])
    if kind in (set, frozenset):
        return _group(kind.__name__, sorted(_canonical(item, where) for item in value))
    if kind is dict:
        pairs = sorted(_canonical(k, where) + _canonical(v, where) for k, v in value.items())
        return _group("dict", pairs)
    if isinstance(value, type | ModuleType) or inspect.isroutine(value):
        return f"ref:{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)};".encode()
    if callable(own := getattr(value, "__cache_key__", None)):
        return _group(f"{kind.__module__}.{kind.__qualname__}", [_canonical(own(), where)])
    raise UncacheableArgumentError(
        f"{where} is a {kind.__qualname__}, which has no canonical form for a cache key."
        f" Give it a method __cache_key__() that returns what tells it apart (an id, a tuple of values),"
        f" or leave the parameter out of the key with args_to_ignore."
    )


def _group(name: str, parts: list[bytes]) -> bytes:
    body = b"".join(parts)
    return f"{name}:{len(parts)}:{len(body)}:".encode() + body
