"""Side-by-side measurements of sharedcluster and its peers: `make bench`; how and why: benchmarks/README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
HOME: Final = ROOT / ".bench"
"""The ignored folder with the peers: `venv`, `node`, and what runs leave behind."""
RESULTS: Final = ROOT / "benchmarks" / "results"
