"""A policy of the user's own: what is accepted, and what a mistake in it leads to."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from sharedcluster.cluster.messages import Connection, Peer
from sharedcluster.cluster.own_policy import Guarded, make_policy
from sharedcluster.cluster.scheduling import RoundRobin
from sharedcluster.cluster.worker_handle import CREDIT, WorkerHandle
from sharedcluster.errors import AppLoadError, ConfigError
from tests.unit.cluster.fake_workers import worker

HIGHEST = """
import helper_of_mine
class Highest:
    def __init__(self): self.workers = []
    def add(self, worker): self.workers.append(worker)
    def remove(self, worker): self.workers.remove(worker)
    def pick(self, peer): return max(self.workers, key=lambda w: w.slot, default=None)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(code: str) -> None:
    """The module of the user."""
    Path("mine.py").write_text(code)


def test_a_name_of_ours() -> None:
    """The built-in ones are what they were."""
    assert type(make_policy("round-robin")) is RoundRobin


def test_a_class_of_the_users() -> None:
    """It is asked; workers forked from here do not inherit its module; the path is as it was."""
    write(HIGHEST.replace("import helper_of_mine\n", "import statistics\n"))
    path = list(sys.path)
    policy = make_policy("mine:Highest")
    workers = [worker(1), worker(3), worker(2)]
    for each in workers:
        policy.add(each)
    assert [policy.pick(None) for _ in range(3)] == [workers[1]] * 3
    policy.remove(workers[1])
    assert policy.pick(None) is workers[2]
    assert "mine" not in sys.modules
    assert sys.path == path


@pytest.mark.parametrize(
    ("code", "name", "kind", "said"),
    [
        ("", "nowhere:Policy", ConfigError, 'there is no module "nowhere"'),
        ("", "mine:Policy", ConfigError, "has no class Policy"),
        ("class Policy:\n def add(self, w): ...", "mine:Policy", ConfigError, "has no method remove or pick"),
        ("1/0", "mine:Policy", AppLoadError, "importing"),
        ("raise SystemExit", "mine:Policy", AppLoadError, "importing"),
        ("class Policy:\n def __init__(self): 1/0", "mine:Policy", AppLoadError, "failed"),
        (HIGHEST, "mine:Highest", ConfigError, "imports helper_of_mine"),
    ],
)
def test_what_is_refused(code: str, name: str, kind: type[Exception], said: str) -> None:
    """Before anything is forked, with the reason."""
    Path("helper_of_mine.py").write_text("")
    write(code)
    with pytest.raises(kind, match=said):
        make_policy(name)


class Faulty:
    """Picks the first, then makes the mistake."""

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake
        self.workers: list[WorkerHandle] = []
        self.asked = 0

    def add(self, worker: WorkerHandle) -> None:
        """As it should be."""
        self.workers.append(worker)

    def remove(self, worker: WorkerHandle) -> None:
        """As it should be."""
        self.workers.remove(worker)

    def pick(self, peer: Peer) -> WorkerHandle | None:
        """The second time it is wrong."""
        self.asked += 1
        if self.asked == 1:
            return self.workers[0]
        if self.mistake == "raises":
            raise RuntimeError("a mistake of mine")
        if self.mistake == "exits":
            sys.exit("a mistake of mine")
        odd: Any = {"stranger": worker(9), "busy": self.workers[0], "no hash": [], "no repr": Unspeakable()}
        return cast(WorkerHandle, odd[self.mistake])


class Unspeakable:
    """Fails at whatever is done with it."""

    __hash__ = None  # type: ignore[assignment]  # that is the point

    def __repr__(self) -> str:
        raise RuntimeError("a mistake of mine")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("a mistake of mine")


@pytest.mark.parametrize("mistake", ["raises", "exits", "stranger", "busy", "no hash", "no repr"])
def test_a_mistake_hands_over_to_round_robin(mistake: str, caplog: pytest.LogCaptureFixture) -> None:
    """An exception, a worker it does not have, one without credit: said once, never asked again, nobody waits."""
    own = Faulty(mistake)
    policy = Guarded("mine:Faulty", own)
    a, b = worker(1), worker(2)
    policy.add(a)
    policy.add(b)
    assert policy.pick(None) is a
    a.unacknowledged = dict.fromkeys(range(CREDIT), Connection(-1, 0, None))
    with caplog.at_level(logging.ERROR):
        assert [policy.pick(None) for _ in range(3)] == [b, b, b]
    assert own.asked == 2
    assert caplog.text.count("round-robin from now on") == 1
    policy.remove(a)
    assert policy.pick(None) is b
