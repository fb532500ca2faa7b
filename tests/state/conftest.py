"""Fixtures of the state suite: states are workers here, several of them in one process or in forked ones."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from sharedcluster.flask import find_runtime
from sharedcluster.state import SharedState, StateSettings
from tests.redis_process import RedisProcess, find_redis_server

_NUMBERS = itertools.count()

MakeState = Callable[..., SharedState]


def server_binary() -> str:
    """SHAREDCLUSTER_TEST_SERVER names another server to run the whole suite on, e.g. the oldest one supported."""
    return os.environ.get("SHAREDCLUSTER_TEST_SERVER") or find_redis_server()


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisProcess]:
    """One real server for the whole run."""
    server = RedisProcess(server_binary())
    server.start()
    yield server
    server.close()


@pytest.fixture
def own_redis() -> Iterator[RedisProcess]:
    """A server of the test's own, to be killed, paused and flushed."""
    server = RedisProcess(server_binary())
    server.start()
    yield server
    server.close()


@pytest.fixture
def namespace() -> str:
    """A namespace nobody else uses on the shared server."""
    return f"t{os.getpid()}n{next(_NUMBERS)}"


@pytest.fixture
def make_state(redis_url: str, namespace: str) -> Iterator[MakeState]:
    """Make states that share one namespace: each stands for a worker. Keyword arguments are settings."""
    made: list[SharedState] = []

    def make(url: str = redis_url, *, ready: bool = True, **settings: object) -> SharedState:
        state = SharedState(url, namespace, replace(StateSettings(), **settings), find_runtime())  # type: ignore[arg-type]
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
