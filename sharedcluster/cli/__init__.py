"""The `sharedcluster` command, one module per group of verbs.

Nothing heavy is imported here: `list` and `--help` answer at once, and the process that runs `run` becomes the
primary, which must stay clean. What a command needs beyond that it imports itself.
"""

from __future__ import annotations

import errno
import os
import sys

import click

from sharedcluster.cli import keeping, load_test, logs, looking, monit, saving, serving, templates, workers
from sharedcluster.control.protocol import ControlError
from sharedcluster.errors import AppLoadError, UserError
from sharedcluster.version import VERSION

EXAMPLES = """
\b
In the foreground:
  sharedcluster run demo_app                    the demo, on http://127.0.0.1:8000
  sharedcluster run shop.web:create_app() -w 4  a factory, four workers
\b
Kept in the background:
  sharedcluster init                            write sharedcluster.toml
  sharedcluster start                           every app in it
  sharedcluster list                            what runs, and how
  sharedcluster reload shop                     new code, nobody notices
  sharedcluster logs shop --worker 1            follow one worker
  sharedcluster save; sharedcluster startup     have them back after a reboot
\b
NAME below is the name of an app, its number in `list`, or `all`.
"""


class Verbs(click.Group):
    """Commands in the order in which one meets them, with PM2's other names for them."""

    aliases = {"ls": "list", "ps": "list", "show": "describe", "info": "describe", "del": "delete"}  # noqa: RUF012

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by its name or its other name."""
        return super().get_command(ctx, self.aliases.get(cmd_name, cmd_name))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table below, not of the alphabet."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """An unknown verb gets a suggestion."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(args[0], [*self.commands, *self.aliases], n=1)
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
        return super().resolve_command(ctx, args)


@click.group(
    cls=Verbs,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(message="%(version)s", version=VERSION)
def cli() -> None:
    """One Flask app on all cores, with one state."""


for _command in (
    serving.run,
    serving.check,
    serving.config,
    keeping.start,
    keeping.stop,
    keeping.restart,
    keeping.reload,
    keeping.scale,
    keeping.signal_command,
    keeping.reset,
    keeping.delete,
    looking.list_command,
    looking.status,
    looking.describe,
    workers.drain,
    logs.logs,
    logs.flush,
    monit.monit,
    saving.save,
    saving.resurrect,
    saving.startup,
    templates.init,
    templates.completion,
    load_test.load_test,
):
    cli.add_command(_command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a user did wrong is one block on stderr, without a traceback."""
    try:
        code = cli.main(arguments, prog_name="sharedcluster", standalone_mode=False)
        _let_go_of_a_full_disk()
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except UserError as error:
        show_error(error)
        sys.exit(error.exit_code)
    except ControlError as error:
        click.echo(f"sharedcluster: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `sharedcluster status | head`
        sys.stderr.close()
        sys.exit(0)


def _let_go_of_a_full_disk() -> None:
    """Log lines that cannot be written must not turn a clean end into Python's exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show_error(error: UserError) -> None:
    """What happened, the fact, what to type; and the application's own traceback, if that is what it is about."""
    if isinstance(error, AppLoadError) and error.traceback:
        click.echo(error.traceback, err=True)
    lines = str(error).splitlines()
    click.echo("\n".join([f"sharedcluster: {lines[0]}", *(f"  {line}" for line in lines[1:])]), err=True)
