"""The ecosystem file: several applications in one TOML, YAML or JSON file.

    workers = 2                       # for all applications

    [apps.shop]                       # the settings of `sharedcluster run`, with "_" or "-"
    app = "shop:create_app()"
    port = 8001

    [apps.shop.env]                   # variables; a table among them is a section for --env
    LOG = "1"
    [apps.shop.env.production]
    LOG = "0"

`apps` may be a list of tables with a `name` each. A file without `apps` is one application.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sharedcluster import config as configuration
from sharedcluster.control.protocol import check_name
from sharedcluster.errors import ConfigError
from sharedcluster.operating.spec import AppSpec, read_upkeep, upkeep_settings

DEFAULT_FILES: Final = ("sharedcluster.toml", "sharedcluster.yaml", "sharedcluster.yml", "sharedcluster.json")
SUFFIXES: Final = (".toml", ".yaml", ".yml", ".json")

OTHER_KEYS: Final = ("name", "cwd", "env", "log_file")
"""Keys of a section that are neither a setting of the cluster nor upkeep."""

ELSEWHERE: Final[Mapping[str, str]] = {
    "script": "app",
    "instances": "workers",
    "max_memory_restart": "max_memory",
    "kill_timeout": "graceful_timeout (seconds)",
    "listen_timeout": "boot_timeout (seconds)",
    "increment_var": "port = 0, or one app for each port",
    "pid": "pid_file",
    "output": "out_file",
    "error": "error_file",
    "log": "log_file",
    "log_type": "log_format",
    "combine_logs": "log_file",
    "merge_logs": "log_file = PATH (all workers always share one file; this merges both streams)",
}
"""PM2's names for what is here under another one."""

POINTLESS: Final[Mapping[str, str]] = {
    "exec_mode": "every app is a cluster",
    "interpreter": "the Python that sharedcluster is installed in runs the app",
    "interpreter_args": "the Python that sharedcluster is installed in runs the app",
    "args": "give them to a factory: app = \"shop:create_app('x')\"",
    "time": "every line has its time",
    "log_date_format": "every line has its time",
    "max_restarts": "the budget is fixed: 5 attempts to come up, 16 crashes in a row",
    "min_uptime": "a worker that served less than 1 s ended unstably",
    "restart_delay": "the delay grows from 0.1 s by 1.5 up to 15 s",
    "exp_backoff_restart_delay": "the delay grows from 0.1 s by 1.5 up to 15 s",
    "namespace": "choose names that tell",
    "source_map_support": "there are no source maps",
    "instance_var": "it is always SHAREDCLUSTER_SLOT",
}
"""PM2's keys that have no counterpart, and why."""


@dataclass(frozen=True, slots=True)
class Ecosystem:
    """A file that was read: sections by the name of the application, in the file's order."""

    path: Path
    sections: Mapping[str, Mapping[str, Any]]
    is_single: bool
    """The whole file is one application."""

    def where(self, name: str) -> str:
        """The place of a section, for messages."""
        return self.path.name if self.is_single else f"{self.path.name} [{name}]"

    def specs(
        self,
        environ: Mapping[str, str],
        *,
        only: Iterable[str] = (),
        env_name: str = "",
        given: Mapping[str, Any] | None = None,
    ) -> list[AppSpec]:
        """The applications as they are to be kept.

        Args:
            environ: The environment they start from.
            only: Names; none means all.
            env_name: The section of `env` that is added.
            given: Values of the command line, for each of them.

        Raises:
            ConfigError: A name or a section is not in the file, a key is unknown or a value cannot be read.
        """
        chosen = tuple(only) or tuple(self.sections)
        for name in chosen:
            if name not in self.sections:
                raise ConfigError(f"{self.path}: there is no app {name!r}{_suggest(name, self.sections)}.")
        if env_name and not any(env_name in sections_of(s) for s in self.sections.values()):
            known = sorted({each for section in self.sections.values() for each in sections_of(section)})
            raise ConfigError(
                f"{self.path}: no app has a section env.{env_name}{_suggest(env_name, known)}.",
                fact=f"Sections: {', '.join(known) or 'none'}.",
            )
        return [self._spec(name, environ, env_name, given or {}) for name in chosen]

    def _spec(self, name: str, environ: Mapping[str, str], env_name: str, given: Mapping[str, Any]) -> AppSpec:
        section, where = self.sections[name], self.where(name)
        settings = {key: section[key] for key in configuration.settings() if key in section and key != "name"}
        if one := section.get("log_file"):
            settings |= {"out_file": one, "error_file": one}
        upkeep = {**section, **{k: v for k, v in given.items() if k in upkeep_settings()}}
        cwd = Path(self.path.parent, str(section.get("cwd", "."))).resolve()
        if not cwd.is_dir():
            raise ConfigError(f"{where}: cwd: there is no folder {cwd}.")
        return AppSpec(
            name=name,
            settings=settings,
            where=where,
            given={k: v for k, v in given.items() if k not in upkeep_settings()},
            cwd=str(cwd),
            env=variables_of(section, env_name, where),
            environ=environ,
            upkeep=read_upkeep(upkeep, where),
            file=str(self.path),
            env_name=env_name,
        )


def sections_of(section: Mapping[str, Any]) -> set[str]:
    """The names for --env that an application has."""
    env = section.get("env", {})
    inner = {name for name, value in env.items() if isinstance(value, dict)} if isinstance(env, dict) else set()
    return inner | {key[4:] for key in section if key.startswith("env_")}


def variables_of(section: Mapping[str, Any], env_name: str, where: str) -> dict[str, str]:
    """The variables of an application: those of `env`, over them those of `env.<name>`."""
    env = section.get("env", {})
    if not isinstance(env, dict):
        raise ConfigError(f"{where}: env is not a table of variables.")
    named = {**section.get(f"env_{env_name}", {}), **env.get(env_name, {})} if env_name else {}
    plain = {name: value for name, value in env.items() if not isinstance(value, dict)}
    return {name: _variable(name, value, where) for name, value in {**plain, **named}.items()}


def _variable(name: str, value: Any, where: str) -> str:
    if isinstance(value, (dict, list)) or value is None or "\0" in str(value) or "=" in name or not name:
        raise ConfigError(f"{where}: env: {name} is not a text, a number or true or false.")
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- reading -----------------------------------------------------------------------------------------------------


def is_file_name(text: str) -> bool:
    """Whether an argument names an ecosystem file and not an application."""
    return text.endswith(SUFFIXES)


def default_file(folder: Path) -> Path | None:
    """The ecosystem file of a folder, if there is one."""
    return next((folder / name for name in DEFAULT_FILES if (folder / name).is_file()), None)


def read(path: Path, fallback_name: Callable[[str], str]) -> Ecosystem:
    """Read and check an ecosystem file.

    Args:
        path: The file.
        fallback_name: Makes a name from the application's, for a file that is one application without a name.

    Raises:
        ConfigError: It cannot be read, or has a key that is unknown.
    """
    path = Path(os.path.abspath(path))
    content = _parse(path)
    if "apps" not in content:
        checked = _checked(content, path.name)
        name = str(checked.get("name") or fallback_name(str(checked.get("app", ""))))
        return Ecosystem(path, {check_name(name): checked}, is_single=True)
    common = _checked({key: value for key, value in content.items() if key != "apps"}, path.name)
    sections: dict[str, Mapping[str, Any]] = {}
    for name, section in _named(content["apps"], path):
        if name in sections:
            raise ConfigError(f"{path}: two apps are named {name!r}.")
        checked = _checked(section, f"{path.name} [{name}]")
        for place, env in ((path.name, common.get("env", {})), (f"{path.name} [{name}]", checked.get("env", {}))):
            if not isinstance(env, dict):
                raise ConfigError(f"{place}: env is not a table of variables.")
        env = {**common.get("env", {}), **checked.get("env", {})}
        sections[check_name(name)] = {**common, **checked, **({"env": env} if env else {})}
    if not sections:
        raise ConfigError(f"{path}: there is no app in it.")
    return Ecosystem(path, sections, is_single=False)


def _named(apps: Any, path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if isinstance(apps, dict):
        pairs = list(apps.items())
    elif isinstance(apps, list):
        pairs = [(each.get("name") if isinstance(each, dict) else None, each) for each in apps]
    else:
        raise ConfigError(f"{path}: apps is neither a table nor a list.")
    for number, (name, section) in enumerate(pairs, 1):
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: apps: number {number} is not a table of settings.")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{path}: apps: number {number} has no name.")
        yield name, section


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = _PARSERS[path.suffix](text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file.", advice="Write one: sharedcluster init") from None
    except KeyError:
        raise ConfigError(f"{path}: it is none of {', '.join(SUFFIXES)}.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: it is not a table of settings.")
    return content


def _parse_yaml(text: str) -> Any:
    try:
        import yaml  # an extra
    except ImportError:
        raise ConfigError("A YAML file needs a package.", advice='pip install "sharedcluster[yaml]"') from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


_PARSERS: Final[Mapping[str, Callable[[str], Any]]] = {
    ".toml": tomllib.loads,
    ".json": json.loads,
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
}


def _checked(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A section with the names of settings as they are in Python; an unknown key is refused."""
    known = {*configuration.settings(), *upkeep_settings(), *OTHER_KEYS}
    checked: dict[str, Any] = {}
    for key, value in section.items():
        name = key.replace("-", "_")
        if name in known:
            checked[name] = value
        elif key.startswith("env_") and isinstance(value, dict):
            checked[key] = value
        elif key in ELSEWHERE:
            raise ConfigError(f"{where}: {key!r} is called {ELSEWHERE[key]} here.")
        elif key in POINTLESS:
            raise ConfigError(f"{where}: there is no {key!r}: {POINTLESS[key]}.", advice="Remove the key.")
        else:
            raise ConfigError(f"{where}: unknown key {key!r}{_suggest(name, sorted(known))}.")
    return checked


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
