"""Waiting on conditions with a deadline: no test sleeps and hopes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, *, deadline: float = 15.0, interval: float = 0.02) -> T:
    """Call `condition` until it returns something true and return that.

    Args:
        condition: Asked every `interval` seconds; an `OSError` or `AssertionError` of its counts as "not yet".
        what: Named in the failure: "worker 3 listening".
        deadline: Seconds after which the test fails.
        interval: Seconds between two askings.
    """
    end = time.monotonic() + deadline
    last: BaseException | None = None
    while True:
        try:
            if result := condition():
                return result
        except (OSError, AssertionError) as error:
            last = error
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline:.0f} s: {what}" + (f" ({last})" if last else ""))
        time.sleep(interval)
