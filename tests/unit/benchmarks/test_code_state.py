"""When a result counts as older than the code."""

from __future__ import annotations

from pathlib import Path

from benchmarks import code_state
from benchmarks.code_state import CodeState, fingerprint, is_stale
from benchmarks.micro.counting import TOLERANCE, compare, parse_count


def test_fingerprint_sees_names_and_contents_of_code_only(tmp_path: Path) -> None:
    """An edit, a new file and a rename are changes of the code; a note beside it is not."""
    code = tmp_path / "part" / "a.py"
    code.parent.mkdir()
    code.write_text("x = 1\n")
    first = fingerprint(tmp_path)
    (tmp_path / "notes.md").write_text("not code")
    assert fingerprint(tmp_path) == first
    code.write_text("x = 2\n")
    edited = fingerprint(tmp_path)
    renamed = code.rename(code.with_name("b.py"))
    moved = fingerprint(tmp_path)
    (tmp_path / "script.lua").write_text("return 1")
    assert len({first, edited, moved, fingerprint(tmp_path)}) == 4
    renamed.write_text("x = 1\n")


def test_words_are_not_code(tmp_path: Path) -> None:
    """A comment, a docstring, an empty line and the number of a release leave a result fresh; a string does not."""
    code, release = tmp_path / "a.py", tmp_path / "version.py"
    code.write_text('"""What it is."""\nx = "#1"  # why\n\n\ndef f() -> None:\n    """Do."""\n    return None\n')
    release.write_text('VERSION = "1"\n')
    first = fingerprint(tmp_path)
    code.write_text('"""What it\nis now."""\nx = "#1"\n# so\ndef f() -> None:\n    """Do it."""\n    return None\n')
    release.write_text('VERSION = "2"\n')
    assert fingerprint(tmp_path) == first
    code.write_text(code.read_text().replace("#1", "#2"))
    assert fingerprint(tmp_path) != first


def test_only_the_code_decides() -> None:
    """A commit that touches no code leaves a result fresh; an edit without a commit does not."""
    assert not is_stale(CodeState("one", "same"), CodeState("two", "same"))
    assert is_stale(CodeState("one", "before"), CodeState("one", "after"))


def test_the_code_that_is_here_has_a_state() -> None:
    """The fingerprint of this tree is one, with git or without."""
    assert len(code_state.current().fingerprint) == 16


def test_counts_against_the_last_release() -> None:
    """Clearly more is a regression, a little more or a new path is not."""
    now = {"same": 1000, "more": int(1000 * (1 + 2 * TOLERANCE)), "less": 500, "new": 7}
    changes = {change.path: change for change in compare(now, {"same": 1000, "more": 1000, "less": 1000})}
    assert [path for path, change in changes.items() if change.is_regression] == ["more"]
    assert "REGRESSION" in str(changes["more"])
    assert "new" in str(changes["new"])


def test_count_of_valgrind() -> None:
    """The count stands in one line, with commas."""
    assert parse_count("==1== noise\n==1== I   refs:      619,353,470\n") == 619_353_470
