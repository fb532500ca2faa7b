"""Fixtures every tier shares, and the tier marks, which follow from the folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.cluster_process import Cluster
from tests.program_process import Lab, Program, StartLab, StartProgram
from tests.redis_process import RedisProcess, find_redis_server

TESTS = Path(__file__).parent

# No test asserts how long something took: a machine that is busy is no mistake.
settings.register_profile("sharedcluster", deadline=None)
settings.load_profile("sharedcluster")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the folder it lives in."""
    for item in items:
        tier = item.path.relative_to(TESTS).parts[0]
        if tier in ("unit", "state", "integration", "slow"):
            item.add_marker(tier)


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisProcess]:
    """One real server for the whole run; tests that hurt a server start their own (`own_redis`)."""
    server = RedisProcess(find_redis_server())
    server.start()
    yield server
    server.close()


@pytest.fixture
def redis_url(shared_redis: RedisProcess) -> str:
    """The URL of the shared server. Tests keep out of each other's way by their key namespaces."""
    return shared_redis.url


@pytest.fixture
def own_redis() -> Iterator[RedisProcess]:
    """A server of the test's own, to be killed, paused and flushed."""
    server = RedisProcess(find_redis_server())
    server.start()
    yield server
    server.close()


StartCluster = Callable[..., Cluster]


@pytest.fixture
def start_cluster() -> Iterator[StartCluster]:
    """Start clusters, which are ended after the test; what they wrote is shown if it failed."""
    started: list[Cluster] = []

    def start(*arguments: Any, ready: bool = True, **options: Any) -> Cluster:
        cluster = Cluster(*arguments, **options)
        started.append(cluster)
        return cluster.start(ready=ready)

    yield start
    for cluster in started:
        if cluster.log.exists():
            print(f"--- what the cluster wrote\n{cluster.output()}")
        cluster.close()


@pytest.fixture
def start_program() -> Iterator[StartProgram]:
    """Start scripts, which are ended after the test; what they wrote is shown if it failed."""
    yield from _programs(Program)


@pytest.fixture
def start_lab() -> Iterator[StartLab]:
    """Start tests/programs/lab.py, with so many workers."""
    yield from _programs(Lab)


def _programs(kind: type[Program]) -> Iterator[Callable[..., Any]]:
    started: list[Program] = []

    def start(*arguments: Any, **options: Any) -> Program:
        started.append(kind(*arguments, **options))
        return started[-1]

    yield start
    for program in started:
        program.close()
        print(f"--- what the program wrote\n{program.output}")
