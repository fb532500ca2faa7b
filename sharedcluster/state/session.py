"""One request's view of a session: loaded when it is first looked at, decoded field by field, compared at the end.

A change inside a value (``session["cart"].append(1)``) needs no `session.modified`: every mutable value that was
looked at is encoded again at the end and compared with the bytes it came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Protocol

from sharedcluster.state.codec import Codec, CodecError
from sharedcluster.state.cookie import Cookie

_IMMUTABLE = (str, int, bool, type(None), float, bytes)
_MISSING = object()


@dataclass(slots=True)
class SessionRecord:
    """What Redis holds of one session: encoded fields and what we keep about it. Shared by requests, never changed.

    Not frozen, as the others that are made with every write: that makes it five times as dear to create.
    """

    version: int
    fields: Mapping[str, bytes]
    user: str | None = None
    created_ms: int = 0
    deadline_ms: int = 0  # 0: no absolute end
    size: int = 0  # bytes in memory, roughly: never less than those of the values
    mark: bytes = b"0"  # the version as Redis writes it
    key: bytes = b""  # where it is in Redis, packed, once it was written by this worker


# What is found under an id that has just been rotated away.
ENDED = SessionRecord(-1, {})


@dataclass(slots=True)
class SessionDelta:
    """What one request changed: fields to set (encoded), fields to remove."""

    written: Mapping[str, bytes]
    removed: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Nothing was changed."""
        return not (self.written or self.removed)


class SessionSource(Protocol):
    """Where one request's session comes from."""

    @property
    def codec(self) -> Codec:
        """Decodes the stored values."""

    @property
    def idle(self) -> float:
        """Seconds the session lives without being used."""

    def fetch(self, *, fresh: bool = False) -> tuple[Cookie | None, SessionRecord | None]:
        """The cookie, if there is a valid one, and what Redis holds for it; `fresh` passes by this worker's memory."""


class Session(MutableMapping[str, Any]):
    """A dict whose content lives in Redis.

    Args:
        source: Asked once, when the session is first looked at.
    """

    accessed = False

    # Most requests never look at their session: what it needs when it is looked at is made then. Here is what few set;
    # what most do is no attribute of the class, which makes it dear to set.
    _has_ended = False
    _is_forced = False
    _was_cleared = False
    _wants_rotation = False
    _wanted_user: str | None = None
    _codec: Codec
    _stored: Mapping[str, bytes]  # what was loaded; never changed
    _values: dict[str, Any]  # what was decoded or set
    _written: set[str]
    _removed: AbstractSet[str] = frozenset()

    def __init__(self, source: SessionSource) -> None:
        self._source = source
        self._is_loaded = self._is_saved = False
        self._cookie: Cookie | None = None
        self._record: SessionRecord | None = None

    # -- what an application uses ----------------------------------------------------------------------------------

    @property
    def sid(self) -> str | None:
        """The session's id: the secret in the client's cookie. None until a new session is stored."""
        self._load()
        return self._cookie.sid if self._cookie is not None and self._record is not None else None

    @property
    def version(self) -> int:
        """The version this request saw; 0 for a new session."""
        self._load()
        return self._record.version if self._record is not None else 0

    @property
    def user(self) -> str | None:
        """The user it is bound to, see `SessionStore.bind_user`."""
        self._load()
        if self._wanted_user is not None:
            return self._wanted_user
        return self._record.user if self._record is not None and not self._was_cleared else None

    @property
    def new(self) -> bool:
        """True if there was no session before this request."""
        self._load()
        return self._record is None

    @property
    def modified(self) -> bool:
        """True if something was set or removed; changes inside values are found without it. May be set."""
        return bool(self._is_forced or self._was_cleared or (self._is_loaded and (self._written or self._removed)))

    @modified.setter
    def modified(self, value: bool) -> None:
        self._is_forced = bool(value)

    def rotate(self) -> None:
        """Give the session a new id when it is saved; the old one leads nowhere from then on. Do it at login."""
        self._load()
        self._wants_rotation = True

    def bind_user(self, user: str) -> None:
        """Note whose session it is, so that all sessions of one user can be listed and revoked."""
        self._load()
        self._wanted_user = user

    # -- mapping ---------------------------------------------------------------------------------------------------

    def __getitem__(self, key: str) -> Any:
        if not self._is_loaded:
            self._load()
        if key in self._values:
            return self._values[key]
        value = self._decode(key)
        if value is _MISSING:
            raise KeyError(key)
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default`."""
        if not self._is_loaded:
            self._load()
        if key in self._values:
            return self._values[key]
        value = self._decode(key)
        return default if value is _MISSING else value

    def _decode(self, key: str) -> Any:
        """What is stored and nobody has looked at yet."""
        raw = self._stored.get(key)
        if raw is None or key in self._removed:
            return _MISSING
        value = self._values[key] = self._codec.decode(raw)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        if type(key) is not str and not isinstance(key, str):
            raise TypeError(f"session keys are strings, not {type(key).__name__}")
        if not self._is_loaded:
            self._load()
        self._values[key] = value
        self._written.add(key)
        if key in self._removed:
            self._removed -= {key}

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._values.pop(key, None)
        self._written.discard(key)
        self._removed |= {key}

    def __contains__(self, key: object) -> bool:
        self._load()
        return key in self._values or (key in self._stored and key not in self._removed)

    def __iter__(self) -> Iterator[str]:
        self._load()
        names = [name for name in self._stored if name not in self._removed]
        names += [name for name in self._values if name not in self._stored]
        return iter(names)

    def __len__(self) -> int:
        self._load()
        return len(self._stored.keys() - self._removed | self._values.keys())

    def clear(self) -> None:
        """End this session: its id leads nowhere from then on. What is set afterwards goes into a new one."""
        self._load()
        self._was_cleared = True
        self._stored = {}
        self._values.clear()
        self._written.clear()
        self._removed = frozenset()

    def copy(self) -> dict[str, Any]:
        """A plain dict of everything in it."""
        return dict(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {dict(self)!r}>" if self._is_loaded else f"<{type(self).__name__} not loaded>"

    # -- what the store uses ---------------------------------------------------------------------------------------

    def _load(self) -> None:
        if self._is_loaded:
            return
        source = self._source
        self._cookie, record = source.fetch()
        if record is ENDED:
            self._has_ended, record = True, None
        self._record = record
        self._codec = source.codec
        self._stored = record.fields if record is not None else {}
        self._values = {}
        self._written = set()
        self._is_loaded = self.accessed = True

    @property
    def idle(self) -> float:
        """Seconds it lives without being used."""
        return self._source.idle

    def reload(self) -> None:
        """Look again at what is stored, passing by this worker's memory. Only before anything was changed."""
        if not self.modified and self._cookie is not None:
            self._cookie, self._record = self._source.fetch(fresh=True)
            if self._record is ENDED:
                self._has_ended, self._record = True, None
            self._stored = self._record.fields if self._record is not None else {}
            self._values.clear()

    def delta(self) -> SessionDelta:
        """What is different from what was loaded.

        Raises:
            CodecError: A value cannot be stored; the message names its key.
        """
        written: dict[str, bytes] = {}
        touched, stored = self._written, self._stored
        for key, value in self._values.items():
            if key in touched or type(value) not in _IMMUTABLE:
                raw = self._encode(key, value)
                if raw != stored.get(key):
                    written[key] = raw
        removed = self._removed
        return SessionDelta(written, tuple([key for key in removed if key in stored]) if removed else ())

    def _encode(self, key: str, value: Any) -> bytes:
        try:
            return self._codec.encode(value)
        except (TypeError, ValueError) as error:
            raise CodecError(f"session[{key!r}] cannot be stored: {error}") from error
