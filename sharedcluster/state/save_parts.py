"""What a save sends: one part of scripts/session_save.lua, whose arguments are explained there. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sharedcluster.errors import SharedClusterError
from sharedcluster.state.scripting import JointScript, Part
from sharedcluster.state.session import Session, SessionDelta, SessionRecord
from sharedcluster.state.settings import StateSettings
from sharedcluster.state.wire import Form, pack_argument

FORMS_LIMIT = 200
NAMES_LIMIT = 1000  # bytes of the names in one that is remembered


class SessionTooLargeError(SharedClusterError):
    """A session or one of its values is larger than allowed; the message names the key and the setting."""


class SaveParts:
    """Packs the saves of one application.

    Args:
        prefix: Stands before the names of sessions.
        user_prefix: Stands before the names of users' indexes.
        channel: Where invalidations are published.
        settings: Limits and the absolute timeout.
    """

    def __init__(self, prefix: str, user_prefix: str, channel: str, settings: StateSettings) -> None:
        self._settings = settings
        self._raw_prefix = prefix.encode()
        absolute_ms = int(settings.session_absolute_timeout * 1000)
        common = (b"%d" % absolute_ms, channel.encode(), user_prefix.encode(), b"%d" % len(self._raw_prefix))
        self._script = JointScript("session_save", common)
        self._forms: dict[tuple[Any, ...], Form] = {}

    def write(self, name: str, session: Session, record: SessionRecord, written: Mapping[str, bytes]) -> Part:
        """What most saves send: fields that are written, and nothing else."""
        raws = written.values()
        added = sum(map(len, raws))
        # The size is known of what was loaded, and is never less than that of its values.
        if (
            added > self._settings.session_field_limit
            or added + record.size > self._settings.session_limit
            or record.fields is not session._stored
        ):
            self._check_size(session, written)
        kind = (session._source.idle, *written)
        form = self._forms.get(kind)
        if form is None:
            form = self._learn_form(kind, session._source.idle, written)
        key = record.key or self.pack_key(name)
        return Part(self._script, key, 1, form.fill([record.mark, *raws]), form.count)

    def save(
        self,
        name: str,
        target: str,
        session: Session,
        delta: SessionDelta,
        *,
        creates: bool = False,
        merges: bool = False,
    ) -> Part:
        """Any save: `creates` where there is no session, `merges` to hear of conflicts; another `target` rotates."""
        written, removed, record = delta.written, delta.removed, session._record
        self._check_size(session, written)
        keys = [name] if target == name else [name, target]
        how = b"c" * creates + b"m" * merges + b"r" * (len(keys) > 1)
        mark = b"0" if creates or record is None else record.mark
        idle = b"%d" % (session._source.idle * 1000)
        arguments = [
            how,
            idle,
            (session._wanted_user or "").encode(),
            mark,
            b"%d" % len(written),
            b"%d" % len(removed),
        ]
        for key, raw in written.items():
            arguments += (_stored_name(key), raw)
        if merges:
            arguments += [session._stored.get(key, b"") for key in written]
        arguments += map(_stored_name, removed)
        packed = b"".join(map(pack_argument, arguments))
        return Part(self._script, b"".join(map(self.pack_key, keys)), len(keys), packed, len(arguments))

    def _learn_form(self, kind: tuple[Any, ...], idle: float, names: Iterable[str]) -> Form:
        """What writes of the same fields have in common; see scripts/session_save.lua."""
        stored = [_stored_name(name) for name in names]
        arguments: list[bytes | None] = [b"", b"%d" % (idle * 1000), b"", None, b"%d" % len(stored), b"0"]
        for name in stored:
            arguments += (name, None)
        form = Form(arguments)
        if sum(map(len, stored)) <= NAMES_LIMIT:
            if len(self._forms) >= FORMS_LIMIT:  # an application that has ever other names, or idle times
                self._forms.clear()
            self._forms[kind] = form
        return form

    def pack_key(self, name: str) -> bytes:
        """Where a session is in Redis, packed."""
        return pack_argument(self._raw_prefix + name.encode())

    def _check_size(self, session: Session, written: Mapping[str, bytes]) -> None:
        """Raises SessionTooLargeError; for whom a quick look was not enough."""
        field_limit, limit = self._settings.session_field_limit, self._settings.session_limit
        total = sum(map(len, session._stored.values())) + sum(map(len, written.values()))
        for key, raw in written.items():
            if len(raw) > field_limit:
                raise SessionTooLargeError(
                    f"session[{key!r}] is {len(raw)} bytes, more than SHAREDCLUSTER_SESSION_FIELD_LIMIT"
                    f" ({field_limit}). Keep large values in the cache or a database."
                )
        if total > limit:
            raise SessionTooLargeError(
                f"the session is {total} bytes, more than SHAREDCLUSTER_SESSION_LIMIT"
                f" ({limit}). Keep large values in the cache or a database."
            )


def _stored_name(key: str) -> bytes:
    """A user's name that looks like one of ours is stored with another @ before it; see `_parse`."""
    return (f"@{key}" if key[:1] == "@" else key).encode()
