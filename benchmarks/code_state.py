"""Which code a result measured, and whether that is still the code that is here."""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import ROOT

MEASURED: Final = "sharedcluster"
SUFFIXES: Final = (".py", ".lua")
RELEASE: Final = "version.py"
_COMMENT: Final = re.compile(r"(^\s*#.*|\s+#[^\"']*)$")


@dataclass(frozen=True, slots=True)
class CodeState:
    """The measured code: the commit it stands on, and a fingerprint of the files as they are on disk.

    The fingerprint, not the commit, decides whether a result is stale: it changes with an edit that is not committed,
    and does not change with a commit that touches only words: docs, comments, docstrings, the number of a release.
    """

    commit: str
    fingerprint: str


def current() -> CodeState:
    """The code as it is now."""
    return CodeState(_commit(), fingerprint(ROOT / MEASURED))


def fingerprint(folder: Path) -> str:
    """A hash of the names and contents of all code below a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES):
        name, text = path.relative_to(folder).as_posix(), path.read_text()
        if name == RELEASE:
            continue
        what_runs = without_words(text) if path.suffix == ".py" else text
        digest.update(f"{name}\0{hashlib.sha256(what_runs.encode()).hexdigest()}".encode())
    return digest.hexdigest()[:16]


@functools.cache
def without_words(source: str) -> str:
    """Python source without comments, docstrings and empty lines.

    A comment after code stays if there is a quote in it, which might be the end of a string: tokenizing would know,
    and takes ten times as long.
    """
    lines = source.splitlines()
    in_text: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            first, last = node.lineno, node.end_lineno or node.lineno
            lines[first - 1 : last] = [""] * (last - first + 1)
        elif isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno != node.lineno:
            in_text |= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    numbered = enumerate(lines, 1)
    code = [line if number in in_text else _COMMENT.sub("", line).rstrip() for number, line in numbered]
    return "\n".join(line for line in code if line)


def is_stale(measured: CodeState, now: CodeState) -> bool:
    """Whether the code has changed since it was measured."""
    return measured.fingerprint != now.fingerprint


def _commit() -> str:
    return _git("rev-parse", "--short=12", "HEAD") or "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
