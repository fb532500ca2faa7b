"""Redis URLs: taken apart as redis-py takes them apart, and shown without their passwords."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from sharedcluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A Redis URL taken apart; `host` and `port` or, for a unix socket, `path`."""

    url: str = field(repr=False)
    tls: bool = False
    host: str = ""
    port: int = 6379
    path: str = ""
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    query: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def shown(self) -> str:
        """The URL as it may be printed."""
        return redact(self.url)


def redact(url: str) -> str:
    """The URL without its password, for logs, status and errors; also of a URL that is not well-formed.

    A password that holds "/", "?" or "#" unescaped moves the border between the parts of a URL. So everything up to
    the last "@" counts as credentials.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return "(not a URL)" if "@" in url or ":" in url else url
    credentials, at, place = rest.rpartition("@")
    user = credentials.partition(":")[0] if at else ""
    place = re.sub(r"(?i)(?<=[?&])(password|username)=[^&]*&?", "", place).rstrip("?&")
    return f"{scheme}://{user}{'@' if user else ''}{place}"


def parse(url: str, source: str = "--redis") -> RedisAddress:
    """Take a URL apart as redis-py does: `redis://`, `rediss://` and `unix://`, `/DB` or `?db=`.

    Args:
        url: What the operator gave.
        source: Where it was given, for the error: "--redis" or "REDIS_URL".

    Raises:
        ConfigError: It is not a URL of these kinds; the text does not repeat a password.
    """
    try:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query))
        username, password = unquote(parts.username or ""), unquote(parts.password or "")
        port = parts.port or 6379
        digits = query.get("db") or (parts.path.strip("/") if parts.scheme != "unix" else "") or "0"
        db = int(digits)
    except ValueError:
        raise _not_a_url(url, source, "The port or the database in it is not a number.") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise _not_a_url(url, source, "sharedcluster speaks to redis://, rediss:// (TLS) and unix://.")
    if parts.scheme == "unix" and not parts.path:
        raise _not_a_url(url, source, "The path of the socket is missing.")
    return RedisAddress(
        url=url,
        tls=parts.scheme == "rediss",
        host="" if parts.scheme == "unix" else (parts.hostname or "localhost"),
        port=port,
        path=unquote(parts.path) if parts.scheme == "unix" else "",
        db=db,
        username=username or query.get("username", ""),
        password=password or query.get("password", ""),
        query=query,
    )


def _not_a_url(url: str, source: str, fact: str) -> ConfigError:
    advice = (
        "Such URLs work: redis://localhost:6379/0, rediss://user:password@host:6380/0, unix:///run/redis.sock?db=0"
    )
    hint = "A password with / ? # or @ in it has to be percent-encoded." if "@" in url else ""
    return ConfigError(
        f"{source} is not a Redis URL: {redact(url)}", fact=fact, advice=tuple(filter(None, (advice, hint)))
    )
