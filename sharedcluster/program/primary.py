"""`cluster` in the primary: starts workers, hears of them, hands off connections, lets them go.

Theory of operation. Everything happens in one loop (`loops.SelectorLoop`), which runs when the script has nothing more
to say. A worker is reached by two sockets: the message socket of `cluster.ipc` for connections and what concerns
them, and a stream for user messages (`channel`). A third thing is watched, its process (pidfd). Its end is made known
when all it said before it died has been read: `message`, then `disconnect`, then `exit`, always in this order.

What a handler raises is logged; it does not end the primary, because that would end every worker with it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final, NoReturn

from sharedcluster import descriptors
from sharedcluster.cluster.board import Board
from sharedcluster.cluster.ipc import ChannelClosed, MessageSocket
from sharedcluster.cluster.messages import (
    Accepted,
    Bound,
    Connection,
    Draining,
    GivenBack,
    Listen,
    Message,
    NotBound,
    Online,
    Returned,
    Unlisten,
)
from sharedcluster.cluster.worker_handle import WorkerHandle, WorkerState
from sharedcluster.errors import Bug, ClusterStoppingError, ConfigError
from sharedcluster.log import logger
from sharedcluster.program.channel import Channel
from sharedcluster.program.departure import Departure
from sharedcluster.program.emitter import Events
from sharedcluster.program.frames import serialization
from sharedcluster.program.loops import SelectorLoop, Timer, Watch, selector_loop
from sharedcluster.program.output import Output
from sharedcluster.program.policies import SCHED_NONE, SCHED_RR, policy
from sharedcluster.program.redis import ProgramRedis
from sharedcluster.program.role import BLOCKED_AT_START, VARIABLE, WorkerRole, as_variable
from sharedcluster.program.servers import Servers
from sharedcluster.program.settings import NAMES, Settings, command, defaults
from sharedcluster.program.workers import ListeningAddress, Worker

MESSAGES_PER_TURN: Final = 256
RESTLESS: Final = 0.05
_LONG: Final = 60.0


def serve(*_arguments: object, **_options: object) -> NoReturn:
    """`cluster.serve` in the primary."""
    raise ConfigError(
        "cluster.serve() serves in a worker, and this is the primary.",
        advice="Start workers with cluster.fork(), and serve where cluster.is_worker is true.",
    )


class PrimaryCluster(Events):
    """What `from sharedcluster import cluster` is in a primary."""

    EVENTS = ("setup", "fork", "online", "listening", "message", "disconnect", "exit")
    SCHED_RR = SCHED_RR
    SCHED_NONE = SCHED_NONE
    is_primary = True
    is_worker = False
    worker = None
    serve = staticmethod(serve)

    def __init__(self) -> None:
        super().__init__()
        self.workers: dict[int, Worker] = {}
        self._settings: Settings | None = None
        self._last_id = 0
        self._loop_: SelectorLoop | None = None
        self._servers: Servers | None = None
        self._board_fd = -1
        self._board: Board | None = None
        self._redis: ProgramRedis | None = None
        self._watches: dict[int, Watch] = {}
        self._outputs: dict[int, list[Output]] = {}
        self._ticket_key = os.urandom(80).hex()
        self._is_stopping = False
        self._departures: list[Departure] = []

    # -- settings --------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """What workers are started with."""
        return self._settings or defaults()

    @property
    def scheduling_policy(self) -> str:
        """Who gets the next connection, for listeners that are bound from now on."""
        return self.settings.scheduling_policy

    @scheduling_policy.setter
    def scheduling_policy(self, name: str) -> None:
        self._settings = replace(self.settings, scheduling_policy=policy(name))

    def setup_primary(self, **changes: Any) -> None:
        """Change what later workers are started with; what is not named stays. Emits `setup` in the next turn.

        Args:
            **changes: See `Settings`.

        Raises:
            TypeError: There is no such setting.
            ConfigError: A value makes no sense.
        """
        unknown = changes.keys() - set(NAMES)
        if unknown:
            raise TypeError(f"setup_primary has no setting {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
        for name in ("args", "exec_argv"):
            if isinstance(changes.get(name), str):
                raise TypeError(f"{name} is a list of words, not one text")
            if name in changes:
                changes[name] = tuple(map(str, changes[name]))
        if "scheduling_policy" in changes:
            changes["scheduling_policy"] = policy(changes["scheduling_policy"])
        if "serialization" in changes:
            serialization(changes["serialization"])
        if "exec" in changes and not str(changes["exec"]).startswith("-m "):
            changes["exec"] = os.path.abspath(os.fspath(changes["exec"]))
        self._settings = settled = replace(self.settings, **changes)
        self._loop.call_soon(self.emit, "setup", settled)

    # -- the loop --------------------------------------------------------------------------------------------------

    @property
    def _loop(self) -> SelectorLoop:
        if self._loop_ is None:
            self._loop_ = selector_loop()
            self._loop_.before_wait.append(self._before_wait)
            self._loop_.after_wait.append(self._after_wait)
            self._loop_.when_leaving.append(self._leave)
        return self._loop_

    @property
    def servers(self) -> Servers:
        """What workers listen on."""
        if self._servers is None:
            self._servers = Servers(self._loop.selector)
        return self._servers

    def run(self) -> None:
        """Turn until the last worker has ended. Without this call the same happens at the end of the script."""
        self._loop.run()

    def call_later(self, seconds: float, job: Callable[..., object], *arguments: object) -> Timer:
        """Node's setTimeout: call it once in the loop; the result has `cancel()`."""
        return self._loop.call_later(seconds, job, *arguments)

    def _before_wait(self, now: float) -> float:
        for departure in tuple(self._departures):
            departure.advance(now)
        restless = self.servers.watch(now) or any(not departure.is_told for departure in self._departures)
        return RESTLESS if restless else _LONG

    def _after_wait(self) -> None:
        self.servers.dispatch()

    # -- forking ---------------------------------------------------------------------------------------------------

    def fork(self, env: Mapping[str, str] | None = None) -> Worker:
        """Start a worker: a fresh interpreter that runs the same script, where `cluster.is_worker` is true.

        Args:
            env: Variables for this worker, on top of this process's.

        Raises:
            OSError: Its process cannot be started.
            ClusterStoppingError: The cluster is on its way out.
        """
        if self._is_stopping:
            raise ClusterStoppingError("The cluster is stopping: no worker is started any more.")
        if self._settings is None:
            self.setup_primary()
        settings = self.settings
        self._prepare(settings)
        self._last_id += 1
        worker = self._spawn(settings, self._last_id, dict(env or {}))
        self.workers[worker.id] = worker
        self._loop.call_soon(self._tell, worker, "fork")
        return worker

    def _prepare(self, settings: Settings) -> None:
        if self._board is None:
            descriptors.raise_limit()
            self._board_fd = os.memfd_create("sharedcluster")
            os.ftruncate(self._board_fd, Board.SIZE)
            self._board = Board(self._board_fd)
        if settings.redis != "none" and self._redis is None:
            self._redis = ProgramRedis(settings.redis, self._loop)

    def _spawn(self, settings: Settings, id: int, env: dict[str, str]) -> Worker:
        assert self._board is not None
        wire, its_wire = MessageSocket.pair()
        ours, theirs = socket.socketpair()
        slot = self._free_slot()
        row = self._board.take()
        role = WorkerRole(
            id=id, slot=slot, wire_fd=its_wire.fileno(), messages_fd=theirs.fileno(), board_fd=self._board_fd,
            row=row.number, serialization=settings.serialization, graceful_timeout=settings.graceful_timeout,
            exec=settings.exec,
        )  # fmt: skip
        try:
            process = self._popen(settings, role, env)
        except BaseException:
            wire.close()
            ours.close()
            self._board.give_back(row)
            raise
        finally:
            its_wire.close()
            theirs.close()
        handle = WorkerHandle(id, slot, 1, process.pid, wire, row, time.monotonic())
        worker = Worker(handle, process, self._loop, self, settings.graceful_timeout)
        self._attach(worker, ours, settings)
        return worker

    def _popen(self, settings: Settings, role: WorkerRole, env: dict[str, str]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **env, VARIABLE: as_variable(role)}
        environment |= {"SHAREDCLUSTER_WORKER_ID": str(role.id), "SHAREDCLUSTER_SLOT": str(role.slot)}
        if self._redis is not None and self._redis.url:
            environment.setdefault("SHAREDCLUSTER_REDIS_URL", self._redis.url)
        lifeline = () if self._redis is None else self._redis.lifeline
        taken = subprocess.PIPE if settings.silent else None
        sys.stdout.flush()
        sys.stderr.flush()
        # Blocked until the worker has handlers for them: Ctrl+C reaches it too, while its interpreter starts.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_AT_START)
        try:
            return subprocess.Popen(
                command(settings), env=environment, cwd=settings.cwd, stdout=taken, stderr=taken,
                pass_fds=(role.wire_fd, role.messages_fd, role.board_fd, *lifeline),
                user=settings.uid, group=settings.gid,
            )  # fmt: skip
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _attach(self, worker: Worker, ours: socket.socket, settings: Settings) -> None:
        loop = self._loop
        wire = worker.handle.channel
        self._watches[worker.id] = loop.watch(wire.fileno(), lambda: self._read_wire(worker))
        channel = Channel(
            ours, loop, serialization(settings.serialization),
            lambda message, taken: self._on_message(worker, message, taken),
            lambda: self._on_channel_closed(worker),
        )  # fmt: skip
        worker.attach(channel)
        loop.when_exited(worker.process, lambda code, name: self._on_exit(worker, code, name))
        for name, pipe in (("stdout", worker.process.stdout), ("stderr", worker.process.stderr)):
            if pipe is not None:
                output = Output(loop, pipe.fileno(), partial(worker.emit, name))
                self._outputs.setdefault(worker.id, []).append(output)

    def _free_slot(self) -> int:
        taken = {worker.slot for worker in self.workers.values()}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    # -- what workers say ------------------------------------------------------------------------------------------

    def _tell(self, worker: Worker, event: str, *arguments: object) -> None:
        """The worker's own handlers first, then the cluster's."""
        worker.emit(event, *arguments)
        self.emit(event, worker, *arguments)

    def _on_message(self, worker: Worker, message: Any, taken: Callable[[bool], None]) -> None:
        self._read_wire(worker)  # what it did before it sent this is known first
        heard = worker.has_observer("message") or self.has_observer("message")
        if heard:
            self._tell(worker, "message", message)
        taken(heard)

    def _read_wire(self, worker: Worker) -> None:
        handle = worker.handle
        for _ in range(MESSAGES_PER_TURN):
            try:
                received = handle.channel.receive()
            except ChannelClosed:
                self._wire_closed(worker)
                return
            except ValueError as error:
                logger.error("worker %d sent what is no message: %s", worker.id, error)
                continue
            except OSError:  # closed here already
                return
            if received is None:
                return
            message, fd = received
            handler = self._HANDLERS.get(type(message))
            if handler is None:
                logger.error("worker %d sent a message that is not for the primary: %r", worker.id, message)
                continue
            try:
                handler(self, worker, message, fd)
            except Bug as bug:
                logger.error("%s", bug)  # a worker that answers what it was not asked ends nobody but itself

    def _wire_closed(self, worker: Worker) -> None:
        self.servers.leave(worker.handle)
        if watch := self._watches.pop(worker.id, None):
            watch.close()

    def _on_online(self, worker: Worker, _message: Online, _fd: int | None) -> None:
        if worker.handle.state is WorkerState.FORKED:
            worker.handle.state = WorkerState.ONLINE
        self._tell(worker, "online")

    def _on_listen(self, worker: Worker, message: Listen, _fd: int | None) -> None:
        handle = worker.handle
        if handle.state is WorkerState.DRAINING:
            return  # it was let go before it came so far; it leaves without the answer
        try:
            served = self.servers.listen(handle, message, self.scheduling_policy)
        except OSError as error:
            handle.tell(NotBound(message.request, error.errno or 0, error.strerror or str(error)))
            return
        address = served.listener.address
        bound = Bound(
            message.request, served.listener.index, address.host, address.port, address.path, served.is_shared,
            self._ticket_key,
        )  # fmt: skip
        handle.tell(bound, served.listener.socket.fileno() if served.is_shared else None)
        handle.state = WorkerState.LISTENING
        if not served.is_shared:
            served.hand_off.enter(handle)
        kind = -1 if address.path else 6 if ":" in address.host else 4
        told = ListeningAddress(address.path or address.host, address.port, kind, message.fd)
        self._tell(worker, "listening", told)

    def _on_unlisten(self, worker: Worker, message: Unlisten, _fd: int | None) -> None:
        self.servers.unlisten(worker.handle, message.listener)

    def _on_accepted(self, worker: Worker, message: Accepted, _fd: int | None) -> None:
        worker.handle.acknowledged(message.seq)

    def _on_returned(self, worker: Worker, message: Returned, _fd: int | None) -> None:
        connection = worker.handle.returned(message.seq)
        self.servers.take_back([connection])
        self.servers.rest(worker.handle, connection.listener, time.monotonic())

    def _on_given_back(self, worker: Worker, message: GivenBack, fd: int | None) -> None:
        if fd is None:
            logger.error("worker %d gave a connection back and its descriptor did not arrive", worker.id)
            return
        worker.handle.given_back += 1
        self.servers.give(Connection(fd, message.listener, message.peer, message.proxied))

    def _on_draining(self, worker: Worker, _message: Draining, _fd: int | None) -> None:
        worker.leaving()

    _HANDLERS: Final[dict[type[Message], Callable[[Any, Worker, Any, int | None], None]]] = {
        Online: _on_online,
        Listen: _on_listen,
        Unlisten: _on_unlisten,
        Accepted: _on_accepted,
        Returned: _on_returned,
        GivenBack: _on_given_back,
        Draining: _on_draining,
    }

    # -- the end of a worker ---------------------------------------------------------------------------------------

    def leaves(self, worker: Worker) -> None:
        """It was asked to go, or asked to: no more connections for it."""
        self.servers.leave(worker.handle)

    def _on_channel_closed(self, worker: Worker) -> None:
        self._read_wire(worker)
        self.servers.leave(worker.handle)
        self._tell(worker, "disconnect")

    def _on_exit(self, worker: Worker, code: int | None, name: str | None) -> None:
        # What it said before it died counts: an `Accepted` in the socket means that bytes may have been read, so that
        # connection must not be given to anybody else.
        self._read_wire(worker)
        worker.channel.read_rest()
        for output in self._outputs.pop(worker.id, ()):
            output.read_rest()
        worker.channel.close()  # a child of the worker may hold the other end
        self._wire_closed(worker)
        worker.handle.channel.close()
        worker.ended()
        self.servers.forget(worker.handle, worker.handle.take_back())
        assert self._board is not None
        self._board.give_back(worker.handle.row)
        del self.workers[worker.id]
        self._tell(worker, "exit", code, name)
        for departure in tuple(self._departures):
            departure.lost(worker)
        if not self.workers and self._is_stopping and self._redis is not None:
            self._redis.stop()

    # -- the end of all --------------------------------------------------------------------------------------------

    def disconnect(self, callback: Callable[[], object] | None = None) -> None:
        """Let all workers go: empty the queues, close the listeners, answer what is in flight.

        Args:
            callback: Called after the last of these workers has exited; in the next turn if there are none.
        """
        departure = Departure(self, callback)
        self._departures.append(departure)
        self.servers.refuse_newcomers()

    def hold(self, more: int) -> None:
        """One thing more (1) or less (-1) to stay alive for."""
        self._loop.hold(more)

    def departed(self, departure: Departure) -> None:
        """Its last worker has exited."""
        self._departures.remove(departure)
        if departure.callback is not None:
            self._loop.guarded(departure.callback)

    def _leave(self, at_once: bool) -> None:
        """TERM, INT or a crash of the script: drain; a second time: stop now."""
        self._is_stopping = True
        if at_once:
            self.servers.close()
            for worker in self.workers.values():
                worker.stop_now()
        elif not self._departures:
            self.disconnect()
