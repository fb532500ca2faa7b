"""Everything that travels between the primary and a worker, and how it is written.

Laws:

1. One message is one datagram of a SEQPACKET socket; at most one file descriptor goes with it (`ipc` carries it).
2. A message is a frozen dataclass. What is sent once per connection (`TakeTurns`, `NewConnection`, `Accepted`,
   `Returned`) is packed by `struct`, because it is the price of every connection; everything else is JSON, because it
   is readable.
3. A connection has one owner. One that a worker accepts in its turn (`turns`) has two in its life: the kernel's
   backlog, then the worker. One that is passed on has four: the backlog, a listener's pending queue, the
   un-acknowledged set of one worker handle, one worker. The moment of passing on is when the worker writes the
   connection's number on its row of the board, before its first read. `Accepted` tells the primary to look there;
   until it has looked, it keeps its copy of the descriptor.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field
from typing import Final

Peer = tuple[str, int] | None
"""Host and port of a TCP client; None for a client on a unix socket."""

MAX_MESSAGE: Final = 65536
"""Bytes of the longest message; what may be longer (a traceback) is cut to fit before it is sent."""


@dataclass(frozen=True, slots=True)
class Connection:
    """An accepted socket that nobody has read from: its descriptor, its client and the listener it came in by.

    `proxied` is what a worker learnt of the client by PROXY protocol before it gave the connection back; such a
    head comes only once, so it has to travel with the connection.
    """

    fd: int
    listener: int
    peer: Peer
    proxied: str = ""


# -- primary to worker ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TakeTurns:
    """It is the worker's turn: accept so many connections of a listener, if they are still there."""

    listener: int
    count: int


@dataclass(frozen=True, slots=True)
class NewConnection:
    """A connection for the worker; its descriptor goes with the message. `seq` is what the answer names."""

    seq: int
    listener: int
    peer: Peer
    proxied: str = ""


@dataclass(frozen=True, slots=True)
class Drain:
    """Leave: finish what is in flight within `timeout` seconds, then exit.

    `give_back` says that other workers will go on serving, so idle connections are handed back, not closed.
    """

    timeout: float
    give_back: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """Exit now; what is in flight is cut."""


@dataclass(frozen=True, slots=True)
class ReopenLogs:
    """Open the log files anew, because somebody has moved them."""


@dataclass(frozen=True, slots=True)
class Rebalance:
    """Give back up to `count` idle connections: this worker has more than its share of them."""

    count: int


@dataclass(frozen=True, slots=True)
class ForkWorker:
    """To a mold: fork a worker with these marks; its end of the channel goes with the message."""

    id: int
    slot: int
    row: int


# -- worker to primary ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accepted:
    """Look at the board: the worker owns every connection it was passed up to `seq`, or has used the turns it was
    asked about. Sent once for all that a turn of its loop took (half the cost of a hand-off is waking the primary).
    """

    seq: int


@dataclass(frozen=True, slots=True)
class Returned:
    """The worker did not take connection `seq` (its descriptor did not arrive, or it is leaving)."""

    seq: int


@dataclass(frozen=True, slots=True)
class Exhausted:
    """The worker has no descriptor for a connection that it should accept; its turns are void."""


@dataclass(frozen=True, slots=True)
class GivenBack:
    """An idle connection comes back; its descriptor goes with the message. The worker has forgotten it."""

    listener: int
    peer: Peer
    proxied: str = ""


@dataclass(frozen=True, slots=True)
class Online:
    """The worker's process runs and is about to load the application."""

    pid: int


@dataclass(frozen=True, slots=True)
class Listening:
    """The application is loaded, the loop turns (this follows the first heartbeat), and connections are taken.

    `secret` is a fingerprint of the application's SECRET_KEY (not of use for anything but comparing), "" without one.
    """

    secret: str = ""


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The application did not load; `traceback` is its own, trimmed, "" where `what` says it all."""

    what: str
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """What a worker says of itself once a second; all counters only ever grow."""

    connections: int = 0
    in_flight: int = 0
    requests: int = 0
    rss: int = 0
    cpu_seconds: float = 0.0
    redis_state: str = "none"
    redis_latency_ms: float = 0.0
    redis_url: str = ""
    counters: dict[str, int] = field(default_factory=dict)
    latency: list[int] = field(default_factory=list)
    """Requests by duration: bucket i is below 2**i microseconds."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The worker's loop turns: liveness, readiness and numbers in one message."""

    stats: WorkerStats


@dataclass(frozen=True, slots=True)
class Draining:
    """The worker leaves of its own accord (a TERM sent to it by hand): hand it no more connections."""

    reason: str


@dataclass(frozen=True, slots=True)
class MoldReady:
    """From a mold: the application is loaded, workers can be forked."""


@dataclass(frozen=True, slots=True)
class Forked:
    """From a mold: worker `id` is process `pid`, now a child of the primary."""

    id: int
    pid: int


# -- programs that are primary and worker in one file (`program`) ------------------------------------------------


@dataclass(frozen=True, slots=True)
class Listen:
    """From a worker: listen there for me, or tell me why not. The answer names `request`.

    `index` tells several servers of one worker apart that ask for the same address; the same address and index of
    two workers is one listener. `fd` is a descriptor of the primary's.
    """

    request: int
    index: int
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int | None = None
    backlog: int = 2048


@dataclass(frozen=True, slots=True)
class Bound:
    """To a worker: connections of `listener` come from now on. Host and port are the real ones.

    With `is_shared` the listening socket goes with the message, and the worker accepts for itself. `ticket_key` (hex)
    is what all workers make TLS session tickets with.
    """

    request: int
    listener: int
    host: str = ""
    port: int = 0
    path: str = ""
    is_shared: bool = False
    ticket_key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class NotBound:
    """To a worker: the primary could not listen there; `code` is an errno."""

    request: int
    code: int
    what: str


@dataclass(frozen=True, slots=True)
class Unlisten:
    """From a worker: this server is closed here; hand me no more of its connections."""

    listener: int


Message = (
    TakeTurns
    | NewConnection
    | Drain
    | Stop
    | ReopenLogs
    | Accepted
    | Returned
    | Exhausted
    | GivenBack
    | Online
    | Listening
    | LoadFailed
    | Heartbeat
    | Draining
    | Rebalance
    | ForkWorker
    | MoldReady
    | Forked
    | Listen
    | Bound
    | NotBound
    | Unlisten
)

# -- codec ------------------------------------------------------------------------------------------------------

_NEW: Final = struct.Struct("!BIHHB")  # tag, seq, listener, port, length of the host; then host, then proxied
_SEQ: Final = struct.Struct("!BI")  # tag, seq
_TURNS: Final = struct.Struct("!BHH")  # tag, listener, count
_TAG_NEW, _TAG_ACCEPTED, _TAG_RETURNED, _TAG_JSON, _TAG_TURNS = range(1, 6)

_BY_NAME: Final[dict[str, type]] = {
    kind.__name__: kind
    for kind in (
        Drain, Stop, ReopenLogs, Rebalance, Exhausted, GivenBack, Online, Listening, LoadFailed, Heartbeat, Draining,
        ForkWorker, MoldReady, Forked, Listen, Bound, NotBound, Unlisten,
    )
}  # fmt: skip


def encode(message: Message) -> bytes:
    """Write a message as the bytes of one datagram."""
    if isinstance(message, TakeTurns):
        return _TURNS.pack(_TAG_TURNS, message.listener, message.count)
    if isinstance(message, NewConnection):
        host, port = message.peer or ("", 0)
        name = host.encode()
        return _NEW.pack(_TAG_NEW, message.seq, message.listener, port, len(name)) + name + message.proxied.encode()
    if isinstance(message, Accepted):
        return _SEQ.pack(_TAG_ACCEPTED, message.seq)
    if isinstance(message, Returned):
        return _SEQ.pack(_TAG_RETURNED, message.seq)
    body = json.dumps([type(message).__name__, asdict(message)], separators=(",", ":")).encode()
    return bytes((_TAG_JSON,)) + body


def decode(data: bytes) -> Message:
    """Read the bytes of one datagram.

    Raises:
        ValueError: The bytes are no message of ours. The receiver logs that and lives on.
    """
    try:
        tag = data[0]
        if tag == _TAG_TURNS:
            _, listener, count = _TURNS.unpack(data)
            return TakeTurns(listener, count)
        if tag == _TAG_NEW:
            _, seq, listener, port, length = _NEW.unpack_from(data)
            end = _NEW.size + length
            peer = (data[_NEW.size : end].decode(), port) if length else None
            return NewConnection(seq, listener, peer, data[end:].decode())
        if tag == _TAG_ACCEPTED:
            return Accepted(_SEQ.unpack(data)[1])
        if tag == _TAG_RETURNED:
            return Returned(_SEQ.unpack(data)[1])
        if tag == _TAG_JSON:
            return _from_json(data[1:])
    except (IndexError, KeyError, TypeError, ValueError, struct.error, RecursionError) as error:
        raise ValueError(f"not a message: {data[:80]!r}") from error
    raise ValueError(f"not a message: {data[:80]!r}")


def _from_json(body: bytes) -> Message:
    name, fields = json.loads(body)
    kind = _BY_NAME[name]
    if kind is Heartbeat:
        return Heartbeat(WorkerStats(**fields["stats"]))
    if kind is GivenBack and fields["peer"] is not None:
        fields["peer"] = tuple(fields["peer"])
    message: Message = kind(**fields)
    return message


def cut_to_fit(text: str, limit: int = MAX_MESSAGE // 4) -> str:
    """Shorten a text so that it fits into one message; the end is kept, where a traceback says what happened."""
    return text if len(text) <= limit else "[...]\n" + text[-limit:]
