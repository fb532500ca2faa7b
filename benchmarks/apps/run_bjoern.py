"""bjoern has no master: the usual way to more than one core is to fork with SO_REUSEPORT, one loop per process."""

from __future__ import annotations

import importlib
import os
import signal
import sys

import bjoern


def main() -> None:
    """`run_bjoern.py MODULE:NAME PORT WORKERS`."""
    target, port, workers = sys.argv[1:4]
    module, _, name = target.partition(":")
    children = []
    for _ in range(int(workers)):
        pid = os.fork()
        if pid == 0:
            app = getattr(importlib.import_module(module), name)
            bjoern.run(app, "127.0.0.1", int(port), reuse_port=True)
            os._exit(0)
        children.append(pid)

    def end(_number: int, _frame: object) -> None:
        for pid in children:
            os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    for pid in children:
        os.waitpid(pid, 0)


main()
