"""The plain WSGI callable: what a server costs when the application costs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

HELLO: Final = b"Hello, World!"
MEGABYTE: Final = bytes(range(256)) * 4096
CHUNK: Final = b"x" * 1024
CHUNKS: Final = 100
READ_SIZE: Final = 65536


def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """`/` hello; `/download` one megabyte; `/stream` 100 chunks without a length; `/upload` counts what it is sent."""
    path = environ["PATH_INFO"]
    if path == "/stream":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return _stream()
    body = HELLO
    if path == "/download":
        body = MEGABYTE
    elif path == "/upload":
        body = str(_count(environ)).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def _stream() -> Iterator[bytes]:
    for _ in range(CHUNKS):
        yield CHUNK


def _count(environ: dict[str, Any]) -> int:
    """Read the body as an upload's handler does, in pieces."""
    total = 0
    left = int(environ.get("CONTENT_LENGTH") or 0)
    source = environ["wsgi.input"]
    while left > 0:
        piece = source.read(min(READ_SIZE, left))
        if not piece:
            break
        total += len(piece)
        left -= len(piece)
    return total
