"""Which rows a command measures."""

from __future__ import annotations

from benchmarks.bars import BARS
from benchmarks.rows import wanted
from benchmarks.work import WORKS


def test_everything() -> None:
    """Without a choice all rows are measured, each once."""
    names = wanted()
    assert len(names) == len(set(names))
    assert {*WORKS} < {*names}


def test_quick_is_what_has_a_bar() -> None:
    """No bar is left out of the quick table, and nothing without one takes its time."""
    assert {*wanted(quick=True)} == {bar.work for bar in BARS}


def test_by_text() -> None:
    """A text chooses what has it in its name, among what else was asked."""
    assert wanted(texts=["session write"], work=True) == ["Flask, session write"]
    assert wanted(texts=["session write"])[1:] == [
        "scaling: Flask, session write",
        "cost of a session write to the rest of the site",
    ]
    assert wanted(texts=["Flask hello"]) == ["Flask hello"]
    assert wanted(texts=["nothing of that name"]) == []
