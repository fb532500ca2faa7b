"""The keeper's process: starts the private server, starts it again, ends it with the cluster (laws: `private`)."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import stat
import time
from collections.abc import Iterator
from typing import NoReturn

from sharedcluster.redis_server.address import RedisAddress
from sharedcluster.redis_server.choice import RedisChoice
from sharedcluster.redis_server.interview import ping, readable

log = logging.getLogger("sharedcluster.redis")

# A person at a terminal may end the cluster with any of these; the keeper outlives them all.
_SIGNALS_OF_THE_CLUSTER = (
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGPIPE,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGALRM,
)
_SIGNALS_OF_THE_SERVER = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

# fakeredis behind a unix socket. Two things it does not do by itself: its table of clients is keyed by the peer's
# address, which is empty for all of them; and it hangs up after an error reply, such as NOSCRIPT.
_FAKE_SERVER = """
import itertools, os, socket, sys
from fakeredis import TcpFakeServer
from redis import ResponseError
class Server(TcpFakeServer):
    address_family = socket.AF_UNIX
    numbers = itertools.count()
    def get_request(self):
        return super().get_request()[0], ("unix", next(self.numbers))
os.umask(0o077)
if os.path.exists(sys.argv[1]):
    os.unlink(sys.argv[1])
server = Server(sys.argv[1])
class Handler(server.RequestHandlerClass):
    def setup(self):
        super().setup()
        read_response = self.current_client.read_response
        def read_reply():
            try:
                return read_response()
            except ResponseError as error:
                return error
        self.current_client.read_response = read_reply
server.RequestHandlerClass = Handler
server.serve_forever()
"""


class Keeper:
    """The keeper's own view, in its own process: one server, one lifeline."""

    def __init__(
        self,
        choice: RedisChoice,
        folder: str,
        *,
        lifeline: int,
        report: int,
        start_timeout: float,
        is_first: bool,
    ) -> None:
        self.choice = choice
        self.folder = folder
        self.lifeline = lifeline
        self.report = report
        self.start_timeout = start_timeout
        self.is_first = is_first
        self.socket_path = f"{folder}/redis.sock"
        self.log_path = f"{folder}/redis.log"
        self.server_pid = 0
        self.ending = "with its keeper"

    def live(self) -> NoReturn:
        """The life of the process; nothing of the one it was forked from runs after it."""
        try:
            self._leave_the_cluster()
            if not self.is_first:
                self._supervise()
            elif self._start_server():
                self._tell("ok")
                self._supervise()
            else:
                self._tell(self._last_words())
        except BaseException:
            log.exception("[BUG] the keeper of the private Redis failed")
        finally:
            self._end_server()
            shutil.rmtree(self.folder, ignore_errors=True)
            os._exit(0)

    def _tell(self, words: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # a primary that was killed meanwhile
            os.write(self.report, words.encode())

    def _leave_the_cluster(self) -> None:
        """Own session, own signals, no descriptor but standard streams, log files, lifeline and report."""
        os.setsid()
        signal.set_wakeup_fd(-1)  # it belongs to the primary's loop
        for number in _SIGNALS_OF_THE_CLUSTER:
            signal.signal(number, signal.SIG_IGN)
        for fd in _open_descriptors():
            if fd > 2 and fd not in (self.lifeline, self.report) and _is_not_a_file(fd):
                os.close(fd)
        self.children, wakeup = os.pipe()
        os.set_blocking(self.children, False)
        os.set_blocking(wakeup, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())

    def _supervise(self) -> None:
        """Sleep; start a dead server again, later each time it dies young; return when the lifeline ends."""
        born_at, delay = time.monotonic(), 0.0
        while True:
            if self.server_pid:
                if self._lifeline_ended(None):
                    return
                if not self._server_ended():
                    continue
                delay = 0.0 if time.monotonic() - born_at > 10 else _longer(delay)
            if self._wait_out(delay):
                return
            born_at = time.monotonic()
            if self._start_server():
                log.error(
                    "the private Redis had ended (%s) and was started again, pid %d; sessions, caches and messages "
                    "of this run are gone",
                    self.ending,
                    self.server_pid,
                )
            elif not self._lifeline_ended(0):
                delay = _longer(delay)
                log.error("the private Redis does not start: %s", self._last_words().replace("\n", " | "))

    def _start_server(self) -> bool:
        """Start it and wait until it answers; False if it ended, hung, or the lifeline ended meanwhile."""
        self.server_pid = self._spawn()
        address, deadline = RedisAddress("", path=self.socket_path), time.monotonic() + self.start_timeout
        while not self._lifeline_ended(0.005) and not self._server_ended():
            if ping(address, 1.0):
                return True
            if time.monotonic() > deadline:
                break
        self._end_server()
        return False

    def _spawn(self) -> int:
        from ctypes import CDLL  # here, because it would grow the primary

        prctl = getattr(CDLL(None), "prctl", None)
        command = self._command()
        environ = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
        keeper = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        try:
            if prctl is not None:
                prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != keeper:  # it died before the line above
                os._exit(1)
            self._become_the_server(command, environ)
        finally:
            os._exit(127)

    def _become_the_server(self, command: tuple[str, ...], environ: dict[str, str]) -> None:
        os.umask(0o077)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for number in (*_SIGNALS_OF_THE_CLUSTER, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_THE_SERVER)
        try:
            os.execve(command[0], command, environ)
        except OSError as error:
            os.write(2, f"{command[0]} cannot be executed: {error.strerror}\n".encode())

    def _command(self) -> tuple[str, ...]:
        if self.choice.kind == "fakeredis":
            # -P: a redis.py in the app's folder is not the one that is meant
            return (self.choice.program, "-P", "-c", _FAKE_SERVER, self.socket_path)
        options = {
            "port": "0",
            "unixsocket": self.socket_path,
            "unixsocketperm": "700",
            "dir": self.folder,
            "logfile": self.log_path,
            "save": "",
            "appendonly": "no",
            "maxmemory": "256mb",
            "maxmemory-policy": "volatile-ttl",
        }
        return (self.choice.program, *(word for name, value in options.items() for word in (f"--{name}", value)))

    def _lifeline_ended(self, timeout: float | None) -> bool:
        """Sleep until the lifeline ends (True), a child changes state or `timeout` seconds pass."""
        ready = readable((self.lifeline, self.children), timeout)
        if self.children in ready:
            os.read(self.children, 4096)
        return self.lifeline in ready

    def _wait_out(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._lifeline_ended(left):
                return True
        return False

    def _server_ended(self) -> bool:
        if self.server_pid:
            pid, status = os.waitpid(self.server_pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.ending = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
                self.server_pid = 0
        return not self.server_pid

    def _end_server(self) -> None:
        if self.server_pid:
            os.kill(self.server_pid, signal.SIGKILL)  # there is nothing to save
            os.waitpid(self.server_pid, 0)
            self.server_pid = 0

    def _last_words(self) -> str:
        try:
            with open(self.log_path, errors="replace") as lines:
                return "".join(lines.readlines()[-5:]).rstrip()
        except OSError:
            return ""


def _longer(delay: float) -> float:
    return min(5.0, delay * 2 + 0.1)


def _open_descriptors() -> Iterator[int]:
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        names = [str(fd) for fd in range(3, 1024)]
    yield from sorted(map(int, names))


def _is_not_a_file(fd: int) -> bool:
    """True for sockets, pipes and selectors, through which the primary talks; files and terminals take the log."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False  # closed since it was listed
    return not (stat.S_ISREG(mode) or stat.S_ISCHR(mode))
