"""Files to begin with, and the shell's completion: init, completion."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import get_completion_class

from sharedcluster import config as configuration
from sharedcluster.cli.saving import login, program
from sharedcluster.config import Setting
from sharedcluster.control.protocol import check_name
from sharedcluster.errors import ConfigError
from sharedcluster.operating.spec import Upkeep, upkeep_settings

NOT_IN_FILE: Final = frozenset(("app", "workers", "port", "name", "control", "pid_file", "bind", "host"))
"""Settings that the written file has already, or that make no sense for a kept application."""


@click.command(epilog="\b\nExamples:\n  sharedcluster init\n  sharedcluster init shop:create_app() --docker --systemd")
@click.argument("app", required=False, default=None)
@click.option("--docker", is_flag=True, help="also Dockerfile, compose.yaml and .dockerignore")
@click.option("--systemd", is_flag=True, help="also a unit that runs the app in the foreground")
@click.option("--k8s", is_flag=True, help="also k8s.yaml: deployment, service, disruption budget")
@click.option("--force", is_flag=True, help="overwrite what is there")
def init(app: str | None, docker: bool, systemd: bool, k8s: bool, force: bool) -> None:
    """Write a commented sharedcluster.toml for the app in this folder; nothing that is there is overwritten."""
    target = app or _guess(Path())
    name = _name(target)
    files = {"sharedcluster.toml": ecosystem_file(name, target)}
    if docker:
        files |= {"Dockerfile": _fill(DOCKERFILE, name), "compose.yaml": _fill(COMPOSE, name)}
        files |= {".dockerignore": DOCKERIGNORE}
    if systemd:
        files[f"{name}.service"] = _fill(UNIT, name)
    if k8s:
        files["k8s.yaml"] = _fill(KUBERNETES, name)
    existing = [path for path in files if Path(path).exists()]
    if existing and not force:
        raise ConfigError(
            f"There is already: {', '.join(existing)}.", advice="To overwrite: sharedcluster init --force"
        )
    for path, text in files.items():
        Path(path).write_text(text)
        click.echo(f"wrote {path}")
    click.echo("\nNext: sharedcluster check sharedcluster.toml; sharedcluster start")


def _guess(folder: Path) -> str:
    """The application of a folder: where Flask would look first, else a file that makes one."""
    for name in ("wsgi.py", "app.py"):
        if (folder / name).is_file():
            return name.removesuffix(".py")
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/__init__.py")]):
        if "Flask(" in path.read_text(errors="replace"):
            return str(path.parent) if path.name == "__init__.py" else path.stem
    return "app"


def _name(target: str) -> str:
    from sharedcluster.cli.options import default_name

    return check_name(default_name(target))


def _fill(template: str, name: str) -> str:
    facts = {"NAME": name, "PROGRAM": program(), "FOLDER": os.getcwd(), "USER": login()}
    for key, value in facts.items():
        template = template.replace(f"@{key}@", value)
    return template


# -- the ecosystem file ------------------------------------------------------------------------------------------


def ecosystem_file(name: str, target: str) -> str:
    """A sharedcluster.toml with every key there is, commented out with its default."""
    lines = [
        "# Applications that `sharedcluster start` keeps. Keys above the first section hold for all of them.",
        "# `sharedcluster check sharedcluster.toml` reads it without starting anything.",
        "",
        f"[apps.{_toml_key(name)}]",
        f"app = {_toml(target)}          # a module, package or file, with :name or :factory() if need be",
        'workers = "max"          # one for each CPU',
        "port = 8000",
        "",
        "# How it serves; more on each: sharedcluster run --help",
        *(
            _commented(key, declared.default, about)
            for key, (declared, about) in configuration.settings().items()
            if key not in NOT_IN_FILE
        ),
        "",
        "# How it is kept",
        '#cwd = "."  # the folder it runs in, seen from this file',
        '#log_file = "logs/both.log"  # both streams in one file, instead of out_file and error_file',
        *(_commented(key, getattr(Upkeep(), key), about) for key, about in upkeep_settings().items()),
        "",
        f"[apps.{_toml_key(name)}.env]",
        '#SECRET_KEY = "the same for all workers; better in .env"',
        "",
        f"[apps.{_toml_key(name)}.env.production]          # with: sharedcluster start --env production",
        '#LOG_LEVEL = "warning"',
    ]
    return "\n".join(lines) + "\n"


def _commented(key: str, default: Any, about: Setting) -> str:
    return f"#{key} = {_toml(default)}  # {about.help}"


def _toml_key(name: str) -> str:
    return f'"{name}"' if "." in name else name


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


# -- deployment --------------------------------------------------------------------------------------------------
# The time-outs belong together: 30 s to drain, and more than that for whoever would kill it.

DOCKERFILE: Final = """\
FROM python:3.14-slim AS build
WORKDIR /src
COPY requirements.txt ./
RUN pip wheel --wheel-dir /wheels -r requirements.txt sharedcluster

FROM python:3.14-slim
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels pip install --no-index /wheels/*
RUN useradd --uid 10001 --create-home app
WORKDIR /app
COPY . .
USER app
EXPOSE 8000
STOPSIGNAL SIGTERM
# Exec form: the primary is process 1 and gets the signals. Workers follow the CPU quota.
CMD ["sharedcluster", "run", "@NAME@", "--host", "0.0.0.0", "--port", "8000"]
"""

DOCKERIGNORE: Final = """\
.git
.venv
.env
__pycache__
*.log
"""

COMPOSE: Final = """\
services:
  web:
    build: .
    ports: ["8000:8000"]
    environment:
      REDIS_URL: redis://redis:6379/0
      SECRET_KEY: ${SECRET_KEY:?write it into .env}
    depends_on:
      redis:
        condition: service_healthy
    restart: unless-stopped
    stop_grace_period: 40s      # more than --graceful-timeout
  redis:
    image: redis:8
    command: ["redis-server", "--save", "", "--maxmemory-policy", "noeviction"]
    healthcheck:
      test: ["CMD", "redis-cli", "ping"]
      interval: 2s
      start_period: 5s
"""

UNIT: Final = """\
# One application in the foreground under systemd: copy it to /etc/systemd/system/, then
#   systemctl daemon-reload; systemctl enable --now @NAME@
[Unit]
Description=@NAME@ (sharedcluster)
Wants=network-online.target
After=network-online.target redis.service

[Service]
Type=notify
NotifyAccess=all
WorkingDirectory=@FOLDER@
EnvironmentFile=-@FOLDER@/.env
RuntimeDirectory=sharedcluster-@NAME@
RuntimeDirectoryMode=0700
Environment=SHAREDCLUSTER_RUNTIME_DIR=%t/sharedcluster-@NAME@
ExecStart=@PROGRAM@ run @NAME@
ExecReload=@PROGRAM@ reload @NAME@
KillMode=mixed
TimeoutStopSec=40
WatchdogSec=30
Restart=on-failure
RestartPreventExitStatus=2 3
LimitNOFILE=65535
NoNewPrivileges=yes
PrivateTmp=yes
User=@USER@

[Install]
WantedBy=multi-user.target
"""

KUBERNETES: Final = """\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: @NAME@
spec:
  replicas: 2
  strategy:
    rollingUpdate: {maxUnavailable: 0, maxSurge: 1}
  selector:
    matchLabels: {app: @NAME@}
  template:
    metadata:
      labels: {app: @NAME@}
    spec:
      terminationGracePeriodSeconds: 45     # 5 s until no more traffic comes, 30 s to drain, and a margin
      containers:
        - name: web
          image: @NAME@:latest
          ports: [{containerPort: 8000}]
          env:
            - {name: REDIS_URL, value: "redis://redis:6379/0"}
            - name: SECRET_KEY
              valueFrom: {secretKeyRef: {name: @NAME@, key: secret-key}}
          resources:
            requests: {cpu: "2", memory: 512Mi}
            limits: {cpu: "2", memory: 512Mi}     # the number of workers follows the CPU limit
          readinessProbe:
            tcpSocket: {port: 8000}               # better: httpGet with a path of your app
            periodSeconds: 2
          lifecycle:
            preStop: {sleep: {seconds: 5}}
          securityContext:
            runAsNonRoot: true
            allowPrivilegeEscalation: false
---
apiVersion: v1
kind: Service
metadata:
  name: @NAME@
spec:
  selector: {app: @NAME@}
  ports: [{port: 80, targetPort: 8000}]
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: @NAME@
spec:
  maxUnavailable: 1
  selector:
    matchLabels: {app: @NAME@}
"""


# -- completion --------------------------------------------------------------------------------------------------


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    r"""Print the completion of SHELL, for its start-up file.

    \b
    bash:  sharedcluster completion bash >> ~/.bashrc
    zsh:   sharedcluster completion zsh >> ~/.zshrc
    fish:  sharedcluster completion fish > ~/.config/fish/completions/sharedcluster.fish
    """
    from sharedcluster.cli import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"there is no completion for {shell}")
    click.echo(textwrap.dedent(kind(cli, {}, "sharedcluster", "_SHAREDCLUSTER_COMPLETE").source()))
