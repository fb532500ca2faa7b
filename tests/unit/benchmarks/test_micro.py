"""Instruction counts against those of the last release: a regression is seen, and nothing else is called one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.micro import counting
from benchmarks.micro.paths import PATHS


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A last release that was counted here: 1000 instructions for `a`."""
    here = {"machine": "this"}
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"release": "0.9", "platform": here, "counts": {"a": 1000}}))
    monkeypatch.setattr(counting, "KEPT", path)
    monkeypatch.setattr(counting, "_platform", lambda: here)
    monkeypatch.setattr("shutil.which", lambda name: name)
    return path


@pytest.mark.parametrize(("now", "code", "word"), [(1040, 0, "+4.0%"), (1060, 1, "REGRESSION"), (900, 0, "-10.0%")])
def test_a_regression_fails_the_command(
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    now: int,
    code: int,
    word: str,
) -> None:
    """Five per cent more is the limit; the line says by how much."""
    monkeypatch.setattr(counting, "count", lambda: {"a": now})
    assert counting.run(keep=False) == code
    assert word in capsys.readouterr().out


def test_a_regression_is_named_in_the_results(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make bench` shows it too, beside the count of the release; a new path has none."""
    monkeypatch.setattr(counting, "count", lambda: {"a": 1100, "b": 7})
    repeats = counting.measure().repeats
    assert repeats["a (REGRESSION)"] == [{"instructions": 1100.0, "at 0.9": 1000.0, "change, %": pytest.approx(10.0)}]
    assert repeats["b"][0]["change, %"] == 0.0


def test_counts_of_another_python_are_not_compared(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would differ for reasons that are not ours; the row says so."""
    monkeypatch.setattr(counting, "count", lambda: {"a": 5000})
    monkeypatch.setattr(counting, "_platform", lambda: {"machine": "another"})
    measured = counting.measure()
    assert measured.repeats == {"a": [{"instructions": 5000.0}]}
    assert "not comparable" in measured.missing["the last release"]


def test_a_release_keeps_its_counts(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is what the next run is compared with."""
    monkeypatch.setattr(counting, "ROOT", kept.parent)
    monkeypatch.setattr(counting, "count", lambda: {"a": 1200})
    assert counting.run(keep=True) == 0
    assert counting.Kept.load(kept).counts == {"a": 1200}


def test_every_path_has_a_count_of_the_last_release() -> None:
    """A path that is not in counts.json would never be judged."""
    assert {*counting.Kept.load(Path(counting.__file__).with_name("counts.json")).counts} == {*PATHS}
