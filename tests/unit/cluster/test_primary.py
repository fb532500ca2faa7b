"""How long the primary sleeps."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from sharedcluster.cluster.primary import BUSY_TICK, Primary
from sharedcluster.config import Config


class TurnedError(Exception):
    """The loop has come to its first turn."""


@pytest.mark.parametrize(("is_waiting", "most"), [(True, BUSY_TICK), (False, 1000.0)])
def test_it_looks_again_within_a_tick_while_somebody_waits(
    monkeypatch: pytest.MonkeyPatch, is_waiting: bool, most: float
) -> None:
    """Although nothing has to be decided for long: a client in the backlog may be nobody's turn any more."""
    primary = Primary(Config(app="app"), [], lambda _: 0, lambda _: 0, name="test")
    slept: list[float] = []

    def turn(timeout: float) -> None:
        slept.append(timeout)
        raise TurnedError

    nobody = SimpleNamespace(
        watch=lambda _now: None, is_waiting=is_waiting, dispatch=lambda: None, close=lambda keep_files: 0
    )
    monkeypatch.setattr(primary, "hand_off", nobody)
    monkeypatch.setattr(primary, "_turn", turn)
    monkeypatch.setattr(primary, "_act_at", time.monotonic() + 1000.0)
    primary.workforce.has_changed = False
    with pytest.raises(TurnedError):
        primary.run()
    assert most / 2 < slept[0] <= most
