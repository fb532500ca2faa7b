"""Run wrk and read what it saw."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Final

from benchmarks.load.outcome import Outcome

SCRIPT: Final = Path(__file__).with_name("report.lua")


class WrkMissingError(RuntimeError):
    """wrk is not installed."""


def parse(output: str, client_cpu: float) -> Outcome:
    """What one run saw, from the line that report.lua wrote.

    Raises:
        ValueError: The line is not there.
    """
    line = next((line for line in output.splitlines() if line.startswith("JSON ")), None)
    if line is None:
        raise ValueError(f"wrk gave no summary: {output[-300:]}")
    seen = json.loads(line[5:])
    return Outcome(
        requests=seen["requests"] - seen["status"],
        seconds=seen["seconds"],
        failed=seen["status"] + seen["timeout"] + seen["connect"] + seen["write"],
        dropped=seen["read"],
        p50=seen["p50"] / 1e6,
        p99=seen["p99"] / 1e6,
        highest=seen["max"] / 1e6,
        client_cpu=client_cpu,
        received=seen["bytes"],
    )


def run(
    url: str,
    *,
    seconds: float,
    connections: int,
    method: str = "GET",
    body_bytes: int = 0,
    new_connection: bool = False,
) -> Outcome:
    """Load `url` with `connections` closed loops, for whole `seconds`: wrk knows no parts.

    Raises:
        WrkMissingError: There is no wrk on PATH.
    """
    if shutil.which("wrk") is None:
        raise WrkMissingError("wrk is not on PATH (Debian: apt-get install wrk)")
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "5s", "-s", str(SCRIPT)]
    command += ["-H", "Connection: close"] if new_connection else []
    command += [url, "--", method, str(body_bytes)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return parse(done.stdout, spent)
