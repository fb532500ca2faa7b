"""Files to begin with, and the shell's completion: init, completion."""

from __future__ import annotations

import click


@click.command()
def init() -> None:
    """Write sharedcluster.toml."""


@click.command()
def completion() -> None:
    """Print completion."""
