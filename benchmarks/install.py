"""Make .bench/: a venv and a node_modules with the peers at their current releases.

Each peer is installed by itself, so that one that cannot be built takes no other with it; it is then named as left
out, with the reason, in every result. No version is pinned in advance, for a comparison with last year's peers is
worth nothing; the versions found are part of each result, and stay until `rm -rf .bench`.
"""

from __future__ import annotations

import json
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

OURS: Final = ("--editable", f"{ROOT}[fast,metrics]", "psutil", "py-spy")
PYTHON_PEERS: Final[dict[str, tuple[str, ...]]] = {
    "gunicorn": ("gunicorn[gevent]",),
    "granian": ("granian",),
    "uwsgi": ("uwsgi",),
    "bjoern": ("bjoern",),
    "waitress": ("waitress",),
    "Flask-Session, Flask-Caching, Flask-SSE": ("Flask-Session", "Flask-Caching", "Flask-SSE"),
}
NODE_PEERS: Final = ("express", "express-session", "connect-redis", "redis", "pm2")


def install() -> None:
    """Install what is missing; a second call does nothing."""
    if STAMP.exists() and STAMP.stat().st_mtime > (ROOT / "pyproject.toml").stat().st_mtime:
        return
    HOME.mkdir(exist_ok=True)
    left_out: dict[str, str] = {}
    if not PYTHON.exists():
        venv.create(PYTHON.parent.parent, with_pip=True)
    print("installing sharedcluster and its peers into .bench/", file=sys.stderr)
    _pip(*OURS, check=True)
    for peer, packages in PYTHON_PEERS.items():
        reason = _pip(*packages)
        if reason:
            left_out[peer] = reason
    left_out |= _install_node()
    LEFT_OUT.write_text(json.dumps(left_out, indent=2) + "\n")
    for peer, reason in left_out.items():
        print(f"left out: {peer}: {reason}", file=sys.stderr)
    STAMP.touch()


def left_out() -> dict[str, str]:
    """The peers that could not be installed, and why."""
    read: dict[str, str] = json.loads(LEFT_OUT.read_text()) if LEFT_OUT.exists() else {}
    return read


def _pip(*packages: str, check: bool = False) -> str:
    """Install; returns the reason if that failed."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and check:
        raise SystemExit(f"benchmarks: sharedcluster itself could not be installed:\n{done.stderr}")
    return "" if done.returncode == 0 else _last_error(done.stderr)


def _install_node() -> dict[str, str]:
    if not (shutil.which("node") and shutil.which("npm")):
        return dict.fromkeys(("node", "pm2"), "node and npm are not on PATH")
    NODE.mkdir(exist_ok=True)
    manifest = NODE / "package.json"
    if not manifest.exists():
        manifest.write_text('{"private": true}\n')
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", *NODE_PEERS]
    done = subprocess.run(command, cwd=NODE, capture_output=True, text=True, check=False)
    return {} if done.returncode == 0 else dict.fromkeys(("node", "pm2"), _last_error(done.stderr))


def _last_error(text: str) -> str:
    """The line that says why, without paths of this machine."""
    lines = [line.strip() for line in text.splitlines() if "rror" in line] or ["the installer gave no reason"]
    return " ".join(word if "/" not in word else Path(word).name for word in lines[-1].split())[:200]
