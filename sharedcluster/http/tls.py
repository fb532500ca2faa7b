"""TLS: a connection whose bytes pass through OpenSSL in memory, and the context all workers share.

The descriptor stays non-blocking and ours; OpenSSL reads and writes memory only. So everything `connection` says about
watching, waiting and lingering holds here too, whatever was monkey patched.
"""

from __future__ import annotations

import _ssl
import contextlib
import ctypes
import logging
import os
import ssl
from typing import TYPE_CHECKING, Any

from sharedcluster.errors import ConfigError
from sharedcluster.http import policy
from sharedcluster.http.connection import IDLE, Connection
from sharedcluster.http.response import refusal
from sharedcluster.http.transport import READ, ClientGone, os_read, os_write
from sharedcluster.http.upgrade import Pump, TakenSocket

if TYPE_CHECKING:
    from sharedcluster.http.settings import Proxied

log = logging.getLogger("sharedcluster.http")

RECORD = 65536
TICKET_KEY = 80
"""Bytes of the secret that OpenSSL makes session tickets with."""
_GET_TICKET_KEYS, _SET_TICKET_KEYS = 58, 59


def make_context(certfile: str, keyfile: str | None = None, *, ticket_key: bytes | None = None) -> ssl.SSLContext:
    """The context of a listener: TLS 1.2 or later, HTTP/1.1 by ALPN.

    Args:
        certfile: The certificate chain, PEM.
        keyfile: The private key, PEM; in `certfile` if not given.
        ticket_key: TICKET_KEY random bytes that all workers share, so that a session begun with one resumes with
            any other. Workers that were forked after the context was made share it without.

    Raises:
        ConfigError: The files cannot be read, are no PEM, or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    for path in filter(None, (certfile, keyfile)):
        if not os.access(path, os.R_OK):
            raise ConfigError(f"The TLS file {path} cannot be read.", advice="Check --certfile and --keyfile.")
    try:
        context.load_cert_chain(certfile, keyfile)
    except (ssl.SSLError, OSError) as error:
        fact = f"OpenSSL says: {getattr(error, 'reason', None) or error}."
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            fact = f"The key in {keyfile or certfile} does not belong to the certificate in {certfile}."
        advice = "Give a PEM chain with --certfile and its unencrypted PEM key with --keyfile."
        raise ConfigError("The certificate or its key cannot be used.", fact=fact, advice=advice) from None
    if ticket_key is not None and not share_tickets(context, ticket_key):
        log.warning(
            "this Python's OpenSSL takes no ticket key; TLS sessions resume on the worker they began with only"
        )
    return context


def share_tickets(context: ssl.SSLContext, key: bytes) -> bool:
    """Make `context` issue and open tickets with `key`; False where this Python hides its OpenSSL.

    The ssl module has no call for it. The context object begins with its SSL_CTX pointer (CPython's _ssl.c, unchanged
    since 2.7.9), and what was set is read back before anybody relies on it.
    """
    if len(key) != TICKET_KEY:
        raise ValueError(f"a ticket key has {TICKET_KEY} bytes")
    try:
        control: Any = ctypes.CDLL(_ssl.__file__).SSL_CTX_ctrl
    except (AttributeError, OSError):
        return False
    control.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_void_p]
    control.restype = ctypes.c_long
    pointer = ctypes.c_void_p.from_address(id(context) + object.__basicsize__).value
    control(pointer, _SET_TICKET_KEYS, TICKET_KEY, key)
    back = ctypes.create_string_buffer(TICKET_KEY)
    return bool(control(pointer, _GET_TICKET_KEYS, TICKET_KEY, back)) and back.raw == key


class TlsConnection(Connection):
    """A connection whose transport encrypts."""

    has_sendfile = False
    sends_now = False  # it cannot take back what it has encrypted
    is_movable = False  # the keys live in this process
    __slots__ = ("_has_shaken", "_incoming", "_outgoing", "_pump", "_tls", "_unsent")

    def __init__(
        self,
        server: Any,
        index: int,
        fd: int,
        peer: tuple[str, int] | None,
        proxied: Proxied | None,
        client: tuple[str, int] | None,
        reader: Any,
    ) -> None:
        super().__init__(server, index, fd, peer, proxied, client, reader)
        context: ssl.SSLContext = server.tls_of(index)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._pump: Pump | None = None
        self._unsent = b""
        self._has_shaken = False

    def open(self, data: bytes = b"") -> None:
        """Begin. The handshake has head_timeout; only after it may the connection be idle for long."""
        self._incoming.write(data)
        super().open()
        if self.phase == IDLE and not self._has_shaken:
            self.expire_in(self.server.settings.head_timeout)

    def receive(self) -> bytes:
        """All that what is there decrypts to: one callback of the loop must leave nothing behind in OpenSSL."""
        if not self._incoming.pending:
            data = os_read(self.fd, READ)
            if not data:
                return b""
            self._incoming.write(data)
        pieces = []
        try:
            if not self._has_shaken:
                self._tls.do_handshake()
                self._has_shaken = True
                if self.phase == IDLE:
                    self.expiry = self.server.idle_until
            while piece := self._tls.read(READ):
                pieces.append(piece)
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            self._explain(error)
            raise
        else:
            return b"".join(pieces)  # close_notify: the peer's end
        if not pieces:
            raise BlockingIOError
        return b"".join(pieces)

    def _explain(self, error: ssl.SSLError) -> None:
        """Tell the peer by an alert, or in its own words if it speaks plain HTTP."""
        log.debug("TLS with %s: %s", self.peer, error)
        if error.reason == "HTTP_REQUEST":
            self._unsent = b""
            answer = refusal(policy.SYNTAX, self.server.standing)
            try:
                os_write(self.fd, answer)
            except OSError:
                return
        else:
            try:
                self._flush()
            except OSError:
                return

    def _flush(self) -> None:
        """Write what OpenSSL has to say, as far as the socket takes it now."""
        data = self._unsent + self._outgoing.read()
        if data:
            try:
                self._unsent = data[os_write(self.fd, data) :]
            except BlockingIOError:
                self._unsent = data

    def send(self, data: bytes | memoryview) -> None:
        """As the plain one: all of `data`, waiting if need be."""
        for start in range(0, len(data), RECORD):
            try:
                self._tls.write(data[start : start + RECORD])
            except ssl.SSLError as error:
                raise ClientGone(str(error)) from None
            wire, self._unsent = self._unsent + self._outgoing.read(), b""
            super().send(wire)

    def send_last(self, data: bytes) -> None:
        """As `send`; the end of what is encrypted has to be said before that of the connection."""
        self.send(data)

    def answer(self, data: bytes) -> None:
        """As the plain one."""
        try:
            self._tls.write(data)
            self._flush()
        except OSError as error:
            raise ClientGone(str(error)) from None

    def part(self) -> bool:
        """As the plain one; only reading tells whether what has come is more than the peer's close_notify."""
        try:
            if self.receive() != b"":
                return False
        except OSError:
            pass
        self.say_end()
        return True

    def say_end(self) -> None:
        """close_notify: without it a client cannot tell the end from a cut (RFC 8446 6.1)."""
        with contextlib.suppress(OSError):  # it would like to wait for the peer's own, which nobody needs
            self._tls.unwrap()
        with contextlib.suppress(OSError):
            self._flush()

    def make_socket(self, prefix: bytes) -> TakenSocket:
        """One end of a pair; the other is joined to this connection, which the loop goes on reading."""
        self._is_held = False
        self._pump = Pump(self, prefix)
        return self._pump.outer

    def on_taken_data(self, data: bytes) -> None:
        """For the library."""
        if self._pump is not None:
            self._pump.feed(data)

    def end_taken(self) -> None:
        """The library is done: the pump sends what is left, then closes."""
        if self._taken is not None:
            self._taken.close()

    def close(self) -> None:
        """As the plain one."""
        pump, self._pump = self._pump, None
        super().close()
        if pump is not None:
            pump.close()
