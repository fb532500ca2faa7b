"""The session cookie: an unguessable id, the version its holder has seen, and when it was issued, signed.

``v1.<id>.<version>.<issued>.<signature>``: id is 256 bits in base64url, version and issued are hexadecimal, the
signature is keyed BLAKE2b (its own MAC, RFC 7693) of 160 bits over everything before it. HMAC-SHA256 through OpenSSL
takes four times as long for so short a text, and every write signs one. It keeps garbage away from Redis and makes the
version something a worker may rely on: a near copy may be used only if it is at least that new.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

KNOWN_LIMIT = 10_000
SIGNATURE_BYTES = 20  # 160 bits: nobody can try that often


@dataclass(slots=True, init=False)
class Cookie:
    """What a client holds. Shared by requests, so nobody changes it.

    Args:
        sid: The session's id.
        version: The one its holder has seen.
        issued: Milliseconds since the epoch, by the clock of the worker that signed it.
        is_current: Signed with the current key, not with a fallback.
        name: What the session is called in Redis, if that is known: who reads a dump or a slow log there cannot use it
            as a cookie.
        text: As the client has it, once it was signed or verified.
    """

    sid: str = field(repr=False)
    version: int
    issued: int
    is_current: bool
    name: str = field(compare=False)
    text: str = field(compare=False, repr=False)

    def __init__(
        self, sid: str, version: int, issued: int, is_current: bool = True, name: str = "", text: str = ""
    ) -> None:
        self.sid = sid
        self.version = version
        self.issued = issued
        self.is_current = is_current
        self.name = name or hashlib.sha256(sid.encode()).hexdigest()[:32]
        self.text = text


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
        keys = [hmac.digest(key, salt.encode(), "sha256") for key in raw]
        # Copied for each signature: setting one up anew takes longer than the hashing.
        self._hashes = [hashlib.blake2b(key=key, digest_size=SIGNATURE_BYTES) for key in keys]
        # A client sends one cookie with each request until it gets another, and most come from this worker: knowing
        # them saves the parsing, the signature and the hash, which together cost as much as the rest of a warm read.
        self._known: dict[str, Cookie] = {}

    def sign(self, cookie: Cookie) -> str:
        """The cookie's text."""
        text = f"v1.{cookie.sid}.{cookie.version:x}.{cookie.issued:x}"
        copy = self._hashes[0].copy()
        copy.update(text.encode())
        cookie.text = value = f"{text}.{copy.hexdigest()}"
        if len(self._known) >= KNOWN_LIMIT:
            self._known.clear()
        self._known[value] = cookie
        return value

    def renew(self, cookie: Cookie, version: int, issued: int) -> str:
        """The text of the same session's next cookie.

        The one that it replaces in its client's hands need not be known any longer: else a hundred clients that write
        would fill the memory here, and the CPU's caches, with ten thousand cookies.
        """
        self._known.pop(cookie.text, None)
        return self.sign(Cookie(cookie.sid, version, issued, True, cookie.name))

    def verify(self, value: str) -> Cookie | None:
        """The cookie, if it was signed with one of the keys; None for anything else."""
        if (known := self._known.get(value)) is not None:
            return known
        text, _, signature = value.rpartition(".")
        parts = text.split(".")
        if len(parts) != 4 or parts[0] != "v1" or not value.isascii():
            return None
        for index, keyed in enumerate(self._hashes):
            if hmac.compare_digest(_signature(keyed, text), signature):
                cookie = Cookie(parts[1], int(parts[2], 16), int(parts[3], 16), index == 0, text=value)
                if len(self._known) >= KNOWN_LIMIT:
                    self._known.clear()
                self._known[value] = cookie
                return cookie
        return None


def _signature(keyed: hashlib.blake2b, text: str) -> str:
    copy = keyed.copy()
    copy.update(text.encode())
    return copy.hexdigest()
