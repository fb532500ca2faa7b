"""The session cookie: an unguessable id, the version its holder has seen, and when it was issued, signed.

``v1.<id>.<version>.<issued>.<signature>``: id is 256 bits in base64url, version and issued are base 36, the signature
is HMAC-SHA256 over everything before it. The signature keeps garbage away from Redis and makes the version something
a worker may rely on: a near copy may be used only if it is at least that new.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def _base36(number: int) -> str:
    text = ""
    while number:
        number, digit = divmod(number, 36)
        text = _DIGITS[digit] + text
    return text or "0"


@dataclass(frozen=True, slots=True)
class Cookie:
    """What a client holds. `issued` is milliseconds since the epoch, by the clock of the worker that signed it."""

    sid: str
    version: int
    issued: int
    is_current: bool = True  # signed with the current key, not with a fallback

    @property
    def name(self) -> str:
        """What the session is called in Redis: who reads a dump or a slow log there cannot use it as a cookie."""
        return hashlib.sha256(self.sid.encode()).hexdigest()[:32]


def new_sid(nbytes: int = 32) -> str:
    """An unguessable session id."""
    return secrets.token_urlsafe(nbytes)


class CookieSigner:
    """Signs and verifies cookies.

    Args:
        secret_keys: The current key first, then those that are still accepted (`SECRET_KEY_FALLBACKS`).
        salt: Keeps these signatures apart from others made with the same key.
    """

    def __init__(self, secret_keys: Sequence[str | bytes], salt: str = "sharedcluster.session") -> None:
        raw = [key.encode() if isinstance(key, str) else key for key in secret_keys]
        self._keys = [hmac.digest(key, salt.encode(), "sha256") for key in raw]

    def sign(self, cookie: Cookie) -> str:
        """The cookie's text."""
        text = f"v1.{cookie.sid}.{_base36(cookie.version)}.{_base36(cookie.issued)}"
        return f"{text}.{_signature(self._keys[0], text)}"

    def verify(self, value: str) -> Cookie | None:
        """The cookie, if it was signed with one of the keys; None for anything else."""
        text, _, signature = value.rpartition(".")
        parts = text.split(".")
        if len(parts) != 4 or parts[0] != "v1" or not value.isascii():
            return None
        for index, key in enumerate(self._keys):
            if hmac.compare_digest(_signature(key, text), signature):
                return Cookie(parts[1], int(parts[2], 36), int(parts[3], 36), index == 0)
        return None


@lru_cache(maxsize=4096)
def _signature(key: bytes, text: str) -> str:
    # Cached: a client sends the same cookie with each request, and one HMAC costs as much as the rest of a warm read.
    return urlsafe_b64encode(hmac.digest(key, text.encode(), "sha256")).decode().rstrip("=")
