"""Make .bench/: a venv and a node_modules with the peers at their current releases.

Each peer is installed by itself, so that one that cannot be built takes no other with it; it is then named as left
out, with the reason, in every result. No version is pinned in advance, for a comparison with last year's peers is
worth nothing; the versions found are part of each result, and stay until `rm -rf .bench`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

from benchmarks import HOME, ROOT

PYTHON: Final = HOME / "venv" / "bin" / "python"
NODE: Final = HOME / "node"
LEFT_OUT: Final = HOME / "left-out.json"
STAMP: Final = HOME / "installed"
DEADLINE: Final = 600.0
"""Seconds for one installer: uwsgi and bjoern are compiled."""

OURS: Final = ("--editable", f"{ROOT}[fast,metrics]", "psutil", "py-spy")
PYTHON_PEERS: Final[dict[str, tuple[str, ...]]] = {
    "gunicorn": ("gunicorn[gevent]",),
    # gunicorn[fast] may ask for a release of its parser that is not published; gunicorn takes any from 0.4.1 on.
    "gunicorn's C parser": ("gunicorn_h1c",),
    "granian": ("granian",),
    "uwsgi": ("uwsgi",),
    "bjoern": ("bjoern",),
    "waitress": ("waitress",),
    "Flask-Session, Flask-Caching, Flask-SSE": ("Flask-Session", "Flask-Caching", "Flask-SSE"),
}
NODE_PEERS: Final = ("express", "express-session", "connect-redis", "redis", "pm2")
NODE_PATH: Final = f"{NODE / 'node_modules' / 'node' / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
"""Where `node` is found: a distribution's is often years behind, so npm's package of the current one comes first."""


def install() -> None:
    """Install what is missing; a second call does nothing, but tries again what could not be installed."""
    newest = max(path.stat().st_mtime for path in (ROOT / "pyproject.toml", Path(__file__)))
    if STAMP.exists() and STAMP.stat().st_mtime > newest and not left_out():
        return
    HOME.mkdir(exist_ok=True)
    absent: dict[str, str] = {}
    if not PYTHON.exists():
        venv.create(PYTHON.parent.parent, with_pip=True)
    print("installing sharedcluster and its peers into .bench/", file=sys.stderr)
    _pip(*OURS, check=True)
    for peer, packages in PYTHON_PEERS.items():
        reason = _pip(*packages)
        if reason:
            absent[peer] = reason
    absent |= _install_node()
    LEFT_OUT.write_text(json.dumps(absent, indent=2) + "\n")
    for peer, reason in absent.items():
        print(f"left out: {peer}: {reason}", file=sys.stderr)
    STAMP.touch()


def left_out() -> dict[str, str]:
    """The peers that could not be installed, and why."""
    read: dict[str, str] = json.loads(LEFT_OUT.read_text()) if LEFT_OUT.exists() else {}
    return read


def _pip(*packages: str, check: bool = False) -> str:
    """Install; returns the reason if that failed."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    reason = _run(command)
    if reason and check:
        raise SystemExit(f"benchmarks: sharedcluster itself could not be installed: {reason}")
    return reason


def _install_node() -> dict[str, str]:
    if not (shutil.which("node") and shutil.which("npm")):
        return dict.fromkeys(("node", "pm2"), "node and npm are not on PATH")
    NODE.mkdir(exist_ok=True)
    manifest = NODE / "package.json"
    if not manifest.exists():
        manifest.write_text('{"private": true}\n')
    absent = {}
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund"]
    if reason := _run([*command, "node@latest"], NODE):
        absent["the current release of Node, in its place the one on PATH"] = reason
    if reason := _run([*command, *(f"{name}@latest" for name in NODE_PEERS)], NODE):
        absent |= dict.fromkeys(("node", "pm2"), reason)
    return absent


def _run(command: list[str], folder: Path = HOME) -> str:
    """Run an installer; returns the reason if it failed."""
    try:
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"PATH": NODE_PATH}, capture_output=True, text=True,
            timeout=DEADLINE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"was not installed within {DEADLINE:.0f} s"
    return why(done.stdout + done.stderr) if done.returncode else ""


def why(text: str) -> str:
    """The line of an installer's output that says why it failed, without paths of this machine."""
    lines = [line.strip() for line in text.splitlines() if "error" in line.lower() and "note:" not in line]
    compiler = [line for line in lines if "fatal error" in line]  # says more than what came of it
    words = (compiler or lines or ["the installer gave no reason"])[-1].split()
    return " ".join(word if "/" not in word else Path(word).name for word in words)[:200]
