"""What can be set about the shared state: one frozen record, filled by whoever embeds it (`sharedcluster.flask`)."""

from __future__ import annotations

from dataclasses import dataclass, fields

from sharedcluster.errors import ConfigError

MAY_BE_ZERO = ("queue_limit", "cache_early", "cache_timeout")


@dataclass(frozen=True, slots=True)
class StateSettings:
    """Timeouts in seconds, sizes in bytes. The defaults keep a request short when Redis is in trouble."""

    # The link to Redis.
    connect_timeout: float = 0.3
    socket_timeout: float = 0.5
    queue_limit: int = 10_000  # commands waiting for their turn in one worker; more are refused at once
    batch_limit: int = 256  # commands of one pipeline
    breaker_limit: int = 3  # failed exchanges in a row after which Redis counts as down
    probe_interval: float = 1.0  # while it is down, one command per interval is let through

    # The subscriber.
    heartbeat_interval: float = 1.0
    trust_timeout: float = 2.5  # near caches are bypassed when the last proof of delivery is older

    # Near caches, one per kind of state and worker.
    near_entries: int = 10_000
    near_bytes: int = 32 * 1024 * 1024
    near_max_age: float = 60.0

    # Sessions.
    session_absolute_timeout: float = 0.0  # 0: none
    session_near_max_age: float = 30.0
    session_limit: int = 64 * 1024
    session_field_limit: int = 16 * 1024
    session_merge: bool = False  # three-way merge when two requests write the same key
    codec: str = "json"  # or "msgpack"

    # Cache.
    cache_timeout: float = 300.0
    cache_lease_timeout: float = 10.0  # renewed while the computation runs; this is what a dead computer costs
    cache_wait_timeout: float = 30.0  # how long a caller waits for another one's computation before computing itself
    cache_early: float = 1.0  # XFetch's beta: how eagerly an entry is refreshed before it expires; 0: never

    # Broadcast.
    stream_queue_limit: int = 256  # messages waiting for one client; more are fetched from history when it reads on
    stream_ping_interval: float = 15.0
    stream_retry: float = 2.0  # what SSE clients wait before they come back, plus or minus half of it
    history_timeout: float = 3600.0  # how long a channel's history is kept after its last message

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ConfigError: With the name of the setting, what it is, and what it has to be.
        """
        for item in fields(self):
            value, default = getattr(self, item.name), item.default
            if isinstance(default, bool):
                is_fine, wanted = isinstance(value, bool), "True or False"
            elif isinstance(default, int | float):
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                lowest = 0 if default == 0 or item.name in MAY_BE_ZERO else 1e-6
                is_fine, wanted = (
                    is_number and value >= lowest,
                    "a number above 0" if lowest else "a number, 0 or more",
                )
            else:
                is_fine, wanted = isinstance(value, type(default)), "a text"
            if not is_fine:
                raise ConfigError(f"SHAREDCLUSTER_{item.name.upper()} is {value!r}.", advice=f"It has to be {wanted}.")
