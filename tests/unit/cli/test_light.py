"""Reading verbs answer at once: what they import is seen in a process of its own, not measured by a clock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("flask", "gevent", "redis", "werkzeug", "rich", "httptools", "asyncio", "ssl", "yaml", "multiprocessing")


@pytest.mark.parametrize("verb", ["--help", "list", "list --json", "logs --no-follow", "save", "describe x", "stop x"])
def test_a_reading_verb_imports_nothing_heavy(tmp_path: Path, verb: str) -> None:
    """No Flask, no Redis, no gevent, no rich."""
    program = (
        "import sys\nfrom sharedcluster.cli import main\n"
        f"try: main({verb.split()!r})\nexcept SystemExit: pass\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    env = {**os.environ, "SHAREDCLUSTER_RUNTIME_DIR": str(tmp_path / "run"), "HOME": str(tmp_path),
           "SHAREDCLUSTER_STATE_DIR": str(tmp_path / "state")}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["HEAVY []"], done.stderr
