"""What can be wrong with a Redis at start, each in its own words."""

from __future__ import annotations

from collections.abc import Callable

import redis

from sharedcluster.errors import RedisNeededError
from sharedcluster.state.wire import Address, Argument, ReplyError, Wire, pack

OLDEST = (6, 2)

_OTHER_NAME = (
    "The certificate of Redis at {url} is for another host name.",
    "Write the name that stands in the certificate in the URL, in place of the address.",
)
# What Redis says, by its beginning or a part of it: what that means, what to do about it.
_REFUSALS: tuple[tuple[str, str, str], ...] = (
    (
        "NOAUTH",
        "Redis at {url} wants a password.",
        "Put it into the URL: redis://:PASSWORD@host:6379/0 (or redis://USER:PASSWORD@...)",
    ),
    (
        "Authentication required",
        "Redis at {url} wants a password.",
        "Put it into the URL: redis://:PASSWORD@host:6379/0 (or redis://USER:PASSWORD@...)",
    ),
    ("WRONGPASS", "Redis at {url} does not accept this user or password.", "Check the URL; ACL WHOAMI and ACL LIST."),
    (
        "invalid username-password pair",
        "Redis at {url} does not accept this user or password.",
        "Check the user and password in the URL; ACL LIST on the server shows who exists.",
    ),
    (
        "without any password configured",
        "Redis at {url} has no password set, and the URL gives one.",
        "Leave the password out of the URL, or set one on the server (requirepass or an ACL user).",
    ),
    (
        "unknown command 'HELLO'",
        "Redis at {url} does not speak RESP3, and the URL asks for it.",
        "Take protocol=3 out of the URL.",
    ),
    (
        "READONLY",
        "Redis at {url} is a replica: it can be read but not written.",
        "Name the primary, or let Sentinel find it: redis+sentinel://host:26379/SERVICE/0",
    ),
    (
        "MISCONF",
        "Redis at {url} refuses writes because it cannot save its data to disk.",
        "Free disk space or repair its folder; without persistence: CONFIG SET stop-writes-on-bgsave-error no",
    ),
    (
        "NOPERM",
        "The Redis user in {url} lacks rights.",
        "docs/state.md lists the commands, keys and channels it needs.",
    ),
    ("OOM", "Redis at {url} is full.", "Raise maxmemory, or set maxmemory-policy to volatile-ttl."),
    ("LOADING", "Redis at {url} is still reading its data from disk.", "Wait until it has finished."),
    ("MASTERDOWN", "Redis at {url} is a replica that has lost its primary.", "Name the primary, or use Sentinel."),
    ("DB index is out of range", "Redis at {url} has no database of this number.", "Use /0 at the end of the URL."),
    ("maxclients", "Redis at {url} has no connection left.", "Raise maxclients, or find who holds connections."),
    ("Hostname mismatch", *_OTHER_NAME),
    ("IP address mismatch", *_OTHER_NAME),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "The certificate of Redis at {url} is not trusted.",
        "Name its authority in the URL: ?ssl_ca_certs=/path/ca.pem",
    ),
    ("WRONG_VERSION_NUMBER", "Redis at {url} does not speak TLS.", "Use redis:// instead of rediss://."),
)


def explain(address: Address, error: BaseException) -> RedisNeededError:
    """What an error on the way to Redis means for whoever started this program."""
    text = str(error)
    if address.url.startswith("rediss://") and "imeout" in text:
        return RedisNeededError(
            f"Redis at {address.public} did not answer the TLS greeting.",
            fact=text,
            advice="If it does not speak TLS, use redis:// instead of rediss://.",
        )
    for sign, what, advice in _REFUSALS:
        if sign in text:
            return RedisNeededError(what.format(url=address.public), fact=f"It said: {text}", advice=advice)
    return RedisNeededError(
        f"Redis did not answer at {address.public}.",
        fact=text,
        advice=("Start one:  docker run -p 6379:6379 redis:8", "or name another one: REDIS_URL=redis://host:6379/0"),
    )


def check_server(address: Address, namespace: str) -> list[str]:
    """Connect once and see whether this Redis can carry shared state.

    Returns:
        Warnings: what works but will hurt.

    Raises:
        RedisNeededError: What is wrong, and what to do.
    """
    try:
        wire = Wire(address)
    except (OSError, redis.RedisError) as error:
        raise explain(address, error) from None
    try:

        def ask(*command: Argument) -> bytes:
            wire.send(pack(command))
            reply = wire.read()
            if isinstance(reply, ReplyError):
                raise reply
            return reply if isinstance(reply, bytes) else b""

        ask("SET", f"{namespace}:check", "1", "PX", 1000)
        return _read_info(address, ask)
    except (OSError, ReplyError) as error:
        raise explain(address, error) from None
    finally:
        wire.close()


def _read_info(address: Address, ask: Callable[..., bytes]) -> list[str]:
    """Version and eviction policy; a user without the right to INFO goes without these warnings."""
    try:
        lines = (ask("INFO", "server") + b"\n" + ask("INFO", "memory")).decode(errors="replace").splitlines()
    except ReplyError:
        return []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    version = facts.get("redis_version", "")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers and numbers < OLDEST:
        raise RedisNeededError(
            f"Redis at {address.public} is version {version}.", fact="6.2 or later is needed.", advice="Upgrade it."
        )
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys") and facts.get("maxmemory", "0") != "0":
        return [
            f"Redis at {address.public} may evict any key ({policy}): users would be logged out when memory is short."
            f" Set maxmemory-policy volatile-ttl, or keep sessions in a Redis of their own."
        ]
    return []
