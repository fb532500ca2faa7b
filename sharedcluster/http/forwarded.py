"""Whom a proxy speaks for: X-Forwarded-* and Forwarded from peers that are allowed to, by ProxyFix's rules.

The fields of anybody else never reach the application (`request.HeadReader` drops them). From an allowed peer:

- `X-Forwarded-For` is walked from the right, past addresses that are themselves allowed; the first other one is the
  client. What a client wrote into the field stands further left and is never reached.
- `X-Forwarded-Proto`, `-Host`, `-Port`, `-Prefix`: the last value, which the nearest proxy set. Only those named in
  `forwarded_headers` are taken.
- `Forwarded` (RFC 7239) replaces them all when `forwarded_headers` names it; otherwise it is left alone, for a proxy
  that sets one family passes the other through as its client sent it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence

from sharedcluster.errors import ConfigError
from sharedcluster.http import policy
from sharedcluster.http.policy import Refused
from sharedcluster.http.settings import Environ

KINDS = ("for", "proto", "host", "port", "prefix", "forwarded")
SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}
ELEMENT = re.compile(r'([!#$%&\'*+\-.^_`|~0-9A-Za-z]+)=("(?:[^"\\]|\\.)*"|[^\s;,"]*)')
REMEMBERED = 1024


class AllowList:
    """Addresses and networks; `in` asks for one address, given as text."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._is_everyone = "*" in entries
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        self._known: dict[str, bool] = {}
        for entry in entries:
            if entry in ("*", ""):
                continue
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                raise ConfigError(
                    f"--forwarded-allow-ips holds {entry!r}, which is no address and no network.",
                    advice="Give addresses or networks, as 10.0.0.7 or 10.0.0.0/8, or * for everyone.",
                ) from None

    def __contains__(self, address: str) -> bool:
        known = self._known.get(address)
        if known is None:
            known = self._is_everyone or self._is_listed(address)
            if len(self._known) < REMEMBERED:
                self._known[address] = known
        return known

    def _is_listed(self, text: str) -> bool:
        address = parse_address(text)
        if address is None:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._networks)


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An IP address, or None."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


class Forwarding:
    """Applies an allowed peer's fields to an environ.

    Args:
        allowed: Whose word counts.
        kinds: Which fields are taken.
        is_host: Judges a host[:port].
    """

    def __init__(self, allowed: AllowList, kinds: Sequence[str], is_host: Callable[[str], bool]) -> None:
        unknown = sorted(set(kinds) - set(KINDS))
        if unknown:
            raise ConfigError(f"forwarded_headers holds {unknown[0]!r}.", advice=f"It may hold {', '.join(KINDS)}.")
        self._allowed = allowed
        self._kinds = frozenset(kinds)
        names = ["HTTP_FORWARDED"] if "forwarded" in kinds else [f"HTTP_X_FORWARDED_{kind.upper()}" for kind in kinds]
        self._looked_for = dict.fromkeys(names).keys()
        self._is_host = is_host

    def concerns(self, environ: Environ) -> bool:
        """Whether a field that counts is there, so that `apply` may change something."""
        return not self._looked_for.isdisjoint(environ.keys())

    def apply(self, environ: Environ) -> bool:
        """Let `environ` show the client instead of the proxy. Returns whether its address was named.

        Raises:
            Refused: The fields are malformed or contradict each other.
        """
        if not self.concerns(environ):
            return False
        words = self._rfc7239(environ) if "forwarded" in self._kinds else self._x_forwarded(environ)
        chain, scheme, host, port, prefix = words
        client = self._client(chain)
        if client is not None:
            environ["REMOTE_ADDR"] = client
            environ.pop("REMOTE_PORT", None)
        if scheme:
            if scheme.lower() not in SCHEMES:
                raise Refused(policy.FORWARDED_BAD, f"scheme {scheme}")
            environ["wsgi.url_scheme"] = SCHEMES[scheme.lower()]
        if host:
            self._set_host(environ, host)
        if port:
            self._set_port(environ, port)
        if prefix:
            if not prefix.startswith("/"):
                raise Refused(policy.FORWARDED_BAD, f"prefix {prefix}")
            environ["SCRIPT_NAME"] = prefix.rstrip("/")
        return client is not None

    def _x_forwarded(self, environ: Environ) -> tuple[list[str], str, str, str, str]:
        get = environ.get

        def last(kind: str) -> str:
            if kind not in self._kinds:
                return ""
            return str(get(f"HTTP_X_FORWARDED_{kind.upper()}", "")).rpartition(",")[2].strip(" \t")

        scheme = last("proto")
        if "proto" in self._kinds and scheme and "HTTP_X_FORWARDED_SSL" in environ:
            is_secure = str(environ["HTTP_X_FORWARDED_SSL"]).lower() == "on"
            if is_secure is not (scheme.lower() in ("https", "wss")):
                raise Refused(policy.FORWARDED_BAD, "X-Forwarded-Proto and X-Forwarded-Ssl contradict each other")
        chain = str(get("HTTP_X_FORWARDED_FOR", "")).split(",") if "for" in self._kinds else []
        return chain, scheme, last("host"), last("port"), last("prefix")

    def _rfc7239(self, environ: Environ) -> tuple[list[str], str, str, str, str]:
        text = str(environ.get("HTTP_FORWARDED", ""))
        elements: list[dict[str, str]] = [{}]
        position = 0
        while position < len(text):
            match = ELEMENT.match(text, position)
            if match is not None:
                value = match[2]
                elements[-1][match[1].lower()] = re.sub(r"\\(.)", r"\1", value[1:-1]) if value[:1] == '"' else value
                position = match.end()
            elif text[position] in "; \t":
                position += 1
            elif text[position] == ",":
                elements.append({})
                position += 1
            else:
                raise Refused(policy.FORWARDED_BAD, text[:80])
        return (
            [e.get("for", "") for e in elements],
            elements[-1].get("proto", ""),
            elements[-1].get("host", ""),
            "",
            "",
        )

    def _client(self, chain: list[str]) -> str | None:
        client = None
        for entry in reversed(chain):
            address = strip_port(entry.strip(" \t"))
            if parse_address(address) is None:
                break  # "unknown", an obfuscated name, or nonsense: who is further away cannot be known
            client = address
            if address not in self._allowed:
                break
        return client

    def _set_host(self, environ: Environ, host: str) -> None:
        if not self._is_host(host):
            raise Refused(policy.FORWARDED_BAD, f"host {host}")
        environ["HTTP_HOST"] = host
        name, port = split_port(host)
        environ["SERVER_NAME"] = name
        if port:
            environ["SERVER_PORT"] = port

    def _set_port(self, environ: Environ, port: str) -> None:
        if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
            raise Refused(policy.FORWARDED_BAD, f"port {port}")
        if "HTTP_HOST" in environ:
            environ["HTTP_HOST"] = f"{split_port(str(environ['HTTP_HOST']))[0]}:{port}"
        environ["SERVER_PORT"] = port


def split_port(host: str) -> tuple[str, str]:
    """Split host[:port]; the brackets of an IPv6 address stay."""
    name, colon, port = host.rpartition(":")
    return (name, port) if colon and not port.endswith("]") else (host, "")


def strip_port(entry: str) -> str:
    """The address of `192.0.2.1`, `192.0.2.1:80`, `[2001:db8::1]:80` or `2001:db8::1`."""
    if entry.startswith("["):
        return entry[1:].partition("]")[0]
    return entry.partition(":")[0] if entry.count(":") == 1 else entry
