"""A client with a cookie jar, talking to session stores directly: each request may go to any worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sharedcluster.state import SharedState
from sharedcluster.state.cookie import CookieSigner
from sharedcluster.state.session import Session
from sharedcluster.state.sessions import CookieAction, SaveOutcome

SIGNER = CookieSigner(["test key"])


class Browser:
    """Keeps one cookie, as a browser would."""

    def __init__(self, *, idle: float = 3600.0) -> None:
        self.cookie = ""
        self.idle = idle

    def open(self, state: SharedState) -> Session:
        """The beginning of a request: a session that is not loaded yet."""
        cookie = self.cookie
        return state.sessions.open(SIGNER, lambda: [cookie] if cookie else [], self.idle)

    def save(self, state: SharedState, session: Session) -> SaveOutcome:
        """The end of a request: the response arrives, and with it the cookie."""
        outcome = state.sessions.save(session, SIGNER)
        if outcome.action is CookieAction.SET:
            self.cookie = outcome.value
        elif outcome.action is CookieAction.DELETE:
            self.cookie = ""
        return outcome

    def visit(self, state: SharedState, view: Callable[[Session], Any]) -> Any:
        """A whole request."""
        session = self.open(state)
        result = view(session)
        self.save(state, session)
        return result

    def set(self, state: SharedState, **values: Any) -> None:
        """A request that sets some keys."""
        self.visit(state, lambda session: session.update(values))

    def get(self, state: SharedState, key: str) -> Any:
        """A request that reads a key."""
        return self.visit(state, lambda session: session.get(key))
