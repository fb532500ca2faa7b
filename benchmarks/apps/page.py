"""What the Python applications with state have in common: the session's content and the page worth caching."""

from __future__ import annotations

import time


def fresh_session() -> dict[str, object]:
    """What a small shop keeps of a visitor: about 200 bytes."""
    return {"user": "ada", "count": 0, "cart": {"book": 2, "pen": 5}, "theme": "dark", "seen": list(range(20))}


def render() -> str:
    """About 4 KB of HTML that took 20 ms to make, so that an uncached answer would be seen at once."""
    time.sleep(0.02)
    return "<ul>" + "".join(f"<li>item {number} of the catalogue</li>" for number in range(120)) + "</ul>"
