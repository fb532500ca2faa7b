"""The Redis of a program's workers, if its settings name one: somebody else's, or a private one for this run."""

from __future__ import annotations

import os
from contextlib import suppress

from sharedcluster import redis_server
from sharedcluster.errors import UserError
from sharedcluster.log import logger
from sharedcluster.program.loops import SelectorLoop


class ProgramRedis:
    """What workers find in SHAREDCLUSTER_REDIS_URL. A private server lives until the last process of the run is gone.

    Args:
        setting: `auto`, a URL, ...; see `redis_server.choose`.
        loop: Where the private server's keeper is watched.

    Raises:
        UserError: There is none to be had.
    """

    def __init__(self, setting: str, loop: SelectorLoop) -> None:
        self.url = ""
        self._loop = loop
        self._private: redis_server.PrivateRedis | None = None
        choice = redis_server.choose(setting, os.environ)
        if choice.warning:
            logger.warning("%s", choice.warning)
        if choice.kind == "url":
            self.url = choice.url or ""
        elif choice.kind != "none":
            self._private = redis_server.PrivateRedis(choice)
            self.url = self._private.start()
            self._watch_keeper(self._private)

    @property
    def lifeline(self) -> tuple[int, ...]:
        """What a worker has to inherit, so that the server outlives the primary as long as there is a worker."""
        return () if self._private is None else (self._private.lifeline_fd,)

    def stop(self) -> None:
        """The last worker is gone."""
        if self._private is not None:
            private, self._private = self._private, None
            private.stop()

    def _watch_keeper(self, private: redis_server.PrivateRedis) -> None:
        with suppress(OSError):  # a kernel without pidfd: nobody notices, and the shared state says that Redis is away
            pidfd = os.pidfd_open(private.keeper_pid)
            watch = self._loop.watch(pidfd, lambda: ended())

        def ended() -> None:
            watch.close()
            os.close(pidfd)
            if self._private is not private:
                return
            with suppress(ChildProcessError):
                os.waitpid(private.keeper_pid, 0)
            try:
                private.revive()
            except (UserError, RuntimeError) as error:
                # From Python 3.12 on nothing can be forked behind the script's last line; cluster.run() is before it.
                logger.error("the private Redis is gone and cannot be started again: %s", error)
                return
            self._watch_keeper(private)
