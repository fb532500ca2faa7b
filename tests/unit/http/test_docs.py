"""The page and the code say the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sharedcluster.http.policy import RULES
from sharedcluster.http.settings import HttpSettings

PAGE = (Path(__file__).parents[3] / "docs" / "http.md").read_text()


def test_every_rule_is_a_row_of_the_page() -> None:
    """docs/http.md prints the whole table; on a change, paste what this test prints."""
    rows = [f"| {rule.name} | {rule.status} | {rule.refuses} | {rule.source} |" for rule in RULES]
    missing = [row for row in rows if row not in PAGE]
    assert not missing, "\n".join(["", *missing])
    assert PAGE.count("| RFC") >= len([rule for rule in RULES if rule.source.startswith("RFC")])


def test_every_setting_is_on_the_page() -> None:
    """Nothing can be set that is not explained."""
    missing = [field.name for field in dataclasses.fields(HttpSettings) if f"`{field.name}`" not in PAGE]
    assert not missing
