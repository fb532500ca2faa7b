"""Every exception of the package, named by who is at fault.

A user's mistake (`UserError`) carries what happened, the fact behind it and what to type, and the exit code of the
command. A peer's mistake (`PeerError`) is a client or a server that did not do its part; it is answered or retried,
never shown as a traceback. A bug of ours is a `Bug`: an `AssertionError` whose text starts with "[BUG]".
"""

from __future__ import annotations


class SharedClusterError(Exception):
    """The root: catch this to catch everything the package raises on purpose."""


class UserError(SharedClusterError):
    """Somebody asked for what cannot be; shown as one block on stderr, without a traceback.

    Args:
        what: What happened, one sentence.
        fact: Why, as far as it is known.
        advice: What to type or change, one line each.
    """

    exit_code = 2

    def __init__(self, what: str, *, fact: str = "", advice: tuple[str, ...] | str = ()) -> None:
        self.what = what
        self.fact = fact
        self.advice = (advice,) if isinstance(advice, str) else advice
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.fact:
            lines.append(self.fact)
        lines.extend(self.advice)
        return "\n".join(lines)


class ConfigError(UserError):
    """An option, variable or key is unknown, malformed or contradicts another one."""


class AppLoadError(UserError):
    """The application could not be imported, or its workers kept dying. `traceback` is the application's own."""

    exit_code = 3

    def __init__(self, what: str, *, fact: str = "", advice: tuple[str, ...] | str = (), traceback: str = "") -> None:
        super().__init__(what, fact=fact, advice=advice)
        self.traceback = traceback


class BindError(UserError):
    """A listener could not be bound."""

    exit_code = 4


class RedisNeededError(UserError):
    """Redis is needed and cannot be had, or refuses us (address, password, rights, settings)."""

    exit_code = 5


class ClusterStoppingError(UserError):
    """`cluster.fork()` was called while the cluster goes; a handler that replaces workers needs no case for that."""


class PeerError(SharedClusterError):
    """The other side of a connection did not do its part."""


class StateUnavailableError(PeerError):
    """Redis did not answer in time, or not as Redis should; sessions answer 503, caches compute.

    `retry_after` is the number of seconds after which a client may try again.
    """

    def __init__(self, what: str, *, retry_after: float = 1.0) -> None:
        super().__init__(what)
        self.retry_after = retry_after


class Bug(AssertionError):  # noqa: N818 - it is not an error of anybody but us
    """An invariant of this package does not hold."""

    def __init__(self, what: str) -> None:
        super().__init__(f"[BUG] {what}")
