"""One Flask app on all cores, with one state.

Importing this package loads nothing heavy: the primary and the operators' commands import it too, and neither may
pull in gevent, redis or flask. The public names are resolved on first use (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharedcluster.version import VERSION

if TYPE_CHECKING:
    from sharedcluster.flask import SharedCluster as SharedCluster

__version__ = VERSION
__all__ = ["SharedCluster", "__version__"]


def __getattr__(name: str) -> object:
    """Import `SharedCluster` when somebody asks for it."""
    if name == "SharedCluster":
        from sharedcluster.flask import SharedCluster  # the extension imports flask, so only on demand

        return SharedCluster
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
