"""The worker's way to Redis: group commit over one connection.

Laws
----
1. A command that finds the connection free is sent at once, by its own caller. Only in a crowd, when the last
   exchange carried several, do those run first who are about to, in what is left of this turn of the loop, and other
   processes that want this CPU, whose requests may then be there: what was read together asks Redis together. On a CPU
   that nobody else wants, nothing waits for what has not arrived yet.
2. A part that is submitted (`submit`) is waited for by nobody: who is queued when this turn of the loop is over, or
   when the exchange under way ends, is led in a place of its own, and told in the thread that submitted.
3. Commands that are issued while an exchange is under way wait in a queue. When the exchange ends, the first of them
   takes the whole queue along as one pipeline. A redis-py call costs a worker 120-160 us of CPU, inside a pipeline
   of 32 it costs 12 us.
4. A reply reaches the caller of its command or nobody. A caller that is killed while it leads (`GreenletExit`, a
   gevent `Timeout`, `KeyboardInterrupt`) leaves replies unread on the wire, so the wire is closed; a caller that is
   killed while it waits leaves a ticket nobody reads. Leadership is passed on in every case.
5. Nothing waits longer than `connect_timeout + socket_timeout` for its own exchange plus as much for the one before.
   When an exchange fails because Redis does not answer, everything in the queue fails with it: each would only wait
   for the same silence.
6. Parts of one script (`JointScript`) that are sent together run as one, up to `RUN_LIMIT` of them: one reply to read,
   and one message for every worker to hear. What becomes of a part is told to its own caller.
7. A command is sent a second time only if its caller said that this is harmless (`idempotent`), or if it provably
   never left this process.

Theory of operation
-------------------
`GroupCommit.exchange` makes a ticket. If nobody leads, its caller becomes the leader with a batch of one. Otherwise
the ticket is queued and its caller sleeps in the ticket's own parking. `_pass_on`, which every leader runs when it is
done, takes the queue as the next batch and wakes the first caller in it, which then leads that batch. So each caller
does its own I/O or the one of the group it belongs to, and no thread of its own is needed. Only where nobody in the
queue waits, for all have submitted, the lead goes to a place of its own (`Home.spawn`).

How callers sleep is the runtime's affair (`runtime`): in a gevent worker they are greenlets, under `flask run` they
are threads. Nothing here may be created before the fork: see `SharedState`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import hiredis
import redis

from sharedcluster.errors import Bug, StateUnavailableError
from sharedcluster.state.breaker import CircuitBreaker
from sharedcluster.state.runtime import THREADS, Home, Parking, Runtime
from sharedcluster.state.scripting import Part, script_command, script_names, script_sha, script_text
from sharedcluster.state.settings import StateSettings
from sharedcluster.state.tickets import Submitted, Ticket, join
from sharedcluster.state.wire import Address, Argument, Command, ReplyError, Wire, pack

log = logging.getLogger("sharedcluster.state")

# A reply with one of these codes says that this server cannot do its job now; it is not the command's fault.
# fmt: off
UNAVAILABLE_CODES = frozenset((
    "LOADING", "MASTERDOWN", "READONLY", "MISCONF", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS", "OOM", "BUSY", "NOAUTH",
    "WRONGPASS", "NOPERM",
))
# fmt: on
# With these the connection itself is of no more use: after a failover it leads to a replica, or to nobody.
RECONNECT_CODES = frozenset(("READONLY", "MASTERDOWN", "LOADING", "NOAUTH"))
# These would hold up every other command of the worker, or change what the shared connection is.
# fmt: off
EXCLUSIVE_COMMANDS = frozenset((
    "BLPOP", "BRPOP", "BLMOVE", "BRPOPLPUSH", "BLMPOP", "BZPOPMIN", "BZPOPMAX", "BZMPOP", "WAIT", "WAITAOF", "WATCH",
    "SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "MONITOR", "MULTI", "EXEC", "DISCARD", "SELECT", "AUTH", "HELLO", "RESET",
    "QUIT",
))
# fmt: on


class GroupCommit:
    """Commands of all concurrent callers of a worker, over one connection. The laws are at the top of this file."""

    def __init__(self, address: Address, settings: StateSettings, runtime: Runtime = THREADS) -> None:
        self.address = address
        self._runtime = runtime
        self.breaker = CircuitBreaker(settings.breaker_limit, settings.probe_interval)
        self.exchanges = 0  # round trips
        self.commands = 0
        self.reconnects = 0
        self._settings = settings
        self._lock = runtime.make_lock()
        self._queue: deque[Ticket] = deque()
        self._spare_parkings: list[Parking] = []
        self._home: Home | None = None  # of those who submit
        self._leading = False
        self._has_abandoned = False  # there may be tickets in the queue that nobody reads
        self._is_crowd = False  # the last exchange carried several callers' commands
        self._wire: Wire | None = None
        self._used_at = 0.0
        self._closed = False

    # -- what callers use ------------------------------------------------------------------------------------------

    def call(self, *command: Argument, idempotent: bool = False) -> Any:
        """Run one command and return its reply.

        Raises:
            ReplyError: Redis refused it.
            StateUnavailableError: Redis did not answer in time, or cannot do its job.
        """
        if str(command[0]).upper() in EXCLUSIVE_COMMANDS:
            raise Bug(f"{command[0]!r} must not run on the shared connection; use `exclusive` or `transaction`")
        reply = self.exchange(pack(command), 1, idempotent)[0]
        if isinstance(reply, ReplyError):
            raise self._as_error(reply)
        return reply

    def script(self, name: str, keys: Sequence[str], args: Iterable[Argument], *, idempotent: bool = False) -> Any:
        """Run scripts/NAME.lua and return its reply; its text is sent only if the server does not know it yet."""
        return self.many([script_command(name, keys, args)], idempotent=idempotent)[0]

    def part(self, part: Part, *, idempotent: bool = False) -> Any:
        """Run this and what others have of the same script as one (law 6); returns what became of this."""
        reply = self.exchange(b"", 1, idempotent, part)[0]
        return self._after_refusal(part, reply, idempotent) if type(reply) is ReplyError else reply

    def submit(self, part: Part) -> Submitted:
        """As `part`, for a caller who goes on meanwhile (law 2) and asks `settle` afterwards.

        Raises:
            StateUnavailableError: Redis is known to be down.
        """
        if not self.breaker.allows():
            raise self._is_down()
        home = self._home
        if home is None:
            home = self._home = self._runtime.make_home()
        submitted = Submitted(part)
        if not home.is_here():  # there is one home, so who submits elsewhere waits
            self._run_elsewhere(submitted)
            return submitted
        with self._lock:
            is_full = len(self._queue) >= self._settings.queue_limit
            if not is_full:
                self._queue.append(submitted)
            must_lead = not (is_full or self._leading)
            if must_lead:
                self._leading = True
        if is_full:
            submitted.fail("too many commands are waiting for Redis")
            submitted.is_done = True
        elif must_lead:
            home.spawn(self._lead_alone)
        return submitted

    def _run_elsewhere(self, submitted: Submitted) -> None:
        ticket = Ticket(b"", 1, submitted.part)
        self._run(ticket)
        submitted.replies, submitted.error, submitted.lost = ticket.replies, ticket.error, ticket.lost
        submitted.is_done = True

    def settle(self, submitted: Submitted, *, idempotent: bool = False) -> Any:
        """What became of a part that was submitted, as `part` returns or raises it; waits if it is not done yet."""
        if not submitted.is_done:
            parking = self._runtime.make_parking()
            submitted.when_done(parking.unpark)
            parking.park()
        if submitted.replies is not None:
            reply = submitted.replies[0]
            if type(reply) is not ReplyError:
                return reply
        part = submitted.part
        assert part is not None
        if submitted.replies is not None:
            return self._after_refusal(part, reply, idempotent)
        if submitted.lost and idempotent:
            return self.part(part, idempotent=False)
        raise StateUnavailableError(submitted.error or "Redis did not answer")

    def _after_refusal(self, part: Part, reply: ReplyError, idempotent: bool) -> Any:
        return self._sole(self._second_try(part.command(), reply, idempotent))

    def many(self, commands: Sequence[Command | Part], *, idempotent: bool = False) -> list[Any]:
        """Run commands as one group, in order, one round trip; the first refused one raises after all have run."""
        packed = [command.command() if isinstance(command, Part) else pack(command) for command in commands]
        replies = self.exchange(packed[0] if len(packed) == 1 else b"".join(packed), len(packed), idempotent)
        for index, reply in enumerate(replies):
            if type(reply) is ReplyError:
                reply = self._second_try(packed[index], reply, idempotent)
            replies[index] = self._sole(reply) if type(commands[index]) is Part else reply
        return replies

    def transaction(self, commands: Sequence[Command], *, idempotent: bool = False) -> list[Any]:
        """Run commands as one MULTI/EXEC, one round trip."""
        group = [("MULTI",), *commands, ("EXEC",)]
        replies = self.exchange(b"".join(map(pack, group)), len(group), idempotent)
        for reply in (*replies, *(replies[-1] if isinstance(replies[-1], list) else ())):
            if isinstance(reply, ReplyError):
                raise self._as_error(reply)
        results: list[Any] = replies[-1]
        return results

    def exclusive(self, *command: Argument, timeout: float) -> Any:
        """Run a command that blocks on a connection of its own, for at most `timeout` seconds."""
        try:
            wire = Wire(self.address)
            try:
                wire.settimeout(timeout)
                wire.send(pack(command))
                reply = wire.read()
            finally:
                wire.close()
        except (OSError, redis.RedisError) as error:
            raise StateUnavailableError(f"Redis did not answer {command[0]!r}: {error}") from None
        if isinstance(reply, ReplyError):
            raise self._as_error(reply)
        return reply

    def load_scripts(self) -> None:
        """Make all scripts known to the server, in one round trip."""
        self.many([("SCRIPT", "LOAD", script_text(script_sha(name))) for name in script_names()], idempotent=True)

    def close(self) -> None:
        """Close the connection; later commands fail."""
        self._closed = True
        self._drop_wire()

    # -- the exchange ----------------------------------------------------------------------------------------------

    def exchange(self, data: bytes, count: int, idempotent: bool, part: Part | None = None) -> list[Any]:
        """Send packed commands, or a part, and return the replies; error replies are returned, as `ReplyError`."""
        if not self.breaker.allows():
            raise self._is_down()
        ticket = Ticket(data, count, part)
        self._run(ticket)
        if ticket.replies is None and ticket.lost and idempotent:
            ticket = Ticket(data, count, part)
            self._run(ticket)
        if ticket.replies is None:
            raise StateUnavailableError(ticket.error or "Redis did not answer")
        return ticket.replies

    def _is_down(self) -> StateUnavailableError:
        return StateUnavailableError("Redis is down", retry_after=self._settings.probe_interval)

    def _run(self, ticket: Ticket) -> None:
        with self._lock:
            if self._leading:
                if len(self._queue) >= self._settings.queue_limit:
                    ticket.fail("too many commands are waiting for Redis")
                    return
                ticket.parking = self._spare_parkings.pop() if self._spare_parkings else self._runtime.make_parking()
                self._queue.append(ticket)
            else:
                self._leading = True
                ticket.batch = [ticket]
        if ticket.parking is not None:
            self._wait(ticket, ticket.parking)
        if ticket.batch is not None:
            if self._is_crowd:
                self._gather(ticket)
            self._lead(ticket.batch, ticket)

    def _gather(self, ticket: Ticket) -> None:
        """The caller leads: let others queue up. Killed meanwhile, it has sent nothing, and the next one leads."""
        try:
            self._runtime.yield_turn()
        except BaseException:
            self._abandon(ticket)
            raise

    def _wait(self, ticket: Ticket, parking: Parking) -> None:
        """Sleep until the ticket is answered, failed, or given the lead."""
        # Without a timeout of its own, which would cost a timer per command: whoever leads is bounded by those of the
        # socket, and wakes everybody it answers, fails or passes the lead to, whatever happens to itself.
        try:
            parking.park()
        except BaseException:  # killed while waiting
            self._abandon(ticket)
            raise
        # It was opened once and has just been passed, so nobody else will touch it: the next one may sleep there.
        self._spare_parkings.append(parking)

    def _abandon(self, ticket: Ticket) -> None:
        """Leave the queue. If the lead was given to this ticket in the meantime, give it to the next one."""
        with self._lock:
            ticket.abandoned = self._has_abandoned = True
            batch, ticket.batch = ticket.batch, None
            ticket.fail("its caller has gone")
            if batch is not None:
                self._queue.extendleft(reversed(batch))
        if batch is not None:
            self._pass_on()

    def _lead(self, batch: list[Ticket], own: Ticket | None) -> None:
        """Exchange a batch, tell its callers, pass the lead on: in every case, also when killed on the way."""
        try:
            if self._queue:  # who has come since the lead was passed on
                with self._lock:
                    self._take(batch)
            self._is_crowd = len(batch) > 1
            self._exchange_batch(batch)
        except (OSError, redis.RedisError, hiredis.HiredisError) as error:
            self._fail_batch(batch, error)
        except BaseException:
            # Killed between sending and reading: the replies on the wire belong to nobody.
            self._drop_wire()
            self._fail_rest(batch, "the exchange was cut short", lost=True)
            raise
        finally:
            try:
                if len(batch) > 1 or own is None:
                    self._tell(batch, own)
            finally:
                self._pass_on()

    def _tell(self, tickets: Iterable[Ticket], own: Ticket | None = None) -> None:
        """What became of these is known: wake who sleeps, but for the caller's own, and call who is to be called."""
        parkings = []
        home = self._home
        is_home = home is not None and home.is_here()
        for ticket in tickets:
            if type(ticket) is Submitted:
                ticket.is_done = True
                if is_home:
                    ticket.tell()
                elif home is not None:
                    home.call(ticket.tell)
            elif ticket is not own and ticket.parking is not None:
                parkings.append(ticket.parking)
        if parkings:
            self._runtime.unpark_all(parkings)

    def _pass_on(self) -> None:
        """Give the lead to the first in the queue who waits, or to nobody."""
        with self._lock:
            batch: list[Ticket] = []
            self._take(batch)
            if not batch:
                self._leading = False
                return
            heir = next((ticket for ticket in batch if ticket.parking is not None), None)
            if heir is not None and heir.parking is not None:
                heir.batch = batch
                heir.parking.unpark()
                return
            self._queue.extendleft(reversed(batch))
        assert self._home is not None  # for those who do not wait have submitted
        self._home.spawn(self._lead_alone)

    def _lead_alone(self) -> None:
        """Lead who is queued by then, in a place of its own: of those nobody waits who could."""
        try:
            if self._is_crowd:
                try:
                    self._runtime.yield_turn()
                except BaseException:
                    self._pass_on()
                    raise
            batch: list[Ticket] = []
            with self._lock:
                self._take(batch)
            self._lead(batch, None)
        except Exception:
            log.exception("[BUG] an exchange with Redis was cut short")

    def _take(self, batch: list[Ticket]) -> None:
        """Add who is queued; called with the lock held."""
        queue, room = self._queue, self._settings.batch_limit - len(batch)
        if len(queue) <= room and not self._has_abandoned:
            batch += queue
            queue.clear()
            return
        while queue and room:
            if not (ticket := queue.popleft()).abandoned:
                batch.append(ticket)
                room -= 1
        self._has_abandoned = self._has_abandoned and bool(queue)

    def _exchange_batch(self, batch: list[Ticket]) -> None:
        wire = self._ready_wire()
        sent, runs = join(batch)
        wire.send(sent[0].data if len(sent) == 1 else b"".join([ticket.data for ticket in sent]))
        read, read_waiting = wire.read, wire.read_waiting
        must_reconnect = False
        for ticket in sent:
            first = read_waiting()
            if first is Wire:
                first = read()
            ticket.replies = [first] if ticket.count == 1 else [first, *(read() for _ in range(ticket.count - 1))]
            if type(first) is ReplyError and first.code in RECONNECT_CODES:
                must_reconnect = True
        for run in runs:
            answers = run.hand_out()
            if ReplyError in map(type, answers):
                codes = [answer.code for answer in answers if type(answer) is ReplyError]
                must_reconnect = must_reconnect or not RECONNECT_CODES.isdisjoint(codes)
        self._used_at = time.monotonic()
        self.exchanges += 1
        self.commands += sum([ticket.count for ticket in sent])
        self.breaker.note_success()
        if must_reconnect:
            self._drop_wire()

    def _ready_wire(self) -> Wire:
        wire = self._wire
        # A server that went away while we were idle is found before anything is sent, so that no write is in doubt.
        if wire is not None and time.monotonic() - self._used_at > 0.01 and wire.is_stale():
            self._drop_wire()
            wire = None
        if wire is None:
            if self._closed:
                raise ConnectionError("the shared state is closed")
            wire = self._wire = Wire(self.address, self._runtime)
            self.reconnects += 1
        return wire

    def _drop_wire(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def _fail_batch(self, batch: list[Ticket], error: Exception) -> None:
        """Redis did not do its part. A broken connection may be tried again; silence fails the whole queue."""
        connected = self._wire is not None
        self._drop_wire()
        self.breaker.note_failure()
        silent = not connected or isinstance(error, TimeoutError | redis.TimeoutError)
        text = f"Redis did not answer: {error}"
        self._fail_rest(batch, text, lost=not silent)
        if silent:
            with self._lock:
                waiting = list(self._queue)
                self._queue.clear()
            for ticket in waiting:
                ticket.fail(text)
            self._tell(waiting)

    @staticmethod
    def _fail_rest(batch: list[Ticket], text: str, *, lost: bool) -> None:
        for ticket in batch:
            if ticket.replies is None:
                ticket.fail(text, lost=lost)

    @staticmethod
    def _sole(answers: list[Any]) -> Any:
        """What became of the only part of a run."""
        (answer,) = answers
        if type(answer) is ReplyError:
            raise GroupCommit._as_error(answer)
        return answer

    # -- error replies ---------------------------------------------------------------------------------------------

    def _second_try(self, data: bytes, reply: ReplyError, idempotent: bool) -> Any:
        """Send a script's text, and its command again, if that was all that was missing; raise otherwise."""
        if reply.code == "NOSCRIPT":
            sha = data.split(b"\r\n", 5)[4].decode()  # *N $7 EVALSHA $40 SHA
            replies = self.exchange(pack(("SCRIPT", "LOAD", script_text(sha))) + data, 2, idempotent)
            refused = [each for each in replies if isinstance(each, ReplyError)]
            if not refused:
                return replies[1]
            reply = refused[0]
        raise self._as_error(reply)

    @staticmethod
    def _as_error(reply: ReplyError) -> Exception:
        if reply.code in UNAVAILABLE_CODES:
            return StateUnavailableError(f"Redis cannot do its job: {reply}")
        return reply
