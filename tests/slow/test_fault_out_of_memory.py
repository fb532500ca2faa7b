"""The kernel's own out-of-memory kill, in a control group with a memory limit. Needs root and a writable cgroup."""

from __future__ import annotations

import http.client
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import StartCluster
from tests.strict_clients import Client, Crowd
from tests.waiting import wait_until

APP = "tests.apps.faults:app"
LIMIT = 300 << 20
"""Bytes for the cluster: two workers and the primary need about 100 MB."""


def _here(controller: str) -> Path:
    """The folder of this process's group; `controller` is "" for v2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return Path("/sys/fs/cgroup") / controller / path.lstrip("/")
    raise OSError("no such controller")


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A control group with a memory limit and no swap, v1 or v2, below the one this process is in."""
    reasons = []
    for controller, settings in (
        ("memory", {"memory.limit_in_bytes": LIMIT, "memory.memsw.limit_in_bytes": LIMIT}),
        ("", {"memory.max": LIMIT, "memory.swap.max": 0}),
    ):
        try:
            group = _here(controller) / f"sharedcluster-test-{os.getpid()}"
            group.mkdir()
        except OSError as error:
            reasons.append(str(error))
            continue
        try:
            for number, (name, value) in enumerate(settings.items()):
                with suppress(*([OSError] if number else [])):  # a kernel may be built without accounting of swap
                    (group / name).write_text(str(value))
        except OSError as error:
            reasons.append(str(error))
            group.rmdir()
            continue
        yield group
        # The cluster's last processes are being reaped.
        wait_until(partial(_removed, group), "the group is empty")
        return
    pytest.skip(f"no control group with a memory limit can be made here: {'; '.join(reasons)}")


def _removed(group: Path) -> bool:
    for pid in (group / "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), 9)
    group.rmdir()
    return True


@pytest.mark.parametrize("options", [(), ("--preload",)])
def test_the_kernel_kills_a_worker(limited_group: Path, start_cluster: StartCluster, options: tuple[str, ...]) -> None:
    """A view takes more memory than the group may have: the kernel kills its worker and nobody else, the log says
    out of memory, the worker is replaced, everybody else is answered.
    """
    enter = f'echo $$ > {limited_group}/cgroup.procs && exec "$@"'
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", *options, prefix=("sh", "-c", enter, "sh"))
    workers = {w["pid"] for w in cluster.workers()}
    assert cluster.process is not None
    primary = cluster.process.pid
    port = cluster.port
    with Crowd(*[Client(("127.0.0.1", port), keep_alive=False, pause=0.05) for _ in range(8)]) as crowd:
        wait_until(crowd.all_got(3), "all are served")
        start = time.monotonic()
        with pytest.raises((OSError, http.client.HTTPException)):
            cluster.get("/grow/600", timeout=60)
        wait_until(lambda: "out of memory, says the kernel" in cluster.output(), "the log names it")
        wait_until(lambda: len(cluster.workers()) == 2 and cluster.is_ready(), "it is replaced", deadline=30)
        print(f"killed and replaced after {time.monotonic() - start:.1f} s")
        wait_until(crowd.all_got(5), "all are served")
    print(f"answered {crowd.answered}, lost {crowd.lost}")
    assert len({w["pid"] for w in cluster.workers()} & workers) == 1
    assert (cluster.status()["pid"], cluster.status()["counters"]["restarts"]) == (primary, 1)
    # A client whose request its worker had read loses it; a worker reads one at a time, and this one stood still.
    assert len(crowd.lost) <= 4
    assert crowd.refused == 0
    assert cluster.output().count("out of memory, says the kernel") == 1
