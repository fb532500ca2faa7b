"""What fails in a run is named, and ends nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import processes, rounds, rows
from benchmarks.code_state import CodeState
from benchmarks.install import why
from benchmarks.results import Results
from benchmarks.rounds import Scale
from benchmarks.servers import Redis
from benchmarks.specials import SPECIALS
from benchmarks.table import document
from benchmarks.work import WORKS

NOW = CodeState("bbbb", "new")


@pytest.mark.parametrize("name", [next(iter(WORKS)), next(iter(SPECIALS)), next(iter(rows.SCALED))])
def test_a_row_that_breaks_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever a row raises, the page has the row and the reason, and the run goes on."""

    def breaks(*_given: object, **_named: object) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(rows, "_measure", breaks)
    results = Results()
    results.add(rows.measure(name, Scale(1, 1), Redis(), ()), Scale(1, 1), NOW)
    page = document(results, NOW, results)
    assert f"Failed: sharedcluster in *{name}*: KeyError: 'a mistake of ours'" in page


def test_a_turn_ends_when_its_server_is_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next server's turn is not begun while this one still works; a server that failed is not waited for."""
    order: list[str] = []
    servers: list[Any] = [SimpleNamespace(pid=pid, peer=SimpleNamespace(name=f"peer {pid}")) for pid in (1, 2, 3)]

    def run(server: Any) -> Any:
        order.append(f"turn {server.pid}")
        if server.pid == 2:
            raise OSError("gone")

    monkeypatch.setattr(processes, "wait_quiet", lambda pid: order.append(f"rest {pid}"))
    row = rounds.Row("x")
    for server in list(servers):
        rounds._take_turn(server, servers, row, run)
    assert order == ["turn 1", "rest 1", "turn 2", "turn 3", "rest 3"]
    assert (list(row.slices), row.missing) == (["peer 1", "peer 3"], {"peer 2": "gone"})


def test_why_an_installer_failed() -> None:
    """The compiler's word before what came of it; no path of this machine; never nothing."""
    output = (
        "  error: subprocess-exited-with-error\n"
        "      /home/me/x/bjoern/server.h:3:10: fatal error: ev.h: No such file or directory\n"
        "  note: This error originates from a subprocess, and is likely not a problem with pip.\n"
        "ERROR: Failed building wheel for bjoern\n"
    )
    assert why(output) == "server.h:3:10: fatal error: ev.h: No such file or directory"
    assert why("ERROR: No matching distribution found for x\n") == "ERROR: No matching distribution found for x"
    assert why("killed") == "the installer gave no reason"
