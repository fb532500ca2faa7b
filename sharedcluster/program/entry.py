"""The first lines of a worker's process: `python entry.py SCRIPT ARGUMENTS...`, started by `cluster.fork()`.

Node starts a worker as a fresh process that runs the same file again, and so does this. It is run by its path, so that
it works wherever the package was imported from. Before the script's first line the process is patched for gevent,
knows that it is a worker, and has forgotten it in `os.environ`: what the script starts is no worker.
"""

from __future__ import annotations

import sys
from pathlib import Path

_HERE = str(Path(__file__).parent)
if sys.path and sys.path[0] == _HERE:  # not with -P or -I
    del sys.path[0]
_ROOT = str(Path(__file__).parents[2])
if _ROOT not in sys.path:
    sys.path.append(_ROOT)

from gevent import monkey

monkey.patch_all()

# ruff: noqa: E402 - nothing may be imported before the patch
import atexit
import importlib.util
import os
from contextlib import suppress
from importlib.abc import InspectLoader
from types import CodeType, ModuleType
from typing import NoReturn

from sharedcluster.program.role import WorkerRole, take_from_environment


def main() -> NoReturn:
    """Be a worker: run the script, then stay until the primary lets go."""
    role = take_from_environment()
    if not isinstance(role, WorkerRole):
        sys.exit("sharedcluster/program/entry.py is started by cluster.fork(), not by hand")
    for fd in (role.wire_fd, role.messages_fd, role.board_fd):
        os.set_inheritable(fd, False)
    from sharedcluster.program import api

    worker = api.become_worker(role)
    worker.start()
    code = 1
    try:
        run_script(role.exec)
        worker.wait()
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    _end(code)


def run_script(target: str) -> None:
    """Run a file, or `-m package.module`, as `__main__`, as the interpreter would have done."""
    if target.startswith("-m "):
        code, main_module = _module(target[len("-m ") :])
        sys.argv[:] = [str(main_module.__file__), *sys.argv[2:]]
        sys.path.insert(0, os.getcwd())
    else:
        code, main_module = _file(target)
        sys.argv[:] = sys.argv[1:]
        sys.path.insert(0, os.path.dirname(target))
    _keep.append(sys.modules["__main__"])
    sys.modules["__main__"] = main_module
    exec(code, main_module.__dict__)  # noqa: S102 - it is the script this process was started for


_keep: list[ModuleType] = []
"""This module, which would be emptied if nobody held it any more."""


def _file(path: str) -> tuple[CodeType, ModuleType]:
    module = ModuleType("__main__")
    module.__file__ = path
    module.__spec__ = None
    with open(path, "rb") as file:
        return compile(file.read(), path, "exec"), module


def _module(name: str) -> tuple[CodeType, ModuleType]:
    sys.path.insert(0, os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(name + ".__main__")
    finally:
        del sys.path[0]
    code = spec.loader.get_code(spec.name) if spec and isinstance(spec.loader, InspectLoader) else None
    if spec is None or code is None:
        raise ImportError(f"No module named {name}")
    module = ModuleType("__main__")
    module.__file__ = spec.origin
    module.__spec__ = spec
    module.__package__ = spec.parent
    module.__loader__ = spec.loader
    return code, module


def _end(code: int) -> NoReturn:
    """As at the end of an interpreter, without waiting for greenlets that the script left behind."""
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
