"""The grammar of a request line and of framing fields, and why a text that is none is refused. Pure, no I/O.

llhttp judges the grammar of a whole head; here is what it leaves open, and what explains a refusal: the functions
called `explain_...` and `refuse_...` choose the broken rule with the most telling status.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from sharedcluster.http import policy
from sharedcluster.http.policy import Refused

REQUEST_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}) ([^ ]*) (.*)")
VERSION = re.compile(r"HTTP/([0-9])\.([0-9])")


def is_target(target: str) -> bool:
    """Whether all of it may stand in a request target: printable ASCII without `#` and backslash."""
    return target.isascii() and target.isprintable() and "#" not in target and "\\" not in target


def explain_request_line(line: str) -> Refused:
    """Why this request line is refused: the shape first, then the version, then the method."""
    match = REQUEST_LINE.fullmatch(line)
    if match is None:
        return Refused(policy.REQUEST_LINE, line[:80])
    method, target, version = match.groups()
    numbers = VERSION.fullmatch(version)
    if numbers is None:
        return Refused(policy.VERSION_BAD if " " not in version else policy.REQUEST_LINE, version[:20])
    if numbers[1] != "1":
        return Refused(policy.VERSION_MAJOR, version)
    if numbers[2] not in "01":
        return Refused(policy.VERSION_BAD, version)
    if not target:
        return Refused(policy.REQUEST_LINE)
    if method == "CONNECT":
        return Refused(policy.METHOD_CONNECT, target)
    return Refused(policy.METHOD_UNKNOWN, method)


def refuse_odd_length(lines: list[str]) -> None:
    """Content-Length is where requests are smuggled: white space the grammar allows but nobody writes is refused."""
    for line in lines:
        if line[:15].lower() == "content-length:" and line[15:].removeprefix(" ") != line[15:].strip(" \t"):
            raise Refused(policy.LENGTH_BAD, line[:40])


def unescape(path: str) -> str:
    """The bytes of an escaped path, as PEP 3333 shows bytes."""
    found = unquote_to_bytes(path).decode("latin-1")
    if "\0" in found or "\r" in found or "\n" in found:
        raise Refused(policy.TARGET_CONTROL, path)
    return found


def refuse_coding(value: str) -> Refused:
    """RFC 9112 6.1: a list without exactly one final `chunked` is 400, a coding we do not know 501."""
    codings = [coding.strip(" \t").lower() for coding in value.split(",")]
    if "" in codings or codings.count("chunked") > 1 or "chunked" in codings[:-1]:
        return Refused(policy.CODING_BAD, value)
    return Refused(policy.CODING_UNKNOWN, value)
