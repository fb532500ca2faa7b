"""One line per response, as text or JSON. What a client wrote can hold no byte that a terminal or a parser acts on."""

from __future__ import annotations

import json
import os
import re
import time

from sharedcluster.http.settings import Environ

REQUEST_ID = re.compile(r"[A-Za-z0-9._=+/@-]{1,128}")
UNSAFE = re.compile(r"[^ !#-\[\]-~]")
_months = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def request_id(environ: Environ) -> str:
    """The request's id: the one it brought in X-Request-ID if that is a plain word, else a new one."""
    given = environ.get("HTTP_X_REQUEST_ID")
    return given if isinstance(given, str) and REQUEST_ID.fullmatch(given) else os.urandom(8).hex()


def escape(text: object) -> str:
    """Printable ASCII without quotes and backslashes as it is, everything else as two hex digits."""
    return UNSAFE.sub(lambda match: f"\\x{ord(match[0]):02x}", str(text))


def text_line(environ: Environ, *, now: float, status: int, sent: int, seconds: float) -> str:
    """A line in the combined log format, with the duration in milliseconds and the request id behind it."""
    at = time.gmtime(now)
    stamp = f"{at.tm_mday:02d}/{_months[at.tm_mon - 1]}/{time.strftime('%Y:%H:%M:%S', at)} +0000"
    get = environ.get
    return (
        f"{get('REMOTE_ADDR') or '-'} - - [{stamp}] "
        f'"{escape(get("REQUEST_METHOD", "-"))} {escape(get("RAW_URI", "-"))} {escape(get("SERVER_PROTOCOL", "-"))}" '
        f'{status} {sent} "{escape(get("HTTP_REFERER", "-"))}" "{escape(get("HTTP_USER_AGENT", "-"))}" '
        f"{seconds * 1000:.3f}ms {get('sharedcluster.request_id', '-')}"
    )


def json_line(environ: Environ, *, now: float, status: int, sent: int, seconds: float) -> str:
    """The same facts as one JSON object."""
    get = environ.get
    facts = {
        "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z",
        "client": get("REMOTE_ADDR") or None,
        "method": get("REQUEST_METHOD"),
        "target": get("RAW_URI"),
        "protocol": get("SERVER_PROTOCOL"),
        "host": get("HTTP_HOST"),
        "status": status,
        "bytes": sent,
        "ms": round(seconds * 1000, 3),
        "referer": get("HTTP_REFERER"),
        "agent": get("HTTP_USER_AGENT"),
        "id": get("sharedcluster.request_id"),
    }
    return json.dumps(facts, ensure_ascii=True)
