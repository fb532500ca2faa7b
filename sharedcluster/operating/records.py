"""What is written down about kept applications, so that the commands find them without a daemon.

Each application has a folder: `spec.json` is what it is and belongs to the commands, which change it under a lock;
`state.json` is how it is and belongs to its attendant while that lives. Both are replaced atomically and are 0600 in
a 0700 folder, since the environment of an application holds its secrets.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from sharedcluster.control.protocol import check_private
from sharedcluster.errors import ConfigError
from sharedcluster.operating.spec import AppSpec

SCHEMA: Final = 1


# -- where -------------------------------------------------------------------------------------------------------


def state_folder() -> Path:
    """Where records, logs and the saved list are: `$SHAREDCLUSTER_STATE_DIR`, else below `$XDG_STATE_HOME`.

    Raises:
        ConfigError: It is not ours alone.
    """
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    folder = Path(os.environ.get("SHAREDCLUSTER_STATE_DIR") or Path(base, "sharedcluster"))
    check_private(folder, "SHAREDCLUSTER_STATE_DIR", may_be_link=True)
    return folder


def made(folder: Path) -> Path:
    """The folder, made for us alone if it is not there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def logs_folder() -> Path:
    """Where log files are that have no path of their own."""
    return state_folder() / "logs"


def _apps_folder() -> Path:
    return state_folder() / "apps"


@contextmanager
def locked() -> Iterator[None]:
    """Nobody else starts, deletes or saves meanwhile; two `start` of one name cannot both win."""
    fd = os.open(made(state_folder()) / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def write_atomically(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file as a whole, on the disk before it has its name (rename(2) after fsync(2))."""
    made(path.parent)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


# -- processes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that is not mistaken for a later one of the same number: `born` is in clock ticks since boot."""

    pid: int
    born: int

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The process that has this number now."""
        return cls(pid, _born(pid))

    def is_alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        return self.born != 0 and _born(self.pid) == self.born


def _born(pid: int) -> int:
    """Field 22 of proc_pid_stat(5), 0 if there is no such process or it is a zombie."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return 0
    return 0 if facts[0] in "ZX" else int(facts[19])


# -- records -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class State:
    """How an application is, as its attendant last wrote it. Times are seconds since 1970, for people."""

    state: str = "stopped"
    """starting, online, restarting, stopped or errored."""
    attendant: ProcessId | None = None
    primary: ProcessId | None = None
    control: str = ""
    started_at: float = 0.0
    restarts: int = 0
    """How often the primary was started again."""
    ended: str = ""
    """How the primary last ended, in words."""
    ended_at: float = 0.0
    exit_code: int | None = None
    failure: str = ""
    """What was wrong, and the application's traceback below it."""
    cpu_seconds: float = 0.0
    """What processes that have ended used."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """rotations, lost reloads and whatever else an operator should see."""


@dataclass(frozen=True, slots=True)
class Record:
    """A kept application."""

    id: int
    spec: AppSpec
    state: State

    @property
    def name(self) -> str:
        """Its name."""
        return self.spec.name

    def has_attendant(self) -> bool:
        """Whether somebody looks after it."""
        return self.state.attendant is not None and self.state.attendant.is_alive()

    def has_primary(self) -> bool:
        """Whether its primary runs."""
        return self.state.primary is not None and self.state.primary.is_alive()

    def is_running(self) -> bool:
        """Whether anything of it runs."""
        return self.has_attendant() or self.has_primary()


def load_all() -> list[Record]:
    """Every kept application, by id."""
    folder = _apps_folder()
    names = sorted(path.parent.name for path in folder.glob("*/spec.json")) if folder.is_dir() else []
    return sorted((record for name in names if (record := load(name))), key=lambda record: record.id)


def load(name: str) -> Record | None:
    """One kept application.

    Raises:
        ConfigError: Its record is damaged; it is kept aside.
    """
    path = _apps_folder() / name / "spec.json"
    try:
        content = json.loads(path.read_text())
        return Record(int(content["id"]), AppSpec.from_json(content["spec"]), load_state(name))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        aside = set_aside(path)
        raise ConfigError(
            f"The record of {name} is damaged ({error}).",
            fact=f"It is kept as {aside}.",
            advice="Start the application again.",
        ) from error


def load_state(name: str) -> State:
    """How it is; a state that cannot be read is that of an application nobody knows anything about."""
    try:
        content = json.loads((_apps_folder() / name / "state.json").read_text())
        for key in ("attendant", "primary"):
            content[key] = ProcessId(**content[key]) if content[key] else None
        return State(**content)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return State()


def save_state(name: str, state: State) -> None:
    """Write how it is."""
    write_atomically(_apps_folder() / name / "state.json", asdict(state))


def save_spec(record: Record) -> None:
    """Write what it is; to be called under the lock."""
    content = {"schema": SCHEMA, "id": record.id, "spec": record.spec.as_json()}
    write_atomically(_apps_folder() / record.name / "spec.json", content)


def register(spec: AppSpec) -> Record:
    """Give an application a record, and the lowest free id if it has none yet; to be called under the lock."""
    known = load_all()
    mine = next((record for record in known if record.name == spec.name), None)
    taken = {record.id for record in known}
    number = mine.id if mine else next(n for n in range(len(taken) + 1) if n not in taken)
    record = Record(number, spec, mine.state if mine else State())
    save_spec(record)
    return record


def with_spec(record: Record, **changes: Any) -> Record:
    """The record with another spec."""
    return replace(record, spec=replace(record.spec, **changes))


def forget(name: str) -> None:
    """Remove a record; to be called under the lock."""
    shutil.rmtree(_apps_folder() / name, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that nothing is lost; returns its new name."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = path.with_name(f"{path.name}.broken-{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.broken-{stamp}-{number}")
    path.rename(aside)
    return aside


# -- the saved list ----------------------------------------------------------------------------------------------


def saved_path() -> Path:
    """The list that `save` writes and `resurrect` reads."""
    return state_folder() / "saved.json"


def save_list(specs: list[AppSpec]) -> Path:
    """Write the list; the one before it is kept beside it."""
    path = saved_path()
    if path.exists():
        shutil.copy2(path, path.with_suffix(".json.before"))
    write_atomically(path, {"schema": SCHEMA, "saved_at": time.time(), "apps": [spec.as_json() for spec in specs]})
    return path


def load_list() -> list[AppSpec]:
    """The saved applications.

    Raises:
        ConfigError: Nothing was saved, or the file is damaged; then it is kept aside under another name.
    """
    path = saved_path()
    try:
        content = json.loads(path.read_text())
        return [AppSpec.from_json(each) for each in content["apps"]]
    except FileNotFoundError:
        raise ConfigError(f"Nothing was saved ({path}).", advice="First: sharedcluster save") from None
    except (ValueError, TypeError, KeyError) as error:
        aside = set_aside(path)
        before = path.with_suffix(".json.before")
        advice = (f"The list before it: cp {before} {path}",) if before.exists() else ("sharedcluster start FILE",)
        raise ConfigError(
            f"The saved list is damaged ({error}).", fact=f"It is kept as {aside}.", advice=advice
        ) from error


ROTATED: Final = re.compile(r"\.\d{8}T\d{6}\.\d{3}(\.gz)?$")
