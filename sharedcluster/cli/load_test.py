"""load-test."""

from __future__ import annotations

import click


@click.command(name="load-test")
def load_test() -> None:
    """Load."""
