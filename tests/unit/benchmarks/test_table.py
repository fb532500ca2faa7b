"""The page that shows results: bars, marks, spread."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import markdown, plots, table, twice
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
    none = dict.fromkeys(("redis_us", "client_us", "failed", "dropped", "closed_idle"), 0.0)
    rest = {"rate": 1000.0, "p50_ms": 1.0, "p99_ms": 2.0, **none}
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
    lines = twice.section(results(ours=(11.0, 11.0)), results(ours=(10.0, 10.0)))
    assert "| plain WSGI | granian | 0.50 | 0.55 | +10% |" in lines


def test_bars_of_two_runs() -> None:
    """Both medians, the distance and the verdict of each; and that runs of different code are no repeats."""
    lines = twice.bars(results(ours=(14.0, 14.0)), results(ours=(12.0, 12.0)))
    assert "| plain WSGI | ≤ 0.65 × granian | 0.60 | 0.70 | +17% | met / **MISSED** |" in lines
    assert not any("code changed" in line for line in lines)
    assert any("code changed" in line for line in twice.bars(results(NOW), results(THEN)))


def test_a_server_without_a_bar_is_compared_in_the_rounds_it_had() -> None:
    """It takes part in the first rounds only; later ones of ours are not paired with anything."""
    entry = Entry(
        "JSON", "work", "", NOW, Scale(1, 3, 1), {"sharedcluster": turns(10.0, 99.0, 99.0), "uwsgi": turns(20.0)}, {}
    )
    assert entry.ratio("sharedcluster", "uwsgi") == Summary(0.5, 0.5, 0.5, 1)
    assert entry.best_ratio("sharedcluster", "uwsgi") == 0.5


def test_who_is_ahead_of_us_is_listed() -> None:
    """By itself, from the medians; a server that was ahead in some rounds only is marked."""
    assert "| plain WSGI | granian | 1.05 (0.90–1.20) | not in every round |" in table.behind(
        results(ours=(18.0, 24.0)), NOW
    )
    assert table.behind(results(), NOW) == ["In no row."]


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
    for svg in (plots.cpu_per_request(entry), plots.lines("a < b", "a & b", "workers", [("x", [(1, 2.0), (2, 3.0)])])):
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert plots.cpu_per_request(entry).count("<rect") == 2


def test_plots_of_a_run(tmp_path: Path) -> None:
    """One for each row, one for the bars, in which a missed one looks different; those of former rows are gone."""
    (tmp_path / "a-row-of-long-ago.svg").write_text("")
    plots.write_all(results(ours=(20.0, 20.0)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"plain-wsgi.svg", "scaling.svg", "where-it-stands.svg"}
    assert 'rect class="m"' in (tmp_path / "where-it-stands.svg").read_text()


def test_names_of_lines_do_not_cover_each_other() -> None:
    """Two lines that end at the same height have their names below each other."""
    svg = plots.lines("", "", "", [("one", [(1, 1.0), (2, 1.5)]), ("two", [(1, 1.0), (2, 1.5)])])
    heights = [float(each.get("cy", "")) for each in ElementTree.fromstring(svg) if each.tag.endswith("circle")]
    assert abs(heights[0] - heights[1]) >= 15


def test_a_cell_is_short() -> None:
    """One figure where there is no spread; three digits are enough."""
    assert markdown.table(("a", "b|c"), [("1", "2")]) == ["| a | b\\|c |", "| --- | --- |", "| 1 | 2 |"]
    assert summary([0.0]).spread == 0.0


def test_tables_go_where_a_page_has_a_place_for_them() -> None:
    """Only what stands between the marks is replaced, again and again to the same effect."""
    page = "a\n<!-- results: bars -->\nold\n<!-- end of results -->\nb <!-- results: other --> c"
    once = markdown.insert(page, {"bars": ["| 1 \\1 |"], "none": ["x"]})
    assert once == "a\n<!-- results: bars -->\n\n| 1 \\1 |\n\n<!-- end of results -->\nb <!-- results: other --> c"
    assert markdown.insert(once, {"bars": ["| 1 \\1 |"]}) == once
