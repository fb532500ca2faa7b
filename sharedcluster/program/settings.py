"""What `setup_primary` sets, and what a worker's process is started with."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from sharedcluster.errors import ConfigError
from sharedcluster.program.policies import SCHED_RR, policy

POLICY_VARIABLE: Final = "SHAREDCLUSTER_POLICY"


@dataclass(frozen=True, slots=True)
class Settings:
    """How workers are started; the defaults are those of this process, when it is first asked.

    Attributes:
        exec: The script every worker runs, or `-m package.module`.
        args: Its arguments.
        exec_argv: Options of the interpreter.
        cwd: The workers' folder; None is this one.
        silent: Take what workers write instead of passing it through: events `stdout` and `stderr` (bytes).
        serialization: `json`, or `msgpack`, which takes bytes and times too (extra `fast`).
        scheduling_policy: `round-robin`, `least-connections`, `sticky`, or `shared` (workers accept for themselves).
        graceful_timeout: Seconds a worker that was asked to go may take.
        redis: `none`, `auto` (`$REDIS_URL`, else a private server for this run) or a URL; what the workers' shared
            state uses.
        uid, gid: Whom the workers' processes belong to.
    """

    exec: str
    args: tuple[str, ...]
    exec_argv: tuple[str, ...]
    cwd: str | None = None
    silent: bool = False
    serialization: str = "json"
    scheduling_policy: str = SCHED_RR
    graceful_timeout: float = 30.0
    redis: str = "none"
    uid: int | None = None
    gid: int | None = None


NAMES: Final = tuple(field.name for field in fields(Settings))


def defaults() -> Settings:
    """What this process was started with."""
    return Settings(
        exec=_SCRIPT,
        args=tuple(sys.argv[1:]),
        exec_argv=tuple(subprocess._args_from_interpreter_flags()),  # type: ignore[attr-defined]
        scheduling_policy=policy(os.environ.get(POLICY_VARIABLE) or SCHED_RR),
    )


def _this_script() -> str:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:  # started by `python -m`
        return "-m " + str(spec.name).removesuffix(".__main__")
    path = getattr(main, "__file__", None)
    return str(Path(path).absolute()) if path else ""


_SCRIPT: Final = _this_script()
"""Found out early: at the script's end, when handlers still fork, `__main__` has forgotten its file."""


def command(settings: Settings) -> list[str]:
    """The command that starts a worker: a fresh interpreter, which patches itself and then runs the script.

    Raises:
        ConfigError: There is no script to run.
    """
    if not settings.exec:
        raise ConfigError(
            "There is no script that a worker could run.",
            fact="cluster.fork() runs the script of this process again, and this one has none (python -c, a shell).",
            advice="Put the program into a file, or name one: cluster.setup_primary(exec='worker.py')",
        )
    entry = Path(__file__).parent / "entry.py"
    return [sys.executable, *settings.exec_argv, str(entry), settings.exec, *settings.args]
