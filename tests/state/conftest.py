"""Fixtures of the state suite: states are workers here, several of them in one process or in forked ones."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from sharedcluster.state import SharedState, StateSettings

_NUMBERS = itertools.count()

MakeState = Callable[..., SharedState]


@pytest.fixture
def namespace() -> str:
    """A namespace nobody else uses on the shared server."""
    return f"t{os.getpid()}n{next(_NUMBERS)}"


@pytest.fixture
def make_state(redis_url: str, namespace: str) -> Iterator[MakeState]:
    """Make states that share one namespace: each stands for a worker. Keyword arguments are settings."""
    made: list[SharedState] = []

    def make(url: str = redis_url, *, ready: bool = True, **settings: object) -> SharedState:
        state = SharedState(url, namespace, replace(StateSettings(), **settings))  # type: ignore[arg-type]
        made.append(state)
        state.start()
        if ready:
            assert state.wait_ready(10)
        return state

    yield make
    for state in made:
        state.close()


@pytest.fixture
def state(make_state: MakeState) -> SharedState:
    """One worker's state, its near caches trusted."""
    return make_state()
