"""Who is there: members of a channel, each kept present by the worker that vouches for it.

A worker refreshes its members well within `TIMEOUT`; those of a worker that died are gone after it, by Redis's clock.
A member that several connections vouch for (two tabs) leaves with the last one of this worker.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import suppress
from typing import Any

from sharedcluster.errors import StateUnavailableError
from sharedcluster.state.codec import Codec
from sharedcluster.state.connection import GroupCommit
from sharedcluster.state.wire import Argument, ReplyError

TIMEOUT = 60.0
REFRESH_INTERVAL = 20.0


class PresenceRoom:
    """All members this worker vouches for."""

    def __init__(self, commit: GroupCommit, namespace: str, codec: Codec) -> None:
        self._commit = commit
        self._prefix = f"{namespace}:p:"
        self._codec = codec
        self._present: dict[str, dict[str, bytes]] = {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._is_running = False

    def join(self, channel: str, member: str, info: Any = None) -> None:
        """A member is there, until `leave` or until this worker dies."""
        raw = self._codec.encode(info)
        with self._lock:
            self._present.setdefault(channel, {})[member] = raw
            self._counts[channel, member] += 1
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._refresh, name="sharedcluster-presence", daemon=True).start()
        self._tell(channel, "join", member, raw)

    def leave(self, channel: str, member: str) -> None:
        """It is there once less."""
        with self._lock:
            self._counts[channel, member] -= 1
            if self._counts[channel, member] > 0:
                return
            del self._counts[channel, member]
            self._present.get(channel, {}).pop(member, None)
        with suppress(StateUnavailableError):  # it is then gone after TIMEOUT
            self._tell(channel, "leave", member)

    def members(self, channel: str) -> dict[str, Any]:
        """Everybody who is there now, on any worker, with what was told of them."""
        pairs = iter(self._tell(channel, "list"))
        return {member.decode(): self._codec.decode(raw) for member, raw in zip(pairs, pairs, strict=True)}

    def _tell(self, channel: str, what: str, *rest: Argument) -> list[bytes]:
        keys = [self._prefix + channel, f"{self._prefix}{channel}:info"]
        args: list[Argument] = [what, int(TIMEOUT * 1000), *rest]
        reply: list[bytes] = self._commit.script("presence", keys, args, idempotent=True)
        return reply

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH_INTERVAL):
            for channel, members in list(self._present.items()):
                pairs: list[Argument] = [part for pair in list(members.items()) for part in pair]
                with suppress(StateUnavailableError, ReplyError):
                    if pairs:
                        self._tell(channel, "join", *pairs)

    def stop(self) -> None:
        """Vouch for nobody any more."""
        self._stop.set()
