"""The page that shows results: bars, marks, spread."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import plots, table
from benchmarks.bars import BARS, Bar, verdict
from benchmarks.code_state import CodeState
from benchmarks.ratios import Summary, summary
from benchmarks.results import Entry, Results
from benchmarks.rounds import Scale
from benchmarks.specials import SPECIALS
from benchmarks.work import WORKS

THEN, NOW = CodeState("aaaa", "old"), CodeState("bbbb", "new")


def turns(*cpu: float) -> list[dict[str, float]]:
    """A server's turns with these costs."""
    rest = {"redis_us": 0.0, "rate": 1000.0, "p50_ms": 1.0, "p99_ms": 2.0, "failed": 0.0, "closed_idle": 0.0}
    return [{"cpu_us": each, **rest} for each in cpu]


def results(code: CodeState = NOW, ours: tuple[float, ...] = (10.0, 12.0)) -> Results:
    """One row with one peer that ran and one that did not."""
    servers = {"sharedcluster": turns(*ours), "granian": turns(20.0, 20.0)}
    entry = Entry("plain WSGI", "work", "2026-01-01 00:00", code, Scale(1, 2), servers, {"bjoern": "does not build"})
    return Results({"packages": {}}, {"bjoern": "does not build"}, {entry.name: entry})


@pytest.mark.parametrize(
    ("measured", "word"),
    [
        (None, "not measured"),
        (Summary(0.5, 0.4, 0.6, 3), "met"),
        (Summary(0.65, 0.65, 0.65, 3), "met"),
        (Summary(0.6, 0.5, 0.7, 3), "met, the spread crosses it"),
        (Summary(0.7, 0.6, 0.8, 3), "**MISSED**, the spread crosses it"),
        (Summary(0.9, 0.8, 1.0, 3), "**MISSED**"),
    ],
)
def test_verdict(measured: Summary | None, word: str) -> None:
    """The median decides; a spread that crosses the bar is said."""
    assert verdict(Bar("plain WSGI", 0.65, "granian"), measured) == word


def test_every_bar_is_about_a_row_that_is_measured() -> None:
    """A bar with a misspelt row or peer would never be judged."""
    for bar in BARS:
        if bar.peer:
            assert bar.peer in WORKS[bar.work].peers
        else:
            assert bar.work in SPECIALS


def test_bars_are_beside_what_was_measured() -> None:
    """The ratio, its ends and the verdict stand in the bar's line; what did not run is not judged."""
    lines = table.bars(results(), NOW)
    assert "| plain WSGI | ≤ 0.65 × granian | 0.55 (0.50–0.60) | 0.50 | met |" in lines
    assert "| plain WSGI | ≤ 2 × bjoern | – |  | not measured |" in lines


def test_a_result_of_older_code_is_marked() -> None:
    """Wherever a stale row is shown, it says so; the head of the page counts them."""
    page = table.document(results(THEN), NOW)
    assert "plain WSGI (⚠ stale)" in page
    assert "1 of 1 rows measured older code" in page
    assert "stale" not in table.document(results(NOW), NOW)


def test_a_peer_that_could_not_be_installed_is_named() -> None:
    """Nobody is left out silently."""
    assert "Left out: bjoern (does not build)." in table.document(results(), NOW)


def test_two_runs_side_by_side() -> None:
    """The distance of a ratio between two runs, as a part of the first."""
    lines = table.twice(results(ours=(11.0, 11.0)), results(ours=(10.0, 10.0)))
    assert "| plain WSGI | granian | 0.50 | 0.55 | +10% |" in lines


def test_results_survive_their_file(tmp_path: Path) -> None:
    """What is read back is what was written."""
    path = tmp_path / "results.json"
    results().save(path)
    assert Results.load(path) == results()
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="run make bench again"):
        Results.load(path)


def test_plots_are_well_formed() -> None:
    """An XML parser reads them, and each server has its bar."""
    entry = results().entries["plain WSGI"]
    for svg in (plots.cpu_per_request(entry), plots.lines("a < b & c", "workers", [("x", [(1, 2.0), (2, 3.0)])])):
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert plots.cpu_per_request(entry).count("<rect") == 2


def test_a_cell_is_short() -> None:
    """One figure where there is no spread; three digits are enough."""
    assert table.markdown(("a", "b|c"), [("1", "2")]) == ["| a | b\\|c |", "| --- | --- |", "| 1 | 2 |"]
    assert summary([0.0]).spread == 0.0


def test_tables_go_where_a_page_has_a_place_for_them() -> None:
    """Only what stands between the marks is replaced, again and again to the same effect."""
    page = "a\n<!-- results: bars -->\nold\n<!-- end of results -->\nb <!-- results: other --> c"
    once = table.insert(page, {"bars": ["| 1 \\1 |"], "none": ["x"]})
    assert once == "a\n<!-- results: bars -->\n\n| 1 \\1 |\n\n<!-- end of results -->\nb <!-- results: other --> c"
    assert table.insert(once, {"bars": ["| 1 \\1 |"]}) == once
