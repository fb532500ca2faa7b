"""`on`, `once` and `off` for the objects people hold: the cluster, a worker, a server, a child."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

from sharedcluster.cluster.events import Emitter
from sharedcluster.errors import ClusterStoppingError
from sharedcluster.log import logger

Observer = Callable[..., Any]
ObserverT = TypeVar("ObserverT", bound=Observer)


class Events(Emitter):
    """An emitter that knows its events, so that a misspelt name is an error and not a silence."""

    EVENTS: Sequence[str] = ()

    def __init__(self) -> None:
        super().__init__(_log_fault)

    @overload
    def on(self, event: str, observer: ObserverT) -> ObserverT: ...

    @overload
    def on(self, event: str) -> Callable[[ObserverT], ObserverT]: ...

    def on(self, event: str, observer: Observer | None = None) -> Any:
        """Call `observer` whenever `event` happens; without one this is a decorator.

        Raises:
            ValueError: There is no such event.
        """
        self._check(event)
        if observer is None:
            return lambda decorated: self.on(event, decorated)
        super().on(event, observer)
        self._observed(event)
        return observer

    def once(self, event: str, observer: Observer) -> Observer:
        """Call `observer` the next time only."""

        def only(*arguments: object) -> None:
            self.off(event, only)
            observer(*arguments)

        self.on(event, only)
        return observer

    def has_observer(self, event: str) -> bool:
        """Whether anybody asked for `event`."""
        return bool(self._observers.get(event))

    def _observed(self, event: str) -> None:
        """Somebody asked for `event`."""

    def _check(self, event: str) -> None:
        if event not in self.EVENTS:
            close = difflib.get_close_matches(event, self.EVENTS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else f"; there are {', '.join(self.EVENTS)}"
            raise ValueError(f"there is no event {event!r}{hint}")


def _log_fault(event: str, error: BaseException) -> None:
    if isinstance(error, ClusterStoppingError):
        logger.debug("%s", error)  # the usual `on("exit", fork)`, on the way out
        return
    logger.error("a handler of %r failed", event, exc_info=error)
