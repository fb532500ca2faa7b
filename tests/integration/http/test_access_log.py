"""The access log, as text and as JSON."""

from __future__ import annotations

import json
import re
import select
from collections.abc import Callable

from tests.integration.http.conftest import Served, get

Serve = Callable[..., Served]


def line_of(served: Served) -> str:
    """The next line of the log."""
    assert served.process.stderr is not None
    assert select.select([served.process.stderr], [], [], 10)[0]
    return served.process.stderr.readline().decode("ascii").rstrip("\n")


def test_text_line(serve: Serve) -> None:
    """Combined format, what a client wrote escaped, the request's id in the line, the response and the environ."""
    served = serve(access_log="stderr")
    answer = served.ask(get("/echo?q=%22", 'User-Agent: \x80\t"evil\\', "X-Request-ID: abc-1"))
    assert b"\r\nX-Request-ID: abc-1\r\n" in answer
    assert b'"sharedcluster.request_id": "abc-1"' in answer
    assert re.fullmatch(
        r'- - - \[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d \+0000\] "GET /echo\?q=%22 HTTP/1.1" 200 \d+ "-" '
        r'"\\x80\\x09\\x22evil\\x5c" \d+\.\d{3}ms abc-1',
        line_of(served),
    )


def test_json_line(serve: Serve) -> None:
    """One object per response; a request id that is no plain word is replaced by a new one."""
    served = serve(access_log="stderr", access_log_format="json")
    body = served.ask(get("/plain", "X-Request-ID: a b", "User-Agent: \x9b2J")).partition(b"\r\n\r\n")[2]
    facts = json.loads(line_of(served))
    assert {key: facts[key] for key in ("method", "target", "status", "bytes", "host")} == {
        "method": "GET", "target": "/plain", "status": 200, "bytes": len(body), "host": "test",
    }  # fmt: skip
    assert re.fullmatch(r"[0-9a-f]{16}", facts["id"])
    assert facts["agent"] == "\x9b2J"


def test_refusals_are_logged(serve: Serve) -> None:
    """A message that never became a request has a line too."""
    served = serve(access_log="stderr")
    served.ask(b"nonsense\r\n\r\n")
    assert '"- - -" 400 ' in line_of(served)


def test_requests_that_the_server_answered_for_are_logged_as_any_other(serve: Serve) -> None:
    """A crash and a request that took too long have their id in the answer and the log, and the time they took."""
    served = serve(access_log="stderr", access_log_format="json", request_timeout=0.3)
    for path, status, least in (("/crash", 500, 0.0), ("/slow?30", 503, 300.0)):
        assert b"\r\nX-Request-ID: abc-1\r\n" in served.ask(get(path, "X-Request-ID: abc-1"))
        facts = json.loads(line_of(served))
        assert (facts["status"], facts["id"], facts["target"]) == (status, "abc-1", path)
        assert facts["ms"] > least


def test_no_request_id_without_a_log(served: Served) -> None:
    """With the log off nothing is made or sent."""
    assert b"X-Request-ID" not in served.ask(get("/echo"))
