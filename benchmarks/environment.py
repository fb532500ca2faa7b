"""What a reader must know of the machine and of the versions; never its name or a path."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

from benchmarks.install import NODE, NODE_PATH, NODE_PEERS, PYTHON

PACKAGES: Final = (
    "Flask", "Werkzeug", "gevent", "httptools", "redis", "hiredis", "msgspec", "gunicorn", "gunicorn_h1c",
    "granian", "uWSGI", "bjoern", "waitress", "Flask-Session", "Flask-Caching", "Flask-SSE",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """The environment of a run."""
    return {
        "cpu": cpu_model(Path("/proc/cpuinfo").read_text()),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": _version([str(PYTHON), "--version"]),
        "redis": _version(["redis-server", "--version"]),
        "node": _version(["node", "--version"], NODE_PATH),
        "wrk": _version(["wrk", "--version"]),
        "packages": python_packages() | _node_packages(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def seen_since(described: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What a run adds to the description: how long it took, and how busy the machine was at most."""
    highest = max(described.get("load_average_highest", 0.0), round(os.getloadavg()[0], 2))
    return {"minutes": round(seconds / 60, 1), "load_average_highest": highest}


def cpu_model(cpuinfo: str) -> str:
    """The name of the processor, from /proc/cpuinfo."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _version(command: list[str], path: str | None = None) -> str:
    """The first version number a program prints."""
    program = shutil.which(command[0], path=path)
    if program is None:
        return "missing"
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return found.group(0) if found else "unknown"


def python_packages() -> dict[str, str]:
    """The versions of the Python packages that matter, by their usual names."""
    command = [str(PYTHON), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    installed = {each["name"].lower(): each["version"] for each in json.loads(done.stdout)}
    return {name: installed[name.lower()] for name in PACKAGES if name.lower() in installed}


def _node_packages() -> dict[str, str]:
    versions = {}
    for name in NODE_PEERS:
        manifest = NODE / "node_modules" / name / "package.json"
        if manifest.exists():
            versions["redis (node)" if name == "redis" else name] = json.loads(manifest.read_text())["version"]
    return versions
