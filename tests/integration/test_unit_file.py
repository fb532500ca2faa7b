"""The systemd unit of the operating guide: its commands, run as systemd would run them."""

from __future__ import annotations

import configparser
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster_process import ROOT
from tests.conftest import StartCluster
from tests.waiting import wait_until

INSTALLED = "/srv/shop/.venv/bin/sharedcluster"


@pytest.fixture(scope="module")
def unit() -> configparser.SectionProxy:
    """The [Service] section as the page has it."""
    text = re.search(r"```ini\n(\[Unit\].*?)```", (ROOT / "docs/operating.md").read_text(), re.DOTALL)
    assert text is not None
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text[1])
    return parser["Service"]


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """The receiving end of sd_notify."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.settimeout(20)
        yield end


def hear(end: socket.socket, state: str) -> str:
    """The next datagram that says `state`."""
    while True:
        said = end.recv(4096).decode()
        if state in said.splitlines():
            return said


def test_its_commands_do_what_systemd_expects(
    unit: configparser.SectionProxy, systemd: socket.socket, start_cluster: StartCluster, tmp_path: Path
) -> None:
    """Start says READY with its pid, the watchdog is fed, ExecReload reloads, TERM stops within TimeoutStopSec."""
    (tmp_path / "shop.py").write_text("from flask import Flask\napp = Flask(__name__)\napp.get('/')(lambda: 'open')\n")
    start = shlex.split(unit["ExecStart"])
    assert start[0] == INSTALLED
    assert start[1] == "run"
    env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": str(int(unit["WatchdogSec"]) * 1_000_000 // 30)}
    cluster = start_cluster(start[2], *start[3:], "-w", "2", "--redis", "none", cwd=tmp_path, env=env)
    assert cluster.process is not None
    assert f"MAINPID={cluster.process.pid}" in hear(systemd, "READY=1")
    hear(systemd, "WATCHDOG=1")
    reload = [sys.executable, "-m", "sharedcluster", *shlex.split(unit["ExecReload"])[1:]]
    done = subprocess.run(reload, env=cluster.env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MONOTONIC_USEC=" in hear(systemd, "RELOADING=1")
    hear(systemd, "READY=1")
    assert cluster.get("/").body == b"open"
    cluster.signal(signal.SIGTERM)
    hear(systemd, "STOPPING=1")
    assert cluster.wait(float(unit["TimeoutStopSec"])) == 0
    wait_until(lambda: not cluster.left_over(), "nothing is left")


def test_its_times_fit_together(unit: configparser.SectionProxy) -> None:
    """systemd waits longer than the drain deadline, and does not start again what was told wrongly."""
    assert float(unit["TimeoutStopSec"]) > 30
    assert unit["Type"] == "notify"
    assert {"2", "3"} <= set(unit["RestartPreventExitStatus"].split())
