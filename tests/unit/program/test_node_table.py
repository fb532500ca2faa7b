"""docs/node-test-table.md names tests; every one of them has to be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_named_test_exists() -> None:
    """`file::test` and the `test` names behind it, which are of the same file or of one named elsewhere."""
    table = (ROOT / "docs" / "node-test-table.md").read_text()
    there = {
        path.stem: set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
        for path in (ROOT / "tests" / "integration").glob("test_node_*.py")
    }
    named = re.findall(r"`(?:(test_node_\w+)::)?(test_\w+)`", table)
    assert len(named) > 60
    everywhere = set().union(*there.values())
    for file, name in named:
        assert name in (there[file] if file else everywhere), f"{file}::{name}"
