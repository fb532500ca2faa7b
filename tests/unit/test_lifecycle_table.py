"""docs/lifecycle.md names a test for each loss and each scenario; every one of them has to be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_OFFERED = {17}


def rows(heading: str) -> dict[int, list[str]]:
    """By number, the tests that the rows of a chapter name, as `file::test`."""
    chapter = (ROOT / "docs" / "lifecycle.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    found: dict[int, list[str]] = {}
    for number, cells in re.findall(r"^\| (\d+)(.*)\|$", chapter, re.MULTILINE):
        file, tests = "", []
        for named, test in re.findall(r"`([\w/]*\.py)?::(\w+)`", cells):
            file = named or file
            tests.append(f"{file}::{test}")
        found[int(number)] = tests
    return found


def folder(file: str) -> Path:
    """Where a file of the table is."""
    return ROOT / "tests" / ("" if file.startswith(("unit/", "slow/")) else "integration") / file


def test_every_loss_and_scenario_has_a_test() -> None:
    """Ten losses; scenarios 13 to 21 and 27 to 42, but for what is not offered."""
    losses, scenarios = rows("The ten ways of losing a request"), rows("Scenarios")
    assert set(losses) == set(range(1, 11))
    assert set(scenarios) == {*range(13, 22), *range(27, 43)}
    assert {number for number, tests in (losses | scenarios).items() if not tests} == NOT_OFFERED


def test_every_named_test_exists() -> None:
    """The file is there and has it."""
    for chapter in ("The ten ways of losing a request", "Scenarios"):
        for test in (test for tests in rows(chapter).values() for test in tests):
            file, _, name = test.partition("::")
            assert f"def {name}(" in folder(file).read_text(), test
