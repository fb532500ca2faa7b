"""What the commands print: tables, durations, frames of the live view, templates that are valid."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from sharedcluster.cli import cli, logs, templates
from sharedcluster.cli.monit import View, frame
from sharedcluster.cli.tables import duration, table
from sharedcluster.cli.targets import Target
from sharedcluster.operating import ecosystem
from sharedcluster.operating.samples import Look


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0s"), (12.9, "12s"), (185, "3m05s"), (8040, "2h14m"), (442800, "5d03h")]
)
def test_durations(seconds: float, text: str) -> None:
    """Two units at the most."""
    assert duration(seconds) == text


def test_a_table_is_ascii_and_aligned() -> None:
    """Columns keep their place, whatever is in them."""
    text = table(["id", "name"], [["0", "shop"], ["10", "a"]], left=(1,))
    assert text.splitlines() == ["id  name", " 0  shop", "10  a"]


def facts(workers: int) -> dict[str, Any]:
    """A status of so many workers."""
    row = {"state": "listening", "connections": 3, "in_flight": 1, "requests": 10, "rss": 50 << 20, "cpu": 41.0,
           "uptime": 5.0, "restarts": 0}  # fmt: skip
    return {
        "name": "shop", "pid": 1, "state": "online", "generation": 1, "started_at": 0.0, "counters": {"restarts": 0},
        "listeners": [{"address": "127.0.0.1:8000"}], "redis": {"state": "ok", "latency_ms": 0.4},
        "workers": [{**row, "id": n, "slot": n, "pid": 4000 + n} for n in range(workers)],
    }  # fmt: skip


@pytest.mark.parametrize("workers", [1, 4, 64])
def test_the_live_view_fits_a_terminal(workers: int) -> None:
    """80 columns and 24 lines, also with more workers than lines."""
    view = View([Target("shop", Path("/nowhere"))])
    view.looks.extend([Look(0.0, facts(workers)), Look(1.0, facts(workers))])
    lines = frame(view, 80, 23)
    assert len(lines) <= 23
    assert max(len(line) for line, _ in lines) <= 80
    assert all(line.isascii() for line, _ in lines)
    assert ("... and" in "".join(line for line, _ in lines)) is (workers == 64)


def test_keys_move_between_apps_and_end() -> None:
    """tab goes to the next one, q leaves."""
    view = View([Target("a", Path("/nowhere")), Target("b", Path("/nowhere"))])
    assert view.press("\t")
    assert view.target.name == "b"
    assert view.press("l")
    assert not view.press("q")


def test_the_written_file_is_read_again(tmp_path: Path) -> None:
    """`init` writes what `check` accepts, commented out and with every comment removed."""
    text = templates.ecosystem_file("shop.web", 'shop:create_app("x")')
    for number, content in enumerate((text, re.sub(r"(?m)^#(?=\w+ = )", "", text))):
        tomllib.loads(content)
        path = tmp_path / f"{number}.toml"
        path.write_text(content)
        (tmp_path / "logs").mkdir(exist_ok=True)
        (spec,) = ecosystem.read(path, str).specs({})
        assert spec.target == 'shop:create_app("x")'


def test_init_writes_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All templates are well-formed and name the app; what is there is not overwritten."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.py").write_text("from flask import Flask\napp = Flask(__name__)\n")
    runner = CliRunner()
    result = runner.invoke(cli, ["init", "--docker", "--systemd", "--k8s"])
    assert result.exit_code == 0, result.output
    assert yaml.safe_load((tmp_path / "compose.yaml").read_text())["services"]["web"]["stop_grace_period"] == "40s"
    kinds = [document["kind"] for document in yaml.safe_load_all((tmp_path / "k8s.yaml").read_text())]
    assert kinds == ["Deployment", "Service", "PodDisruptionBudget"]
    assert '"run", "shop"' in (tmp_path / "Dockerfile").read_text()
    assert "run shop" in (tmp_path / "shop.service").read_text()
    assert "@" not in (tmp_path / "shop.service").read_text()
    before = (tmp_path / "sharedcluster.toml").read_text()
    (tmp_path / "sharedcluster.toml").write_text("# mine\n" + before)
    assert runner.invoke(cli, ["init"]).exit_code != 0
    assert (tmp_path / "sharedcluster.toml").read_text().startswith("# mine")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    """Each shell's script calls the command back."""
    result = CliRunner().invoke(cli, ["completion", shell])
    assert "_SHAREDCLUSTER_COMPLETE" in result.output


def test_a_mistyped_verb_gets_a_suggestion() -> None:
    """And PM2's other names work."""
    assert "Did you mean 'restart'" in CliRunner().invoke(cli, ["restrat"]).output
    assert CliRunner().invoke(cli, ["ls", "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("wanted", "text", "shown"),
    [
        (False, "\x1b[31mred\x1b[0m", "red"),
        (True, "\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m\x1b[0m"),
        (True, "a\x1b[2Jb\rc", "a\\x1b[2Jb\\x0dc"),
    ],
)
def test_a_log_may_have_colour_and_nothing_worse(
    monkeypatch: pytest.MonkeyPatch, wanted: bool, text: str, shown: str
) -> None:
    """Colours of the application are kept on a terminal only; what would clear the screen is shown as text."""
    monkeypatch.setattr(logs, "wants_colour", lambda: wanted)
    assert logs._printable(text) == shown
