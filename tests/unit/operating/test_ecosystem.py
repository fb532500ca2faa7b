"""The ecosystem file: what is read, in three formats, and how mistakes are answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sharedcluster.errors import ConfigError
from sharedcluster.operating import ecosystem
from sharedcluster.operating.spec import AppSpec

TOML = """
redis = "none"
workers = 2
log-max-size = "5M"
[env]
REGION = "eu"
[apps.shop]
app = "shop:create_app()"
cwd = "shop"
port = 8001
stop-exit-codes = [0, 64]
[apps.shop.env]
DEBUG = true
LEVEL = 3
[apps.shop.env.production]
LEVEL = 1
[apps.admin]
app = "admin"
workers = "max"
log_file = "both.log"
"""

CONTENT: dict[str, Any] = {
    "redis": "none",
    "workers": 2,
    "log-max-size": "5M",
    "env": {"REGION": "eu"},
    "apps": [
        {
            "name": "shop", "app": "shop:create_app()", "cwd": "shop", "port": 8001, "stop-exit-codes": [0, 64],
            "env": {"DEBUG": True, "LEVEL": 3}, "env_production": {"LEVEL": 1},
        },
        {"name": "admin", "app": "admin", "workers": "max", "log_file": "both.log"},
    ],
}  # fmt: skip


def write(folder: Path, name: str, text: str) -> Path:
    """A file with a folder for the app beside it."""
    (folder / "shop").mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def specs(path: Path, **options: Any) -> dict[str, AppSpec]:
    """The applications of a file by name."""
    return {spec.name: spec for spec in ecosystem.read(path, lambda app: "fallback").specs({"HOME": "/"}, **options)}


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.toml", TOML), ("a.json", json.dumps(CONTENT)), ("a.yaml", yaml.safe_dump(CONTENT)), ("a.yml", TOML and
     yaml.safe_dump(CONTENT))],
    ids=["toml", "json", "yaml", "yml"],
)  # fmt: skip
def test_three_formats_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    """TOML with a table of apps and YAML or JSON with a list of them give the same applications."""
    found = specs(write(tmp_path, name, text), env_name="production")
    shop, admin = found["shop"], found["admin"]
    assert list(found) == ["shop", "admin"]
    assert shop.settings == {"app": "shop:create_app()", "workers": 2, "port": 8001, "redis": "none",
                             "stop_exit_codes": [0, 64]}  # fmt: skip
    assert shop.cwd == str(tmp_path / "shop")
    assert shop.env == {"REGION": "eu", "DEBUG": "true", "LEVEL": "1"}
    assert shop.upkeep.log_max_size == 5 << 20
    assert admin.settings["workers"] == "max"
    assert admin.settings["out_file"] == admin.settings["error_file"] == "both.log"
    assert admin.env == {"REGION": "eu"}


def test_without_env_the_plain_variables_hold(tmp_path: Path) -> None:
    """A named section counts only when it is asked for."""
    assert specs(write(tmp_path, "a.toml", TOML))["shop"].env["LEVEL"] == "3"


def test_a_file_without_apps_is_one(tmp_path: Path) -> None:
    """The smallest file: settings at the top; its name is its own, or made from the application's."""
    one = specs(write(tmp_path, "a.toml", 'app = "shop"\nname = "x"\n'))
    assert [spec.name for spec in one.values()] == ["x"]
    assert list(specs(write(tmp_path, "b.toml", 'app = "shop"\n'))) == ["fallback"]


def test_only_chooses(tmp_path: Path) -> None:
    """--only NAME takes one out of the file; a name that is not there gets a suggestion."""
    path = write(tmp_path, "a.toml", TOML)
    assert list(specs(path, only=["admin"])) == ["admin"]
    with pytest.raises(ConfigError, match="did you mean 'admin'"):
        specs(path, only=["adnim"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[apps.a]\nwokers = 2", "unknown key 'wokers' (did you mean 'workers'?)"),
        ("[apps.a]\ninstances = 2", "'instances' is called workers here"),
        ('[apps.a]\nscript = "x"', "'script' is called app here"),
        ('[apps.a]\nexec_mode = "cluster"', "every app is a cluster"),
        ("[apps.a]\nmin_uptime = 5", "less than 1 s"),
        ("[apps]", "there is no app in it"),
        ("apps = 3", "apps is neither a table nor a list"),
        ("[[apps]]\napp = 'x'", "number 1 has no name"),
        ("[[apps]]\nname = 'x'\n[[apps]]\nname = 'x'", "two apps are named 'x'"),
        ("[apps.'a/b']\napp = 'x'", "cannot be the name of a cluster"),
        ("[apps.a]\ncwd = 'nowhere'", "there is no folder"),
        ("[apps.a.env]\nX = [1]", "X is not a text, a number or true or false"),
        ("[apps.a]\nenv = 3", "env is not a table"),
        ("[apps.a]\nlog_max_size = 'big'", "is not a size"),
        ("[apps.a]\ncron_restart = '* *'", "is not a cron expression"),
        ("[apps.a\n", "cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    """Whatever is wrong is refused with the file, the place and, where one is near, what was meant."""
    path = write(tmp_path, "a.toml", text)
    with pytest.raises(ConfigError) as error:
        specs(path)
    assert said in str(error.value)


def test_an_unknown_section_of_env(tmp_path: Path) -> None:
    """--env with a name that no app has is a mistake, and says which there are."""
    path = write(tmp_path, "a.toml", TOML)
    with pytest.raises(ConfigError, match=r"env\.prodution \(did you mean 'production'"):
        specs(path, env_name="prodution")


@pytest.mark.parametrize("name", ["a.ini", "missing.toml"])
def test_no_such_file_or_format(tmp_path: Path, name: str) -> None:
    """A file that is not there, or of a kind that is not read."""
    if name == "a.ini":
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError):
        specs(tmp_path / name)


def test_a_spec_survives_its_record(tmp_path: Path) -> None:
    """What is written into a record and read again is the same application."""
    for spec in specs(write(tmp_path, "a.toml", TOML)).values():
        assert AppSpec.from_json(json.loads(json.dumps(spec.as_json()))) == spec


def test_the_shells_port_is_not_everybodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$PORT of the shell does not override a port of the file, $PORT of the app's own env does."""
    monkeypatch.setenv("PORT", "9999")
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "a.toml", "[apps.one]\nport = 8001\n[apps.two]\n[apps.three]\nport = 8003\n"
                 "env = {PORT = 7777}\n")  # fmt: skip
    found = specs(path)
    monkeypatch.setenv("PORT", "9999")
    ports = {}
    for name, spec in found.items():
        monkeypatch.setenv("PORT", spec.env.get("PORT", "9999"))
        ports[name] = spec.resolve(tmp_path).config.port
    assert ports == {"one": 8001, "two": 9999, "three": 7777}
