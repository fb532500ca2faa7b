"""Kept applications for tests: the commands with private folders, and everything they started is gone afterwards."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from sharedcluster.control import client
from sharedcluster.errors import SharedClusterError
from sharedcluster.operating.rotation import rotated_files
from tests.cluster_process import ROOT, Answer, request

APP = """
import os, sys
from flask import Flask
app = Flask(__name__)

@app.get("/")
def index():
    return {{"version": {version!r}, "stage": os.environ.get("STAGE", ""), "pid": os.getpid()}}

@app.get("/print/<int:first>/<int:count>")
def show(first, count):
    for number in range(first, first + count):
        print("number", number)
    return "printed"

@app.get("/exit/<int:code>")
def leave(code):
    os._exit(code)
"""


class Desk:
    """A folder with applications, and the environment in which the commands find nothing else."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sc-desk-"))
        self.state = self.folder / "state"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SHAREDCLUSTER_", "REDIS_"))}
        self.env |= {
            "SHAREDCLUSTER_RUNTIME_DIR": str(self.folder / "run"),
            "SHAREDCLUSTER_STATE_DIR": str(self.state),
            "PYTHONPATH": str(ROOT),
        }
        self.write("shop.py", APP.format(version="one"))

    def write(self, name: str, text: str) -> Path:
        """A file in the folder. New code must have another length: Python tells a file's age by whole seconds."""
        path = self.folder / name
        path.write_text(text)
        return path

    def cli(self, *arguments: str, ok: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the folder; with `ok` it must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "sharedcluster", *arguments],
            cwd=self.folder, env={**self.env, **env}, capture_output=True, text=True, timeout=50, check=False,
        )  # fmt: skip
        assert not ok or done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def start(self, *arguments: str) -> None:
        """Start shop:app with one worker and no Redis, and whatever is given."""
        self.cli("start", "shop:app", "--name", "shop", "-w", "1", "--port", "0", "--redis", "none", *arguments)

    def apps(self) -> dict[str, dict[str, Any]]:
        """What `list --json` says, by name."""
        rows = json.loads(self.cli("list", "--json").stdout)["apps"]
        return {row["name"]: row for row in rows}

    def status(self, name: str = "shop") -> dict[str, Any]:
        """The status of a running application, asked without a command; OSError if it does not answer."""
        try:
            facts: dict[str, Any] = client.call(self.folder / "run" / f"{name}.sock", "status")["status"]
        except SharedClusterError as error:
            raise OSError(str(error)) from error
        return facts

    def get(self, path: str, name: str = "shop") -> Answer:
        """Ask an application."""
        port = int(self.status(name)["listeners"][0]["address"].rpartition(":")[2])
        return request(port, "GET", path)

    def log(self, stream: str = "err", name: str = "shop") -> str:
        """A log file."""
        return (self.state / "logs" / f"{name}.{stream}.log").read_text()

    def recorded(self, name: str = "shop") -> dict[str, Any]:
        """What the attendant wrote down."""
        facts: dict[str, Any] = json.loads((self.state / "apps" / name / "state.json").read_text())
        return facts

    def close(self) -> None:
        """End what still runs, known by its folder."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SHAREDCLUSTER_STATE_DIR") == str(self.state):
                    process.send_signal(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def read_logs(path: Path) -> list[bytes]:
    """The content of a log file's rotated files and of itself, oldest first; one may be compressed meanwhile."""
    return [_content(each) for each in [*rotated_files(str(path)), path]]


def _content(path: Path) -> bytes:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return _content(path.with_name(path.name + ".gz"))
