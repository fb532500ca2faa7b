"""The deployment files, without Docker: their form, and the very command and environment they start."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster_process import ROOT, Cluster
from tests.redis_process import free_port
from tests.waiting import wait_until

COMPOSE_FILE = ROOT / "docker-compose.redis.yml"
DRAIN_DEADLINE = 30  # the default of --graceful-timeout


class Dockerfile:
    """The last stage of the Dockerfile, instruction by instruction."""

    def __init__(self, path: Path) -> None:
        text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
        self.instructions = [
            (name, rest) for line in text.splitlines() if line for name, _, rest in [line.partition(" ")]
        ]
        self.stage = self.instructions[max(i for i, (name, _) in enumerate(self.instructions) if name == "FROM") :]

    def one(self, wanted: str) -> str:
        """The text of an instruction that stands there once."""
        [text] = [rest.strip() for name, rest in self.stage if name == wanted]
        return text

    def exec_form(self, wanted: str) -> list[str]:
        """The words of an instruction in exec form; a shell form is not JSON and fails."""
        words = json.loads(self.one(wanted).partition("CMD ")[2] if wanted == "HEALTHCHECK" else self.one(wanted))
        assert isinstance(words, list)
        return words

    @property
    def environment(self) -> dict[str, str]:
        """What ENV sets."""
        pairs = (pair.partition("=") for name, rest in self.stage if name == "ENV" for pair in shlex.split(rest))
        return {key: value for key, _, value in pairs}


@pytest.fixture(scope="module")
def dockerfile() -> Dockerfile:
    """The parsed Dockerfile."""
    return Dockerfile(ROOT / "Dockerfile")


def interpolate(text: str, environ: dict[str, str]) -> str:
    """Compose's `${NAME:-default}` and `${NAME:?error}`."""

    def value(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        if environ.get(name):
            return environ[name]
        if operator == ":?":
            raise KeyError(f"{name}: {rest}")
        return rest

    return re.sub(r"\$\{(\w+)(:[-?])([^}]*)\}", value, text)


def read_compose(environ: dict[str, str]) -> dict[str, Any]:
    """The compose file as Docker would read it."""
    services: dict[str, Any] = yaml.safe_load(interpolate(COMPOSE_FILE.read_text(), environ))["services"]
    return services


def test_the_compose_file_follows_the_specification() -> None:
    """The published schema of the Compose specification accepts the file."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE_FILE)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_compose_refuses_to_start_without_a_secret_key() -> None:
    """No default key: the file names what to set, and nothing starts."""
    with pytest.raises(KeyError, match=r"SECRET_KEY: set it in \.env"):
        read_compose({})


def test_the_services_fit_together() -> None:
    """Web waits for a healthy Redis nobody else can reach, and has more time to stop than a drain takes."""
    services = read_compose({"SECRET_KEY": "k"})
    web, redis = services["web"], services["redis"]
    assert web["depends_on"]["redis"]["condition"] == "service_healthy"
    assert "redis-cli" in redis["healthcheck"]["test"][1]
    assert "ports" not in redis
    assert not any(word.startswith("allkeys") for word in redis["command"])
    assert web["environment"]["REDIS_URL"].startswith("redis://redis:")
    assert int(web["stop_grace_period"].removesuffix("s")) >= DRAIN_DEADLINE + 5
    assert web["ports"] == ["127.0.0.1:8000:8000"]


def test_the_image_runs_the_primary_as_a_user_without_rights(dockerfile: Dockerfile) -> None:
    """Fixed numeric user, exec form (so that the primary is process 1 and gets TERM), all addresses, no secrets."""
    user, _, group = dockerfile.one("USER").partition(":")
    assert int(user) >= 1000
    assert int(group) >= 1000
    assert dockerfile.exec_form("ENTRYPOINT") == ["sharedcluster"]
    assert dockerfile.exec_form("CMD")[0] == "run"
    assert dockerfile.one("STOPSIGNAL") == "SIGTERM"
    assert dockerfile.environment["SHAREDCLUSTER_BIND"].startswith("0.0.0.0:")
    assert not {key for key in dockerfile.environment if re.search("SECRET|PASSWORD|TOKEN", key)}


def test_what_the_image_is_built_from_is_let_in(dockerfile: Dockerfile) -> None:
    """Every COPY of the build stage names something that exists and that .dockerignore lets through."""
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [rest.split()[:-1] for name, rest in dockerfile.instructions if name == "COPY" and "--from" not in rest]
    copied = {source for words in sources for source in words}
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)


@pytest.fixture
def service(dockerfile: Dockerfile, redis_url: str) -> Iterator[Cluster]:
    """The web service without a container: the same command and environment, another Redis and a free port."""
    web = read_compose({"SECRET_KEY": "a key of this test"})["web"]
    host, _, usual_port = dockerfile.environment["SHAREDCLUSTER_BIND"].rpartition(":")
    assert web["ports"][0].endswith(f":{usual_port}")
    cluster = Cluster(env=dockerfile.environment | web["environment"])
    cluster.env |= {"REDIS_URL": redis_url, "SHAREDCLUSTER_BIND": f"{host}:{free_port()}"}
    cluster.env |= {"SHAREDCLUSTER_WORKERS": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    cluster.command = [*dockerfile.exec_form("ENTRYPOINT"), *web["command"]]
    try:
        yield cluster.start()
    finally:
        cluster.close()


def test_the_service_drains_on_term(service: Cluster, dockerfile: Dockerfile) -> None:
    """Its health check passes; TERM while 20 requests run: all are answered 200, exit code 0, nothing is left."""
    checked = subprocess.run(dockerfile.exec_form("HEALTHCHECK"), env=service.env, check=False)
    assert checked.returncode == 0
    assert service.post("/counter").status == 200
    wait_until(lambda: service.status()["redis"]["state"] == "ok", "the heartbeats tell that Redis is in use")
    clients = [socket.create_connection(("127.0.0.1", service.port), timeout=20) for _ in range(20)]
    for client in clients:  # one computes for half a second, the others wait for it
        client.sendall(b"GET /cached HTTP/1.1\r\nHost: test\r\n\r\n")
    service.note_processes()
    service.signal(signal.SIGTERM)
    answers = [read_answer(client) for client in clients]
    assert {status for status, _ in answers} == {200}
    assert len({body for _, body in answers}) == 1
    assert service.wait() == 0
    assert service.left_over() == []
    assert list(service.runtime.glob("*")) == []


def read_answer(client: socket.socket) -> tuple[int, bytes]:
    """Status and body of one response."""
    with client:
        response = http.client.HTTPResponse(client)
        response.begin()
        return response.status, response.read()
