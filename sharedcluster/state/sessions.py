"""Sessions that mean the same in every worker, for no round trip when read and one when written.

Laws
----
1. A write sends the changed fields only, so two requests that change different keys both survive.
2. A session that is gone is never brought back: the save script refuses, and an id that Redis does not know is not
   adopted. A late write of a request that raced with logout is dropped and counted, and sets no cookie.
3. The cookie carries the version its holder has seen. Near copies that are older are not used, so a client reads its
   own writes on any worker even if an invalidation was lost. A response that served something newer than the cookie's
   version hands out a new cookie: reads are monotonic.
4. After an own write the near copy is base + own fields only if nobody wrote in between (the script returns the
   previous version); otherwise the script returns everything, and that is kept. Labelling a partly old view with the
   new version would pass the check of law 3.
5. A request that was on its way with an id that has just been rotated away starts no session of its own: its cookie
   would replace that of the login it raced with.
6. In Redis a session is called by the hash of its id.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sharedcluster.errors import Bug
from sharedcluster.state.codec import Codec
from sharedcluster.state.connection import GroupCommit
from sharedcluster.state.cookie import Cookie, CookieSigner, new_sid
from sharedcluster.state.merge import merge
from sharedcluster.state.near import Near
from sharedcluster.state.save_parts import SaveParts
from sharedcluster.state.scripting import Part, script_command
from sharedcluster.state.session import ENDED, Session, SessionDelta, SessionRecord
from sharedcluster.state.settings import StateSettings
from sharedcluster.state.tickets import Submitted
from sharedcluster.state.wire import Argument, Command

# A session is touched, and its cookie issued again, when this part of its idle time has passed.
TOUCH_FRACTION = 0.1
# How long a session that was replaced by another one is known to have ended.
TOMBSTONE_MS = 10_000
# How often a merge is tried again under contention before the last writer wins.
MERGE_ATTEMPTS = 20


class CookieAction(Enum):
    """What the response does about the cookie."""

    KEEP = "keep"
    SET = "set"
    DELETE = "delete"


@dataclass(slots=True)
class SaveOutcome:
    """What `SessionStore.save` did: what the response does about the cookie, and its value if it is to be set."""

    action: CookieAction
    value: str = ""


@dataclass(slots=True)
class Saving:
    """A save of which Redis has its part, or is about to get it, and what is needed when it has answered."""

    session: Session
    signer: CookieSigner
    delta: SessionDelta
    cookie: Cookie | None  # None: there was no session
    base: SessionRecord
    target: Cookie
    begun: int
    part: Part
    is_idempotent: bool = True
    submitted: Submitted | None = None


_SET = CookieAction.SET  # an enum is asked for its members by name each time
_KEEP = SaveOutcome(CookieAction.KEEP)
_DELETE = SaveOutcome(CookieAction.DELETE)


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One session in a user's list. `id` may be given to `revoke`; it is not the secret in the cookie."""

    id: str
    user: str
    created_at: float
    version: int


class SessionStore:
    """Loads and saves sessions; knows no Flask.

    Args:
        commit: The way to Redis.
        near: This worker's copies.
        namespace: Prefix of all keys.
        channel: Where invalidations are published.
        codec: For the values.
        settings: Limits and timeouts.
        counts: Counters by name, shared with the whole state.
    """

    def __init__(
        self,
        commit: GroupCommit,
        near: Near[SessionRecord],
        namespace: str,
        channel: str,
        codec: Codec,
        settings: StateSettings,
        counts: dict[str, int],
    ) -> None:
        self.codec = codec
        self._commit = commit
        self._near = near
        self._prefix = f"{namespace}:s:"
        self._user_prefix = f"{namespace}:u:"
        self._channel = channel
        self._settings = settings
        self._counts = counts
        self._parts = SaveParts(self._prefix, self._user_prefix, channel, settings)

    def open(self, signer: CookieSigner, read_cookies: Callable[[], Iterable[str]], idle: float) -> Session:
        """The session of a request; nothing is read or verified until somebody looks at it."""
        return Session(_Source(self, signer, read_cookies, idle))

    # -- loading ---------------------------------------------------------------------------------------------------

    def load(self, cookie: Cookie, idle: float, *, fresh: bool = False) -> SessionRecord | None:
        """What there is for a cookie: from memory if that is at least as new as the cookie, else from Redis."""
        name = cookie.name
        entry = self._near.get(name)
        # A cookie as old as the idle time may belong to a session that has ended by itself, which sends no message.
        is_live = time.time() - idle < cookie.issued / 1000
        if entry is not None and is_live and not fresh and entry.value.version >= cookie.version:
            self._counts["session_near_hits"] += 1
            self._near.note_use(name)
            return entry.value
        begun = self._near.begin()
        record = self._parse(self._commit.call("HGETALL", self._prefix + name, idempotent=True))
        self._counts["session_loads"] += 1
        if record is None or record is ENDED:
            self._counts["session_unknown"] += 1
            self._near.drop(name)
            return record
        if record.version < cookie.version:
            self._counts["session_regressed"] += 1
        self._near.fill(name, record, begun, mark=record.mark, size=record.size)
        return record

    @staticmethod
    def _parse(reply: list[bytes]) -> SessionRecord | None:
        """HGETALL's flat list to a record; names that start with @ are ours, a user's own is stored with two."""
        if not reply:
            return None
        fields: dict[str, bytes] = {}
        meta: dict[str, bytes] = {}
        pairs = iter(reply)
        for raw, value in zip(pairs, pairs, strict=True):
            name = raw.decode()
            if name[:1] != "@":
                fields[name] = value
            elif name[:2] == "@@":
                fields[name[1:]] = value
            else:
                meta[name] = value
        if "@v" not in meta:
            return ENDED
        return SessionRecord(
            int(meta["@v"]),
            fields,
            meta["@u"].decode() if "@u" in meta else None,
            int(meta.get("@c", 0)),
            int(meta.get("@x", 0)),
            _size_of(fields),
            meta["@v"],
        )

    # -- saving ----------------------------------------------------------------------------------------------------

    def save(self, session: Session, signer: CookieSigner, *, refresh: bool = True) -> SaveOutcome:
        """Store what a request changed.

        Args:
            session: From `open`. Saving it twice does nothing the second time.
            signer: Signs the new cookie.
            refresh: Whether reading it, too, starts a new idle period (throttled).

        Raises:
            StateUnavailableError: It is not known whether Redis has it.
            CodecError, SessionTooLargeError: It cannot be stored.
        """
        if not session._is_loaded or session._is_saved:
            return _KEEP
        saving = self._begin(session, signer, refresh)
        if isinstance(saving, SaveOutcome):
            return saving
        return self._end(saving, self._commit.part(saving.part, idempotent=saving.is_idempotent))

    def submit(self, session: Session, signer: CookieSigner, *, refresh: bool = True) -> SaveOutcome | Saving:
        """As `save`, but waits for nothing where one trip to Redis is all there is to it: `settle` does that then."""
        if not session._is_loaded or session._is_saved:
            return _KEEP
        saving = self._begin(session, signer, refresh)
        if isinstance(saving, Saving):
            saving.submitted = self._commit.submit(saving.part)
        return saving

    def settle(self, saving: Saving) -> SaveOutcome:
        """What came of a save that was submitted, as `save` returns or raises it; waits if it is not done yet."""
        assert saving.submitted is not None
        return self._end(saving, self._commit.settle(saving.submitted, idempotent=saving.is_idempotent))

    def _begin(self, session: Session, signer: CookieSigner, refresh: bool) -> SaveOutcome | Saving:
        """All of a save that comes before Redis has its part, or all of one that is not a single part's."""
        session._is_saved = True
        delta = session.delta()
        if session._was_cleared or session._record is None:
            return self._replace(session, delta, signer)
        if delta.written or delta.removed or session._wants_rotation or session._wanted_user is not None:
            return self._update(session, delta, signer)
        return self._refresh(session, signer, refresh)

    def _replace(self, session: Session, delta: SessionDelta, signer: CookieSigner) -> SaveOutcome | Saving:
        """End the old session if there was one, create a new one if there is something to keep."""
        means_a_new_one = session._was_cleared or session._wants_rotation or session._wanted_user is not None
        if session._has_ended and not means_a_new_one:
            # It raced with a login that rotated the id: a session of its own would push the new cookie out.
            self._counts["session_late_writes"] += not delta.is_empty
            return _KEEP
        ending: list[Command | Part] = []
        if session._was_cleared and session._cookie is not None:
            tombstone_ms = TOMBSTONE_MS if delta.written else 0
            ending.append(self._destroy_command([session._cookie.name], tombstone_ms))
            self._near.invalidate(session._cookie.name)
        if not delta.written and session._wanted_user is None:
            if not ending:
                return _KEEP
            self._commit.many(ending, idempotent=True)
            self._counts["session_destroyed"] += 1
            return _DELETE
        fresh = Cookie(new_sid(), 0, _now_ms())
        begun = self._near.begin()
        part = self._parts.save(fresh.name, fresh.name, session, delta, creates=True)
        saving = Saving(session, signer, delta, None, SessionRecord(0, {}), fresh, begun, part)
        return self._end(saving, self._commit.many([*ending, part], idempotent=True)[-1]) if ending else saving

    def _update(self, session: Session, delta: SessionDelta, signer: CookieSigner) -> SaveOutcome | Saving:
        cookie, base = session._cookie, session._record
        assert cookie is not None
        assert base is not None
        name = cookie.name
        target = Cookie(new_sid(), 0, 0) if session._wants_rotation else cookie
        begun = self._near.begin()
        if self._settings.session_merge:
            reply, delta, part = self._merge_in(session, delta, name, target.name)
            return self._end(Saving(session, signer, delta, cookie, base, target, begun, part), reply)
        if target is cookie and session._wanted_user is None and not delta.removed:
            part = self._parts.write(name, session, base, delta.written)
            return Saving(session, signer, delta, cookie, base, cookie, begun, part)
        part = self._parts.save(name, target.name, session, delta)
        # Sent twice, a rotation would find its session renamed.
        return Saving(session, signer, delta, cookie, base, target, begun, part, target is cookie)

    def _end(self, saving: Saving, reply: bytes | list[Any]) -> SaveOutcome:
        """All of a save that comes after Redis has answered."""
        cookie, target = saving.cookie, saving.target
        if cookie is None:
            self._counts["session_created"] += 1
        elif reply[0] == 0:
            # Destroyed or expired between our look and our write: nothing is brought back, and no cookie is set,
            # because the browser may hold a newer session's by now.
            self._counts["session_late_writes"] += 1
            self._near.invalidate(cookie.name)
            return _KEEP
        else:
            self._counts["session_saves"] += 1
            if target is not cookie:
                self._near.invalidate(cookie.name)
        # Keep what is known for certain (law 4), and sign the new version.
        session = saving.session
        record: SessionRecord | None
        if isinstance(reply, list):
            record = self._parse(reply[2])
            assert record is not None
            version = record.version
        else:
            version = int(reply)
            base, delta = saving.base, saving.delta
            fields = {**base.fields, **delta.written}
            for name in delta.removed:
                fields.pop(name, None)
            user = base.user if session._wanted_user is None else session._wanted_user
            size = _size_of(fields)
            key = base.key if cookie is target and base.key else self._parts.pack_key(target.name)
            record = SessionRecord(version, fields, user, base.created_ms, base.deadline_ms, size, reply, key)
        self._near.fill(target.name, record, saving.begun, mark=record.mark, size=record.size)
        return SaveOutcome(_SET, saving.signer.renew(target, version, _now_ms()))

    def _merge_in(
        self, session: Session, delta: SessionDelta, name: str, target: str
    ) -> tuple[bytes | list[Any], SessionDelta, Part]:
        """Run the save script until nobody has written our keys since we looked."""
        for attempt in range(MERGE_ATTEMPTS + 1):
            is_merging = attempt < MERGE_ATTEMPTS
            part = self._parts.save(name, target, session, delta, merges=is_merging)
            # Sent twice, a rotation would find its session renamed, and a merge its own effect: those are sent once.
            reply = self._commit.part(part, idempotent=target == name and not is_merging)
            if reply[0] != 2:
                return reply, delta, part
            self._counts["session_merges"] += 1
            delta = self._merge(session, delta, reply[1:])
        raise Bug("a save that compares nothing cannot conflict")

    def _merge(self, session: Session, delta: SessionDelta, conflicts: list[bytes]) -> SessionDelta:
        """Bring together what others wrote into our keys and what we did."""
        written, stored = dict(delta.written), dict(session._stored)
        for raw_name, theirs in zip(conflicts[::2], conflicts[1::2], strict=True):
            name = raw_name.decode()
            key = name[1:] if name.startswith("@@") else name
            base = stored.get(key)
            if theirs:
                mine = self.codec.decode(written[key])
                merged = merge(self.codec.decode(base) if base else None, self.codec.decode(theirs), mine)
                written[key] = self.codec.encode(merged)
            stored[key] = theirs
        session._stored = stored
        return SessionDelta(written, delta.removed)

    def _refresh(self, session: Session, signer: CookieSigner, refresh: bool) -> SaveOutcome:
        """Nothing changed: touch it if that is due, and hand out a cookie if this one says too little."""
        cookie, record = session._cookie, session._record
        assert cookie is not None
        assert record is not None
        is_due = refresh and _now_ms() - cookie.issued >= session.idle * 1000 * TOUCH_FRACTION
        if is_due or session._is_forced:
            args: list[Argument] = [int(session.idle * 1000), self._user_prefix, cookie.name]
            if not self._commit.script("session_touch", [self._prefix + cookie.name], args, idempotent=True):
                self._near.invalidate(cookie.name)
                return _KEEP
            self._counts["session_touches"] += 1
        elif record.version == cookie.version and cookie.is_current:
            return _KEEP
        return SaveOutcome(_SET, signer.renew(cookie, record.version, _now_ms()))

    # -- ending ----------------------------------------------------------------------------------------------------

    def _destroy_command(self, names: list[str], tombstone_ms: int = 0) -> Command:
        args: list[Argument] = [self._channel, self._user_prefix, tombstone_ms, *names]
        return script_command("session_destroy", [self._prefix + name for name in names], args)

    def revoke(self, session_id: str) -> bool:
        """End a session, given its `sid` or the `id` that `list_user` tells. True if there was one."""
        name = session_id if len(session_id) == 32 else Cookie(session_id, 0, 0).name
        self._near.invalidate(name)
        return bool(self._commit.many([self._destroy_command([name])], idempotent=True)[0])

    def revoke_user(self, user: str, *, keep: str = "") -> int:
        """End all sessions of a user but the one whose `sid` is `keep`; returns how many there were."""
        kept = Cookie(keep, 0, 0).name if keep else ""
        names = [info.id for info in self.list_user(user) if info.id != kept]
        if not names:
            return 0
        for name in names:
            self._near.invalidate(name)
        return int(self._commit.many([self._destroy_command(names)], idempotent=True)[0])

    def list_user(self, user: str) -> list[SessionInfo]:
        """The live sessions bound to a user, oldest first. The index is a hint: each one is looked at."""
        index = self._user_prefix + user
        names = [raw.decode() for raw in self._commit.call("ZRANGE", index, 0, -1, idempotent=True)]
        if not names:
            return []
        commands: list[Command] = [("HGETALL", self._prefix + name) for name in names]
        records = [self._parse(reply) for reply in self._commit.many(commands, idempotent=True)]
        found = [
            SessionInfo(name, user, record.created_ms / 1000, record.version)
            for name, record in zip(names, records, strict=True)
            if record is not None and record.user == user
        ]
        if stale := set(names) - {info.id for info in found}:
            self._commit.call("ZREM", index, *stale, idempotent=True)
        return sorted(found, key=lambda info: info.created_at)


@dataclass(frozen=True, slots=True)
class _Source:
    """A session's source outside Flask; see `session.SessionSource`."""

    store: SessionStore
    signer: CookieSigner
    read_cookies: Callable[[], Iterable[str]]
    idle: float

    @property
    def codec(self) -> Codec:
        return self.store.codec

    def fetch(self, *, fresh: bool = False) -> tuple[Cookie | None, SessionRecord | None]:
        cookie = verify_first(self.signer, self.read_cookies())
        return cookie, self.store.load(cookie, self.idle, fresh=fresh) if cookie is not None else None


def verify_first(signer: CookieSigner, values: Iterable[str]) -> Cookie | None:
    """The first value that is ours: a browser may send several cookies of one name, for several paths."""
    for value in values:
        if (cookie := signer.verify(value)) is not None:
            return cookie
    return None


def _now_ms() -> int:
    return int(time.time() * 1000)


def _size_of(fields: Mapping[str, bytes]) -> int:
    return 200 + 100 * len(fields) + sum(map(len, fields.values()))
