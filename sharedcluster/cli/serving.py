"""The foreground: run, check, config."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from sharedcluster.cli.options import default_name, given, resolve, with_settings
from sharedcluster.cluster.signals import as_table
from sharedcluster.operating import ecosystem

app_argument = click.argument("app", required=False, default=None)


@click.command(epilog="\b\nSignals to the primary:\n" + as_table())
@app_argument
@with_settings
def run(**options: Any) -> int:
    """Serve APP (Flask's own notation; any WSGI callable) in the foreground until it is told to stop."""
    from sharedcluster.starting import start  # binds, starts Redis, checks the application, becomes the primary

    return start(resolve(options))


@click.command()
@app_argument
@with_settings
@click.option("--json", "as_json", is_flag=True, help="for machines")
def config(as_json: bool, **options: Any) -> None:
    """Print every setting, its value and where that came from."""
    resolved = resolve(options)
    rows = {name: (_shown(getattr(resolved.config, name)), resolved.sources[name]) for name in resolved.sources}
    if as_json:
        click.echo(json.dumps({n: {"value": v, "source": s} for n, (v, s) in rows.items()}, indent=2))
        return
    for name, (value, source) in rows.items():
        click.echo(f"{name:<20} {value!s:<32} {source}")


def _shown(value: Any) -> Any:
    if isinstance(value, tuple):
        return [str(item) for item in value]
    from sharedcluster.redis_server import redact

    return redact(value) if isinstance(value, str) and "://" in value else value


@click.command()
@click.argument("app", required=False, default=None, metavar="[APP|FILE]")
@click.option("--env", "env_name", default="", metavar="NAME", help="with this section of env")
@with_settings
def check(app: str | None, env_name: str, **options: Any) -> int:
    """Load APP and ask Redis without serving; exits with the code that `run` would fail with.

    With a FILE (TOML, YAML, JSON) every app in it is checked.
    """
    path = app if app and ecosystem.is_file_name(app) else "" if app else _file_of_several()
    if path:
        return _check_file(path, env_name, options)
    from sharedcluster.starting import check_only

    for line in check_only(resolve({**options, "app": app})):
        click.echo(line)
    return 0


def _file_of_several() -> str:
    """The ecosystem file of this folder, if there is more than one application in it."""
    path = ecosystem.default_file(Path())
    return str(path) if path and len(ecosystem.read(path, default_name).sections) > 1 else ""


def _check_file(path: str, env_name: str, options: dict[str, Any]) -> int:
    """Each application in a process of its own, with its folder and its environment."""
    import subprocess
    import sys

    options.pop("config_file", None)
    worst = 0
    file = ecosystem.read(Path(path), default_name)
    for spec in file.specs(dict(os.environ), env_name=env_name, given=given(options)):
        click.echo(f"{spec.name}")
        program = "from sharedcluster.cli import serving; raise SystemExit(serving.check_spec())"
        # By its standard input: the environment of an application holds secrets, and a command line is public.
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=spec.cwd, env=spec.variables, input=json.dumps(spec.as_json()),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        for line in (done.stdout + done.stderr).splitlines():
            click.echo(f"  {line}")
        worst = worst or done.returncode
    return worst


def check_spec() -> int:
    """Check the application of a file that standard input describes, in its own process; returns the exit code."""
    import sys

    from sharedcluster.cli import show_error
    from sharedcluster.errors import UserError
    from sharedcluster.operating.records import logs_folder
    from sharedcluster.operating.spec import AppSpec
    from sharedcluster.starting import check_only

    try:
        for line in check_only(AppSpec.from_json(json.load(sys.stdin)).resolve(logs_folder())):
            click.echo(line)
    except UserError as error:
        show_error(error)
        return error.exit_code
    return 0
