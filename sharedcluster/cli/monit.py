"""A live view: monit."""

from __future__ import annotations

import click


@click.command()
def monit() -> None:
    """Watch."""
