"""Logging: one line per fact on stderr, as text for people or as JSON for machines.

Standard library only; the same set-up serves the primary and the workers, which differ in the role they name.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Final

from sharedcluster.log_files import LogFiles, install

LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

logger: Final = logging.getLogger("sharedcluster")
access_logger: Final = logging.getLogger("sharedcluster.access")


class TextFormatter(logging.Formatter):
    """`09:12:01  primary  ready in 0.9 s`; what is not mere information says its level."""

    def __init__(self, role: str, *, stamped: bool = True) -> None:
        super().__init__()
        self.role = role
        self.stamped = stamped

    def format(self, record: logging.LogRecord) -> str:
        """One line, and below it the traceback if there is one."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        name = "" if record.name.startswith("sharedcluster") else f"{record.name}: "
        line = f"{level}{name}{record.getMessage()}"
        if self.stamped:
            line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))}  {self.role:<8} {line}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, role, logger, message, and the fields given as `extra`."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fact: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "role": self.role,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fact |= getattr(record, "fields", {})
        if record.exc_info:
            fact["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fact, default=str)


def set_up(role: str, *, level: str, style: str, files: LogFiles | None = None) -> None:
    """Send everything logged in this process to stderr under the name of its role.

    Called anew in each worker: what the parent had set up is replaced, so no line is written twice. With `files`,
    stdout and stderr become log files, and a second call in the same process opens them anew.
    """
    handler = logging.StreamHandler(install(files, role, style) if files else sys.stderr)
    handler.setFormatter(JsonFormatter(role) if style == "json" else TextFormatter(role, stamped=not files))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logger.setLevel(LEVELS[level])
