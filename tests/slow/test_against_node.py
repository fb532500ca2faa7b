"""The scenarios in which Node's cluster loses something: ours does not. (What Node does is printed, not asserted.)"""

from __future__ import annotations

import shutil

import pytest

from tests.program_process import Lab
from tests.slow.against_node import SCENARIOS, NodeLab, run

OURS = [
    "answered by worker 2",
    "answered by worker 2",
    "6 of 6 answered; afterwards the worker has work again",
    "answered by worker 1; exit 0, exited_after_disconnect true",
    "answered by worker 1",
    "called after 2 of 2 exits",
    "gone",
    "answered by worker 1; the worker exits in order",
    "4 of 4 connections live on",
    "arrives",
]


@pytest.mark.parametrize(("name", "expected"), list(zip(SCENARIOS, OURS, strict=True)))
def test_ours(name: str, expected: str) -> None:
    """What docs/from-node.md says of ours is so."""
    if shutil.which("node"):
        print("Node:", run(SCENARIOS[name], NodeLab))
    assert run(SCENARIOS[name], Lab) == expected
