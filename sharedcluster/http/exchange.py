"""One request and its response, run in a pooled greenlet: the WSGI server side of PEP 3333.

The head leaves with the first piece of the body in one send. After that every piece is written before the next is
asked for, so a client that reads slowly holds one piece in memory and costs no CPU. What the application returned is
closed whatever happens, also when the client leaves.
"""

from __future__ import annotations

import io
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import monotonic_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sharedcluster.http import policy
from sharedcluster.http.access_log import request_id
from sharedcluster.http.body import BodyError, BodyStream
from sharedcluster.http.policy import Rule
from sharedcluster.http.response import SERVER_ERROR, UNKNOWN_LENGTH, BadResponseError, ResponseHead, frame
from sharedcluster.http.transport import ClientGone
from sharedcluster.http.upgrade import UpgradeSocket

if TYPE_CHECKING:
    from greenlet import greenlet as Greenlet  # noqa: N812 - the type, beside an attribute of that name

    from sharedcluster.http.connection import Connection
    from sharedcluster.http.request import Head

log = logging.getLogger("sharedcluster.http")

ExcInfo = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]

JOIN = 65536
"""Up to this size head and body are joined and leave in one send; beyond it copying costs more than a system call."""


class RequestEnded(BaseException):
    """Raised inside an application whose request is over: its time is up, or its client has left an event stream."""


class WoundUp(RequestEnded):
    """Raised inside an event stream whose client is to see a proper end."""


class FileWrapper:
    """`wsgi.file_wrapper`: an open file, sent with sendfile where that is possible."""

    def __init__(self, file: Any, block_size: int = 65536) -> None:
        self.file = file
        self.block_size = block_size
        if hasattr(file, "close"):
            self.close = file.close

    def __iter__(self) -> FileWrapper:
        return self

    def __next__(self) -> bytes:
        data: bytes = self.file.read(self.block_size)
        if data:
            return data
        raise StopIteration


class Later:
    """`sharedcluster.later`: an answer that waits for something, but keeps no greenlet waiting.

    An application that finds it in its environ, and whose start_response it `is_for`, may return one instead of a body
    and call start_response then. Whoever stands between the two and reads it as a body waits for it.

    Args:
        when_done: Is given a function, and calls it once, in the thread of the loop, when `answer` need not wait.
        answer: What the application would have done: calls start_response and returns the body. Waits if it must.
    """

    __slots__ = ("_body", "answer", "when_done")

    def __init__(
        self, when_done: Callable[[Callable[[], object]], object], answer: Callable[[], Iterable[bytes]]
    ) -> None:
        self.when_done = when_done
        self.answer = answer
        self._body: Iterable[bytes] = ()

    @staticmethod
    def is_for(start_response: object) -> bool:
        """Whether it is the server itself that is to be answered."""
        return type(getattr(start_response, "__self__", None)) is Exchange

    def __iter__(self) -> Iterator[bytes]:
        self._body = self.answer()
        return iter(self._body)

    def close(self) -> None:
        """See PEP 3333."""
        if hasattr(self._body, "close"):
            self._body.close()


class Exchange:
    """A request being served. `is_over` turns true when the engine has answered, or given up, in its place.

    Once the response has begun, `response` is its head and `opening` are the bytes that leave first.
    """

    __slots__ = (
        "_fields",
        "_held",
        "_later",
        "_rest",
        "_sent_head",
        "_status",
        "bytes_out",
        "connection",
        "greenlet",
        "has_switched",
        "head",
        "input",
        "is_over",
        "keep_alive",
        "left",
        "opening",
        "request_id",
        "response",
        "started",
    )

    # All are set for each request: an attribute that its class has too is dear to set, and often to look up.
    def __init__(self, connection: Connection, head: Head, body: Any) -> None:
        self.connection = connection
        self.head = head
        self.input = body
        self.started = monotonic_ns()
        self.greenlet: Greenlet | None = None
        self.response: ResponseHead | None = None
        self.opening = b""
        self.is_over = self.has_switched = self.keep_alive = self._sent_head = False
        self.left = self.bytes_out = 0
        self.request_id: str | None = None
        self._status: str | None = None
        self._fields: Sequence[tuple[str, str]] = ()
        self._later: Later | None = None
        self._held: bytes | None = None  # what leaves with the answers of others
        self._rest: memoryview | None = None  # of that, what the client did not take at once

    def run(self, worker: Greenlet) -> bool:
        """Serve the request in `worker` and hand the connection back. Raises nothing.

        If the application answers later, `worker` is free meanwhile, and this is run once more then.
        """
        self.greenlet = worker
        connection = self.connection
        head = self.head
        server = connection.server
        later = self._later
        if self._rest is not None:
            self._send_rest(self._rest)
            return not self.is_over
        if later is None:
            if self.is_over or connection.fd < 0:  # answered for, or cut, before it began
                server.in_flight -= 1
                connection.finish(self)
                return True
            environ = head.environ_for(connection.address, connection.port)
            if self.input is not None:
                environ["wsgi.input"] = io.BufferedReader(self.input) if type(self.input) is BodyStream else self.input
            elif head.upgrade:
                environ["werkzeug.socket"] = self.input = UpgradeSocket(connection)
            if server.access_log is not None:
                environ["sharedcluster.request_id"] = self.request_id = request_id(environ)
        else:
            self._later = None  # it knows our start_response: a circle, which only the collector would free
        try:
            result = later.answer() if later is not None else server.application(environ, self.start_response)
            if isinstance(result, list) and len(result) == 1 and self.response is None and not self.is_over:
                try:
                    (body,) = result
                    # Who has something to do when an answer has left must not have it wait for that.
                    ends_here = type(result) is list or not getattr(result, "on_close", True)
                    if not self._send_whole(body, len(body), may_hold=ends_here):
                        self._send_alone(body)
                finally:
                    if type(result) is not list and hasattr(result, "close"):
                        result.close()
            elif type(result) is Later and later is None:
                self._later = result
                self.greenlet = None
                result.when_done(self.resume)
                return not self.is_over
            else:
                self._send_and_close(result)
        except ClientGone:
            connection.close()
        except RequestEnded as ended:
            self._say_last(ended)
        except BaseException as error:
            self._fail(error)
        if self.input is not None and type(self.input) is UpgradeSocket:
            self.input.retire()
        if self._held is not None:
            self.greenlet = None  # goes on with others' requests
            server.greenlets.hold(self)
        else:
            self._conclude()
        return not self.is_over

    def _conclude(self) -> None:
        """All is sent: count it, and hand the connection back."""
        connection = self.connection
        server = connection.server
        # Counted here and not by the server: it is one call less for each request.
        counters = server.counters
        server.in_flight -= 1
        counters.requests += 1
        counters.bytes_out += self.bytes_out
        duration = monotonic_ns() - self.started
        counters.latency[(duration // 1000).bit_length()] += 1
        response = self.response
        if response is not None:
            counters.by_class[response.kind] += 1
        elif self.has_switched:
            counters.by_class[1] += 1
        if server.access_log is not None:
            server.log_exchange(self, duration / 1e9)
        connection.finish(self)

    def leave(self) -> None:
        """Send what was held back, as far as the client takes it at once; the rest, if any, in a greenlet."""
        data = self._held
        assert data is not None
        connection = self.connection
        try:
            sent = connection.send_now(data)
        except ClientGone:
            connection.close()
            sent = len(data)
        if sent < len(data):
            self._rest = memoryview(data)[sent:]
            self.resume()
            return
        try:
            self._conclude()
        except Exception:
            log.exception("[BUG] a connection is cut")
            connection.close()

    def _send_rest(self, rest: memoryview) -> None:
        try:
            self.connection.send(rest)
        except ClientGone:
            self.connection.close()
        except RequestEnded as ended:
            self._say_last(ended)
        self._conclude()

    def resume(self) -> None:
        """From the loop's thread: what it waited for is there, so it goes on in a greenlet."""
        server = self.connection.server
        if not server.ready:
            server.loop.run_callback(server.greenlets.run_ready)
        server.ready.append(self)

    def start_response(
        self, status: str, headers: Sequence[tuple[str, str]], exc_info: ExcInfo | None = None, /
    ) -> Callable[[bytes], None]:
        """PEP 3333's start_response; a second call needs `exc_info`, and works until the head has been sent."""
        if self._status is not None:
            if exc_info is None or exc_info[1] is None:
                raise AssertionError("start_response was called twice; a second call needs exc_info (PEP 3333)")
            if self.response is not None:
                raise exc_info[1].with_traceback(exc_info[2])
        self._status = status
        self._fields = headers
        return self.write

    def _send_whole(self, body: bytes, length: int, *, may_hold: bool = False) -> bool:
        """The most usual answer: one piece, whose head and body leave together, perhaps with those of others.

        False if this is not one.
        """
        size = len(body)
        response = self._start(length)
        if response.length != size or size > JOIN or not response.has_body:
            return False
        data = self.opening + body
        self._sent_head = True
        self.left = 0
        self.bytes_out = len(data)
        connection = self.connection
        if not self.keep_alive:
            connection.send_last(data)
        elif (
            may_hold
            and connection.sends_now
            and type(self.input) is not BodyStream
            and connection.server.greenlets.holds_back()
        ):
            self._held = data
        else:
            connection.send(data)
        return True

    def _send_alone(self, body: bytes) -> None:
        """The only piece of a list, which is not as usual."""
        self._write(body)
        self._finish_body()

    def _send_and_close(self, result: Iterable[bytes]) -> None:
        """Any iterable; it is closed whatever happens."""
        try:
            if self.is_over:
                return
            if type(result) is FileWrapper:
                self._send_file(result)
            elif type(result) is list or type(result) is tuple:
                self._send_joined(b"".join(result))
            else:
                for piece in result:
                    if not piece or (self.response is None and self._send_whole(piece, UNKNOWN_LENGTH)):
                        continue
                    if not self._write(piece):
                        break  # else a body without an end would be made for nobody, for ever
            self._finish_body()
        finally:
            if hasattr(result, "close"):
                result.close()

    def _send_joined(self, body: bytes) -> None:
        if self.response is None:
            self._start(len(body))
        if body:
            self._write(body)

    def write(self, data: bytes, /) -> None:
        """PEP 3333's imperative write: what it is given is sent before it returns."""
        if data:
            if self.response is None:
                self._start(UNKNOWN_LENGTH)
            self._write(data)

    def _start(self, body_length: int) -> ResponseHead:
        """Frame the head. It is sent together with the first piece of the body.

        A client that asks the same again mostly gets the same head again: the request's `Head` keeps the last one with
        what it was made of.
        """
        status = self._status
        if status is None:
            raise BadResponseError("the application returned without calling start_response")
        server = self.connection.server
        standing = server.standing
        head = self.head
        keep_alive = head.keep_alive and (not server.is_draining or server.moves(self.connection))
        if self.input is not None and type(self.input) is BodyStream:
            keep_alive = keep_alive and self.input.is_nearly_read
        if self.request_id is not None:
            standing = self.add_id(standing)
        fields = self._fields
        cookie = None
        if fields and fields[-1][0] == "Set-Cookie":  # what differs most often, and where an application adds it
            cookie, fields = fields[-1][1], fields[:-1]
        source = (status, fields, standing, keep_alive, body_length)
        response = head.last.head
        if response is None or response.source != source:
            response = frame(status, fields, standing, keep_alive, head.is_head, head.is_http10, body_length)
            response.source = (status, list(fields), standing, keep_alive, body_length)
            head.last.head = response
        self.opening = response.data if cookie is None else response.with_cookie(cookie)
        self.response = response
        self.left = response.length
        self.keep_alive = response.keep_alive
        self._sent_head = False
        return response

    def _write(self, data: bytes) -> bool:
        """Send a piece of the body, with the head before it if it is the first. False if nothing can follow it."""
        response = self.response
        assert response is not None
        takes_more = response.has_body
        if not takes_more:
            data = b""
        elif self.left >= 0:
            if len(data) > self.left:
                data = self._cut(data)
                takes_more = False
            self.left -= len(data)
        elif response.chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if not self._sent_head:
            self._sent_head = True
            if self.left < 0 and self.is_event_stream:
                self.connection.begin_event_stream()
            if len(data) <= JOIN:
                data = self.opening + data
            else:
                self.bytes_out += len(self.opening)
                self.connection.send(self.opening)
        if data:
            self._send(data, is_last=self.left == 0)
        return takes_more

    def _send(self, data: bytes, *, is_last: bool) -> None:
        self.bytes_out += len(data)
        if is_last and not self.keep_alive:
            self.connection.send_last(data)
        else:
            self.connection.send(data)

    def _cut(self, data: bytes) -> bytes:
        """More body than Content-Length: what is beyond would be read as the next response, so it is not sent."""
        log.error("%s: the body is longer than its Content-Length; cut", self.describe())
        self.keep_alive = False
        return data[: self.left]

    def _finish_body(self) -> None:
        response = self.response or self._start(0)
        if not self._sent_head or response.chunked:
            end = b"0\r\n\r\n" if response.chunked else b""
            data = end if self._sent_head else self.opening + end
            self._sent_head = True
            self._send(data, is_last=True)
        if response.has_body and self.left > 0:
            log.error("%s: the body is %d bytes shorter than its Content-Length", self.describe(), self.left)
            self.keep_alive = False

    def _send_file(self, wrapper: FileWrapper) -> None:
        """Send a file: by the kernel where it is a regular one and nothing encrypts, by reading elsewhere."""
        span = file_span(wrapper.file) if self.response is None else None
        response = self._start(span[2]) if span is not None else self.response
        if response is not None and not response.has_body:
            return
        if span is None or response is None or response.chunked or not self.connection.has_sendfile:
            for piece in wrapper:
                self.write(piece)
            return
        fd, offset, size = span
        if self.left >= 0:
            size = min(size, self.left)
            self.left -= size
        self._sent_head = True
        self.connection.send(self.opening)
        self.connection.send_file(fd, offset, size)
        self.bytes_out += len(self.opening) + size

    def _fail(self, error: BaseException) -> None:
        """The application raised: 500 if nothing has been sent, else a cut: no part may pass for the whole."""
        failure = self.input.failure if isinstance(self.input, BodyStream) else None
        if not isinstance(error, BodyError) or failure is None:
            log.error("%s: %s", self.describe(), error, exc_info=(type(error), error, error.__traceback__))
        if self.is_over:
            return
        if self.response is not None and self._sent_head:
            self.connection.close()
        else:
            self.answer(SERVER_ERROR if failure is None else failure.rule)

    def answer(self, rule: Rule) -> None:
        """Answer in the application's place and be done with this request."""
        self.is_over = True
        self.connection.refuse(policy.Refused(rule), is_head=self.head.is_head)

    def end(self, rule: Rule | None) -> None:
        """From the loop: the request is over. Answer `rule` if no head has left yet, and end the application."""
        if rule is not None and not (self.response is not None and self._sent_head):
            self.answer(rule)
        else:
            self.is_over = True
            self.connection.close()
        if self.greenlet is not None:  # else it has not begun, and will not
            self.greenlet.throw(RequestEnded())

    def wind_up(self) -> None:
        """From the loop: end an event stream politely, as if the application had returned."""
        assert self.greenlet is not None
        self.greenlet.throw(WoundUp())

    def _say_last(self, ended: RequestEnded) -> None:
        """`ended` has come through the application."""
        self.is_over = True
        if type(ended) is WoundUp and self.response is not None:
            self.keep_alive = False
            try:
                self._finish_body()
            except ClientGone:
                self.connection.close()

    def add_id(self, standing: str) -> str:
        """The field lines every response carries, with the request's id if it has one."""
        return standing if self.request_id is None else f"{standing}X-Request-ID: {self.request_id}\r\n"

    @property
    def age(self) -> float:
        """Seconds since the application was started."""
        return (monotonic_ns() - self.started) / 1e9

    @property
    def has_begun(self) -> bool:
        """Whether the head of the response is framed."""
        return self.response is not None

    @property
    def is_event_stream(self) -> bool:
        """Whether an event stream has begun, which nobody but its client ends."""
        if self.response is None or not self._sent_head:
            return False
        return b"text/event-stream" in self.response.data

    def describe(self) -> str:
        """Method and path, for the log."""
        return f"{self.head.environ['REQUEST_METHOD']} {self.head.environ['RAW_URI']}"


def file_span(file: Any) -> tuple[int, int, int] | None:
    """Descriptor, offset and bytes to the end of a regular file, or None."""
    try:
        fd = file.fileno()
        facts = os.fstat(fd)
        offset = file.tell()
    except (AttributeError, OSError, ValueError):
        return None
    return (fd, offset, facts.st_size - offset) if stat.S_ISREG(facts.st_mode) and facts.st_size >= offset else None
