"""Settings: how their texts are read, and who wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharedcluster import config as c
from sharedcluster.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8000", c.BindAddress("127.0.0.1", 8000)),
        (":8000", c.BindAddress("0.0.0.0", 8000)),
        ("8000", c.BindAddress("127.0.0.1", 8000)),
        ("localhost:0", c.BindAddress("localhost", 0)),
        ("[::1]:8000", c.BindAddress("::1", 8000)),
        ("[::]:8000", c.BindAddress("::", 8000)),
        ("unix:/run/x.sock", c.BindAddress(path="/run/x.sock")),
        ("unix:///run/x.sock", c.BindAddress(path="/run/x.sock")),
        ("unix:relative.sock", c.BindAddress(path="relative.sock")),
        ("fd://3", c.BindAddress(fd=3)),
    ],
)
def test_addresses(text: str, address: c.BindAddress) -> None:
    """Every notation; what is written out again reads as the same address."""
    assert c.parse_bind(text) == address
    assert c.parse_bind(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", "nonsense", "::1:8000", "host:port", "host:65536", "unix:", "fd://x", "host:-1", "a:٣"]
)
def test_addresses_that_are_none(text: str) -> None:
    """They raise ValueError with a text for people."""
    with pytest.raises(ValueError, match=r"\w"):
        c.parse_bind(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("64K", 65536),
        ("64k", 65536),
        ("64KiB", 65536),
        ("1.5M", 1572864),
        ("2GB", 2 << 30),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """Bytes with or without a unit."""
    assert c.parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("0.5", 0.5), ("2m", 120), ("1h", 3600), ("10s", 10), ("1d", 86400)]
)
def test_durations(text: str, seconds: float) -> None:
    """Seconds with or without a unit."""
    assert c.parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "inf", "1x", "m"])
def test_durations_that_are_none(text: str) -> None:
    """Neither negative nor endless nor words."""
    with pytest.raises(ValueError, match="is not a"):
        c.parse_seconds(text)


@given(st.text(max_size=20))
def test_no_text_breaks_a_parser(text: str) -> None:
    """Whatever stands in a variable: a value or a ValueError."""
    for _, about in c.settings().values():
        try:
            about.parse(text)
        except ValueError:
            continue


def resolve(
    command_line: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
    dotenv: dict[str, str] | None = None,
    file: Path | None = None,
) -> c.Resolved:
    """Resolve with a file that is not there unless given."""
    return c.resolve(command_line or {}, environ or {}, dotenv=dotenv, file=str(file) if file else None)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sharedcluster.toml is found by accident."""
    monkeypatch.chdir(tmp_path)


def test_idle_connections_outlive_a_proxys() -> None:
    """By default an idle connection is kept longer than the 60 s after which nginx and AWS's balancers drop theirs."""
    assert resolve().config.keep_alive >= 65


def test_who_wins(tmp_path: Path) -> None:
    """Command line, environment, .env, file, default; and each value says where it came from."""
    file = tmp_path / "my.toml"
    file.write_text("workers = 5\nkeep-alive = 10\nlimit_head = '32K'\npolicy = 'sticky'\n")
    resolved = resolve(
        {"workers": "2"},
        {"SHAREDCLUSTER_WORKERS": "3", "SHAREDCLUSTER_KEEP_ALIVE": "20"},
        {"SHAREDCLUSTER_KEEP_ALIVE": "30", "SHAREDCLUSTER_LIMIT_HEAD": "16K"},
        file,
    )
    config, sources = resolved.config, resolved.sources
    assert (config.workers, sources["workers"]) == (2, "command line")
    assert (config.keep_alive, sources["keep_alive"]) == (20.0, "SHAREDCLUSTER_KEEP_ALIVE")
    assert (config.limit_head, sources["limit_head"]) == (16384, ".env: SHAREDCLUSTER_LIMIT_HEAD")
    assert (config.policy, sources["policy"]) == ("sticky", str(file))
    assert (config.graceful_timeout, sources["graceful_timeout"]) == (30.0, "default")


@pytest.mark.parametrize(
    ("given", "environ", "addresses"),
    [
        ({}, {}, "127.0.0.1:8000"),
        ({"port": "9000"}, {}, "127.0.0.1:9000"),
        ({"host": "0.0.0.0"}, {}, "0.0.0.0:8000"),
        ({"bind": ("unix:/x", "[::1]:1")}, {}, "unix:/x [::1]:1"),
        ({}, {"PORT": "5000"}, "127.0.0.1:5000"),
        ({"bind": ("0.0.0.0:80",)}, {"PORT": "5000"}, "0.0.0.0:80"),
        ({"port": "9000"}, {"SHAREDCLUSTER_BIND": "0.0.0.0:80"}, "127.0.0.1:9000"),
        ({}, {"SHAREDCLUSTER_BIND": "0.0.0.0:80,[::]:80"}, "0.0.0.0:80 [::]:80"),
    ],
)
def test_where_to_listen(given: dict[str, Any], environ: dict[str, str], addresses: str) -> None:
    """--bind, --host, --port and $PORT: what is nearer to the user wins."""
    assert " ".join(map(str, resolve(given, environ).config.addresses())) == addresses


def test_both_ways_at_once() -> None:
    """--bind and --port on one command line contradict each other."""
    with pytest.raises(ConfigError, match="twice"):
        resolve({"bind": ("0.0.0.0:80",), "port": "9000"}).config.addresses()


def test_workers_by_the_machine_or_the_platform() -> None:
    """Without a word: as many as there are CPUs, and that is said; $WEB_CONCURRENCY is heard; max is one a CPU."""
    assert "CPU" in resolve().sources["workers"]
    assert resolve(environ={"WEB_CONCURRENCY": "7"}).config.workers == 7
    assert resolve({"workers": "max"}).config.workers == resolve().config.workers


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"workers": "0"}, "--workers: the number of workers is"),
        ({"policy": "stickie"}, "did you mean 'sticky'"),
        ({"limit_head": "big"}, "--limit-head: 'big' is not a size"),
        ({"bind": ("x",)}, "--bind:"),
    ],
)
def test_bad_values_name_the_option(given: dict[str, Any], text: str) -> None:
    """The error says which option, and what would do."""
    with pytest.raises(ConfigError, match=text):
        resolve(given)


def test_a_bad_variable_is_named() -> None:
    """An environment variable that cannot be read is named as such."""
    with pytest.raises(ConfigError, match="SHAREDCLUSTER_WORKERS: 'many'"):
        resolve(environ={"SHAREDCLUSTER_WORKERS": "many"})


def test_variables_that_mean_nothing_are_pointed_out() -> None:
    """A misspelt variable is a warning with a suggestion; those of workers and of the package are known."""
    (warning,) = c.check_environment({"SHAREDCLUSTER_WORKRES": "4", "SHAREDCLUSTER_SLOT": "1", "PATH": "x"})
    assert "did you mean 'SHAREDCLUSTER_WORKERS'" in warning


@pytest.mark.parametrize("text", ["workers = [", "\x00", "workers 3"])
def test_a_file_that_is_no_toml(tmp_path: Path, text: str) -> None:
    """It is named, with what is wrong."""
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.toml cannot be read"):
        resolve(file=tmp_path / "bad.toml")
