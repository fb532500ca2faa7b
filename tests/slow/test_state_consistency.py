"""The consistency checker finds nothing in the product, and finds something as soon as one guard is taken out."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.cluster_process import ROOT
from tests.redis_process import find_redis_server
from tests.slow.consistency_app import GUARDS


def run_module(name: str, *options: str, seconds: int) -> tuple[int, str]:
    """Run a program of this folder; its exit code and what it printed."""
    find_redis_server()
    command = [sys.executable, "-m", f"tests.slow.{name}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    return done.returncode, done.stdout + done.stderr


def run_checker(*options: str, seconds: int) -> tuple[int, str]:
    """Run the checker for at most so many seconds."""
    return run_module("consistency", "--seconds", str(seconds), *options, seconds=seconds + 120)


# fmt: off
FAULTS = (
    "kill worker", "pause worker", "reload", "restart redis", "stop redis", "pause clients", "kill subscribers",
    "cut links", "black hole",
)
# fmt: on


@pytest.mark.timeout(400)
def test_no_violation_with_all_faults() -> None:
    """Workers killed, paused, reloaded; Redis killed, stopped, paused, cut off, swallowed: nothing is violated."""
    code, text = run_checker("--operations", "120000", seconds=300)
    assert code == 0, text
    assert [name for name in FAULTS if not re.search(rf"{name} \d", text)] == [], text


@pytest.mark.timeout(300)
def test_lost_invalidations_do_not_reach_a_sequential_client() -> None:
    """Half of the messages about sessions go unheard, workers are killed: each client still reads its own writes."""
    code, text = run_checker("--operations", "15000", "--lose", "0.5", "--faults", "kill worker", seconds=60)
    assert code == 0, text


# What has to happen so that the guard is needed at all.
NEEDS: dict[str, tuple[str, ...]] = {
    "cookie-version": ("--lose", "0.5", "--faults", "none"),
    "trust": ("--pause", "1", "--faults", "black hole"),
    # A stale copy shows only if nothing else goes wrong for longer than the bound.
    "forget-after-gap": ("--pause", "5", "--faults", "kill subscribers"),
    "catching-up": ("--faults", "kill subscribers"),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("guard", sorted(GUARDS))
def test_each_guard_is_needed_and_missed(guard: str) -> None:
    """Without it the checker finds a violation; so its silence means something."""
    needs = NEEDS.get(guard, ("--faults", "none"))
    # What is found at the end only, from whole histories, does not end a run early.
    seconds = 40 if guard in ("compare", "catching-up") else 120
    code, text = run_checker("--operations", "1000000", "--guard-off", guard, *needs, seconds=seconds)
    assert code == 1, text
    assert not re.search(r"^  (errors|checker):", text, re.MULTILINE), text


@pytest.mark.timeout(200)
def test_every_client_hears_every_message_once_across_a_worker_kill() -> None:
    """Four workers, a hundred SSE clients each, one worker killed on the way: nothing lost or twice, in order."""
    code, text = run_module("consistency_fan_out", "--messages", "300", "--rate", "20", seconds=150)
    assert code == 0, text


@pytest.mark.timeout(200)
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_an_outage_of_redis_is_what_the_failure_table_says(how: str) -> None:
    """Ten seconds without Redis under load: 200 or 503 as documented, nothing hangs, afterwards all is as before."""
    code, text = run_module("consistency_outage", "--how", how, seconds=150)
    assert code == 0, text
