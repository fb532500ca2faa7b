"""Surviving a reboot: save, resurrect, startup."""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import click

from sharedcluster.cli.keeping import said
from sharedcluster.errors import ConfigError, UserError
from sharedcluster.operating import actions, records
from sharedcluster.operating.spec import AppSpec


@click.command()
@click.option("--force", is_flag=True, help="also when nothing runs: the list becomes empty")
def save(force: bool) -> None:
    """Write down what runs now, for `resurrect`.

    The list holds the environment of each app, so it is a file that only you can read.
    """
    running = [record.spec for record in records.load_all() if record.is_running()]
    if not running and not force:
        raise ConfigError(
            "No app is running: the saved list stays as it is.",
            advice="To save an empty list: sharedcluster save --force",
        )
    with records.locked():
        path = records.save_list(running)
    click.echo(f"saved {', '.join(spec.name for spec in running) or 'an empty list'} to {path}")


@click.command()
def resurrect() -> int:
    """Start every saved app that does not run."""
    worst = 0
    for spec in records.load_list():
        try:
            click.echo(_revive(spec))
        except UserError as error:
            click.echo(f"sharedcluster: {error}", err=True)
            worst = worst or error.exit_code
    return worst


def _revive(spec: AppSpec) -> str:
    known = records.load(spec.name)
    if known and known.is_running():
        return f"{spec.name} runs already"
    return said(actions.start(spec))


# -- startup -----------------------------------------------------------------------------------------------------


@click.command()
@click.option("--user/--system", "user", default=None, help="a unit of yours, or of the machine [system for root]")
@click.option("--print", "only_print", is_flag=True, help="only show it")
@click.option("--remove", is_flag=True, help="remove it again")
def startup(user: bool | None, only_print: bool, remove: bool) -> None:
    """Write a systemd unit that resurrects the saved apps after a reboot, and say what to type."""
    is_user = os.geteuid() != 0 if user is None else user
    path = unit_path(is_user)
    text = unit(is_user)
    if only_print:
        click.echo(text, nl=False)
        return
    if remove:
        existed = path.exists()
        path.unlink(missing_ok=True)
        click.echo(f"removed {path}" if existed else f"there is no {path}")
        click.echo(f"Type: systemctl {'--user ' if is_user else ''}daemon-reload")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path}: {error.strerror}.",
            advice=(
                f"As root: sharedcluster startup --system --print > {path}",
                "Or one of your own: sharedcluster startup --user",
            ),
        ) from error
    click.echo(f"wrote {path}\n\nType:")
    for line in _what_to_type(is_user):
        click.echo(f"  {line}")
    if not records.saved_path().exists():
        click.echo("\nNothing is saved yet: start your apps, then: sharedcluster save")


def _what_to_type(is_user: bool) -> list[str]:
    control = "systemctl --user" if is_user else "systemctl"
    lines = [f"{control} daemon-reload", f"{control} enable {unit_name(is_user)}"]
    if is_user:
        lines.append(f"loginctl enable-linger {login()}      # or your units end when you log out")
    return lines


def login() -> str:
    """The name of the user we run as."""
    with suppress(KeyError):
        return pwd.getpwuid(os.getuid()).pw_name
    return str(os.getuid())


def unit_name(is_user: bool) -> str:
    """The unit's name; a machine can have one for each user."""
    return "sharedcluster.service" if is_user else f"sharedcluster-{login()}.service"


def unit_path(is_user: bool) -> Path:
    """Where it belongs."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return (home / "systemd/user" if is_user else Path("/etc/systemd/system")) / unit_name(is_user)


def program() -> str:
    """How systemd starts the same `sharedcluster` as this one."""
    beside = Path(sys.executable).with_name("sharedcluster")
    if beside.exists():
        return str(beside)
    return shutil.which("sharedcluster") or f"{sys.executable} -m sharedcluster"


def unit(is_user: bool) -> str:
    """The unit file.

    One unit for all kept apps: `resurrect` returns when they serve, so what comes after the unit finds them ready.
    The apps live in its control group; stopping it drains them first, and takes what does not end within the time.
    """
    runtime = os.environ.get("SHAREDCLUSTER_RUNTIME_DIR")
    folders = [f"Environment=SHAREDCLUSTER_STATE_DIR={records.state_folder()}"]
    if runtime:
        folders.append(f"Environment=SHAREDCLUSTER_RUNTIME_DIR={runtime}")
    elif not is_user:
        # At boot there is no /run/user/UID yet. The records name each control socket, so the commands find them.
        name = f"sharedcluster-{login()}"
        folders += [f"RuntimeDirectory={name}", "RuntimeDirectoryMode=0700"]
        folders.append(f"Environment=SHAREDCLUSTER_RUNTIME_DIR=%t/{name}")
    lines = [
        "# Written by `sharedcluster startup`: brings the saved apps back after a reboot.",
        "[Unit]",
        "Description=Applications kept by sharedcluster" + ("" if is_user else f" for {login()}"),
        *([] if is_user else ["Wants=network-online.target", "After=network-online.target redis.service"]),
        "",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        *([] if is_user else [f"User={login()}"]),
        *folders,
        f"ExecStart={program()} resurrect",
        f"ExecReload={program()} reload all",
        f"ExecStop={program()} stop all",
        "# Apps are loaded one after the other; draining takes up to their --graceful-timeout.",
        "TimeoutStartSec=300",
        "TimeoutStopSec=60",
        "LimitNOFILE=65535",
        "",
        "[Install]",
        f"WantedBy={'default.target' if is_user else 'multi-user.target'}",
    ]
    return "\n".join(lines) + "\n"
