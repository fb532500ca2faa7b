"""Before a server is measured it must answer right: a fast error page is not a fast answer."""

from __future__ import annotations

import http.client
from http.cookies import SimpleCookie

from benchmarks.servers import CannotServeError, Server
from benchmarks.work import Work


def check(server: Server, work: Work) -> None:
    """Ask as the load will ask, three times, and compare the body.

    Raises:
        CannotServeError: The status is not 200 or the body is not what the row says.
    """
    cookies = _ask(server, "POST", work.login, b"", "")[1] if work.login else ""
    for _ in range(3):
        body, changed = _ask(server, work.method, work.path, b"x" * work.body_bytes, cookies)
        cookies = changed or cookies
        if not body.startswith(work.expects.encode()) or len(body) < work.expects_bytes:
            raise CannotServeError(f"{server.peer.name} answers {work.path} with {len(body)} bytes: {body[:60]!r}")


def _ask(server: Server, method: str, path: str, body: bytes, cookies: str) -> tuple[bytes, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, body=body or None, headers={"Cookie": cookies} if cookies else {})
        answer = connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise CannotServeError(f"{server.peer.name} answers {path} with {answer.status}")
        jar: SimpleCookie = SimpleCookie(answer.headers.get("Set-Cookie", ""))
        return data, "; ".join(f"{name}={morsel.coded_value}" for name, morsel in jar.items())
    finally:
        connection.close()
