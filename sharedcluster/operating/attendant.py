"""The attendant beside each kept application: `python -m sharedcluster.operating.attendant NAME FD`.

It is the parent of the primary and does what a primary must not: it starts the primary again when that was killed,
rotates its log files, reloads it at the times cron gives and when files change, and writes down how it is. Nothing
that serves depends on it: kill it, and the cluster serves on; `list` says that nobody attends it.

Laws:

1. It carries nothing: no log line, no connection, no request passes through it.
2. It asks for a reload as an operator would, through the control socket, so a reload waits for readiness and a cron
   job never stops all workers at once.
3. A primary that ended because it was told to, or because it cannot serve (exit codes 2 and 3), is left as it is. One
   that was killed or fell over is started again, with a delay that grows and within a budget.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from sharedcluster.cluster.molds import become_subreaper
from sharedcluster.cluster.supervision import CRASH_BUDGET, DELAY_FACTOR, FIRST_DELAY, FORGIVEN_AFTER, MAX_DELAY
from sharedcluster.control import client
from sharedcluster.errors import SharedClusterError, UserError
from sharedcluster.log import logger, set_up
from sharedcluster.log_files import LogFiles
from sharedcluster.operating import records
from sharedcluster.operating.records import ProcessId, Record, State
from sharedcluster.operating.rotation import Rotator
from sharedcluster.operating.spec import log_paths, next_time
from sharedcluster.operating.watching import Watcher

FORWARDED: Final = (
    signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
)  # fmt: skip
STOPPING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
RESET: Final = signal.SIGALRM
"""`sharedcluster reset`: forget how often the primary was started again."""
HOPELESS_CODES: Final = (2, 3)
"""Exit codes that starting again does not mend: the settings are wrong, or the application does not work."""
WATCH_INTERVAL: Final = 0.5
LAST_DEATH: Final = "last worker that died"


class Attendant:
    """One application, from the first start of its primary to the last end.

    Args:
        record: The application.
        outcome_fd: The pipe on which the command waits for the outcome of the first start.
    """

    def __init__(self, record: Record, outcome_fd: int) -> None:
        self._name = record.name
        self._spec = record.spec
        self._outcome_fd = outcome_fd
        self._started_at = time.time()
        self._state = State(
            state="starting",
            attendant=ProcessId.of(os.getpid()),
            started_at=self._started_at,
            restarts=record.state.restarts,
            cpu_seconds=record.state.cpu_seconds,
        )
        self._primary = 0
        self._successor = 0
        self._report_fd = -1
        self._unread = b""
        self._ready_since: float | None = None
        self._was_ready = False
        self._stopping = False
        self._crashes = 0
        self._start_at: float | None = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._wake, wake_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        for number in (*FORWARDED, RESET, signal.SIGCHLD):
            signal.signal(number, lambda _number, _frame: None)
        become_subreaper()  # a primary that replaced itself is still our child when the old one has left
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # a lease that is broken while it is held (rotation)
        self._selector.register(self._wake, selectors.EVENT_READ, self._on_signals)
        self._files = LogFiles(*log_paths(self._spec, records.logs_folder()))
        self._rotator = Rotator((self._files.out, self._files.err), self._spec.upkeep, self._reopen)
        self._watcher = self._make_watcher()
        self._next_watch = 0.0
        self._next_cron = self._after_cron()

    def run(self) -> int:
        """Attend until the application is stopped or errored; returns the exit code."""
        self._write()
        while self._state.state not in ("stopped", "errored"):
            if self._start_at is not None and time.monotonic() >= self._start_at:
                self._start()
            wait = self._turn(time.time())
            if self._start_at is not None:
                wait = min(wait, max(0.0, self._start_at - time.monotonic()))
            for key, _ in self._selector.select(wait):
                key.data()
        self._tell({"ok": False, "error": self._state.failure, "exit_code": self._state.exit_code or 1})
        return 0

    # -- what is due -----------------------------------------------------------------------------------------------

    def _turn(self, now: float) -> float:
        wait = self._rotator.turn(now)
        if self._watcher and now >= self._next_watch:
            self._next_watch = now + WATCH_INTERVAL
            if self._watcher.changed() and self._ready_since:
                self._reload("a file changed")
        if self._watcher:
            wait = min(wait, WATCH_INTERVAL)
        if self._next_cron is not None and now >= self._next_cron:
            self._next_cron = self._after_cron()
            if self._ready_since:
                self._reload("cron_restart")
        return wait

    def _after_cron(self) -> float | None:
        expression = self._spec.upkeep.cron_restart
        # Cron is about the clock on the wall, so local time without a zone is what is meant.
        return next_time(expression, datetime.now()).timestamp() if expression else None

    def _make_watcher(self) -> Watcher | None:
        upkeep = self._spec.upkeep
        paths = [os.path.join(self._spec.cwd, path) for path in upkeep.watch]
        return Watcher(paths, upkeep.ignore_watch) if paths else None

    def _reload(self, why: str) -> None:
        try:
            client.call(Path(self._state.control), "reload", wait=False, timeout=2.0)
            logger.info("reloading: %s", why)
        except (SharedClusterError, OSError) as error:
            logger.error("%s asked for a reload, which failed: %s", why, error)

    def _reopen(self) -> bool:
        self._set_up_log()
        if self._primary and not self._ready_since:
            return False  # before its loop runs, the signal would end it
        self._signal(signal.SIGUSR1)
        return True

    def _set_up_log(self) -> None:
        set_up("attendant", level="info", style="text", files=self._files)

    # -- the primary -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._start_at = None
        record = records.load(self._name)  # the number of workers may have been changed since
        self._spec = record.spec if record else self._spec
        read, write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(read, False)
        variables = {**self._spec.variables, "SHAREDCLUSTER_STATE_DIR": str(records.state_folder())}
        child = subprocess.Popen(
            [sys.executable, "-m", "sharedcluster.operating.attended", self._name, str(write)],
            cwd=self._spec.cwd, env=variables, stdin=subprocess.DEVNULL, pass_fds=(write,),
        )  # fmt: skip
        os.close(write)
        self._primary, child.returncode = child.pid, 0  # it is waited for in `_reap`
        self._report_fd, self._unread = read, b""
        self._selector.register(read, selectors.EVENT_READ, self._on_report)
        if self._was_ready:
            self._state = replace(self._state, restarts=self._state.restarts + 1)
        self._change(state="starting", primary=ProcessId.of(self._primary))

    def _on_report(self) -> None:
        try:
            data = os.read(self._report_fd, 65536)
        except BlockingIOError:
            return
        if not data:
            self._selector.unregister(self._report_fd)
            os.close(self._report_fd)
            self._report_fd = -1
            return
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._on_fact(json.loads(line))

    def _on_fact(self, fact: dict[str, Any]) -> None:
        if "control" in fact:
            self._change(control=fact["control"])
        elif "ready" in fact and fact["pid"] != self._primary:
            self._successor = fact["pid"]  # of an upgrade; the old primary drains and leaves
        elif "ready" in fact:
            self._ready_since = time.monotonic()
            self._was_ready = True
            self._change(state="online")
            self._tell({"ok": True, "workers": fact["ready"]})
        elif "error" in fact:
            traceback = fact.get("traceback") or ""
            self._change(failure="\n".join(filter(None, [fact["error"], traceback])), exit_code=fact["exit_code"])
        elif "failure" in fact:
            self._change(failure=fact["failure"])
        elif "died" in fact:
            self._change(notes={**self._state.notes, LAST_DEATH: fact["died"]})

    def _on_signals(self) -> None:
        with suppress(BlockingIOError):
            for number in os.read(self._wake, 4096):
                if number == signal.SIGCHLD:
                    self._reap()
                elif number == RESET:
                    self._change(restarts=0, ended="", notes={})
                elif number in FORWARDED:
                    self._on_signal(signal.Signals(number))

    def _on_signal(self, number: signal.Signals) -> None:
        if number in STOPPING:
            self._stopping = True
            if not self._primary:
                self._change(state="stopped")
        self._signal(number)

    def _signal(self, number: signal.Signals) -> None:
        for pid in (self._successor, self._primary):
            if pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._primary:
                self._ended(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime)
            elif pid == self._successor:
                self._successor = 0
            else:
                self._rotator.reaped(pid)

    def _ended(self, code: int, cpu_seconds: float) -> None:
        if self._report_fd >= 0:  # its last words
            with suppress(KeyError):
                self._on_report()
        if self._successor:
            self._primary, self._successor = self._successor, 0
            self._change(primary=ProcessId.of(self._primary), cpu_seconds=self._state.cpu_seconds + cpu_seconds)
            return
        served = 0.0 if self._ready_since is None else time.monotonic() - self._ready_since
        self._primary, self._ready_since = 0, None
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        self._state = replace(
            self._state, primary=None, ended=how, ended_at=time.time(), exit_code=code,
            cpu_seconds=self._state.cpu_seconds + cpu_seconds,
        )  # fmt: skip
        self._crashes = 1 if served >= FORGIVEN_AFTER else self._crashes + 1
        if code == 0 or self._stopping:
            self._change(state="stopped", failure="" if code == 0 else self._state.failure)
        elif not self._was_ready or code in HOPELESS_CODES or self._crashes > CRASH_BUDGET:
            self._change(state="errored", failure=self._state.failure or self._reason(code, how))
        elif not self._spec.upkeep.autorestart:
            self._change(state="errored", failure=f"The primary was {how}, and autorestart is off.")
        else:
            delay = min(FIRST_DELAY * DELAY_FACTOR ** (self._crashes - 1), MAX_DELAY)
            self._start_at = time.monotonic() + delay
            logger.error("the primary was %s: starting it again in %.1f s", how, delay)
            self._change(state="restarting")

    def _reason(self, code: int, how: str) -> str:
        """Why it is errored, where no traceback of the application's is known."""
        if not self._was_ready:
            return f"The primary {how} before it was ready."
        last = self._state.notes.get(LAST_DEATH, "")
        return f"Its workers kept dying; the last one: {last}." if code == 3 and last else f"The primary {how}."

    # -- what others see -------------------------------------------------------------------------------------------

    def _change(self, **changes: Any) -> None:
        self._state = replace(self._state, **changes)
        self._write()

    def _write(self) -> None:
        with suppress(OSError):  # a full disk must not end the attendant; the commands ask the primary as well
            records.save_state(self._name, self._state)

    def _tell(self, outcome: dict[str, Any]) -> None:
        """Answer the command that started us, once."""
        fd, self._outcome_fd = self._outcome_fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.write(fd, json.dumps(outcome).encode() + b"\n")
                os.close(fd)

    def fail(self, error: UserError) -> int:
        """It could not even begin."""
        self._change(state="errored", failure=str(error), exit_code=error.exit_code)
        self._tell({"ok": False, "error": str(error), "exit_code": error.exit_code})
        return 1


def main(arguments: list[str]) -> int:
    """Be the attendant; returns the exit code."""
    name, fd = arguments
    os.set_inheritable(int(fd), False)
    record = records.load(name)
    if record is None:
        return 2
    attendant = Attendant(record, int(fd))
    try:
        attendant._set_up_log()
    except UserError as error:
        return attendant.fail(error)
    return attendant.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
