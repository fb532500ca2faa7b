"""The primary of a kept application, as its attendant starts it: `python -m sharedcluster.operating.attended NAME FD`.

It is `sharedcluster run` with two differences: its settings come from the record, and what becomes of it is told to
the attendant through a pipe, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import Any

from sharedcluster.cluster import events
from sharedcluster.cluster.primary import Primary
from sharedcluster.cluster.worker_handle import ExitReason, WorkerHandle
from sharedcluster.control.protocol import runtime_folder
from sharedcluster.errors import AppLoadError, UserError
from sharedcluster.log import logger
from sharedcluster.operating import records
from sharedcluster.starting import start


class Report:
    """The pipe to the attendant. It is never waited for: an attendant that is stopped must not stop a primary.

    It stays open when this program is replaced (USR2), so that the new one reports over it too.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_blocking(fd, False)
        os.set_inheritable(fd, True)

    def say(self, **facts: Any) -> None:
        """Tell the attendant."""
        with suppress(OSError):
            os.write(self._fd, json.dumps({"pid": os.getpid(), **facts}).encode() + b"\n")

    def observe(self, primary: Primary) -> None:
        """Tell what the attendant wants to know of a cluster."""
        path = primary.config.control or str(runtime_folder() / f"{primary.name}.sock")
        self.say(control=os.path.abspath(path))
        primary.events.on(events.READY, lambda *facts: self.say(ready=facts[-1]))
        primary.events.on(events.EXIT, self._ended)

    def _ended(self, worker: WorkerHandle, reason: ExitReason) -> None:
        if worker.load_failure:
            what, traceback = worker.load_failure
            self.say(failure=f"{what}\n{traceback}".rstrip()[:16384])
        elif not reason.asked:
            how = f"signal {reason.signal}" if reason.signal else f"code {reason.code}"
            self.say(died=f"worker {worker.id} (slot {worker.slot}) ended with {how}")


def main(arguments: list[str]) -> int:
    """Be the primary; returns its exit code."""
    name, fd = arguments
    report = Report(int(fd))
    try:
        record = records.load(name)
        if record is None:
            report.say(error=f"There is no record of {name}.", exit_code=2)
            return 2
        return start(record.spec.resolve(records.made(records.logs_folder())), report.observe)
    except UserError as error:
        traceback = error.traceback if isinstance(error, AppLoadError) else ""
        report.say(error=str(error), exit_code=error.exit_code, traceback=traceback[-16384:])
        logger.error("%s", "\n".join(filter(None, [traceback, str(error)])))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
