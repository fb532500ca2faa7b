"""Settings: what cannot be meant is refused with the name of the key."""

from __future__ import annotations

import pytest

from sharedcluster.errors import ConfigError
from sharedcluster.state.settings import StateSettings


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("socket_timeout", "0.5", "a number above 0"),
        ("socket_timeout", 0, "a number above 0"),
        ("near_entries", -1, "a number above 0"),
        ("near_bytes", True, "a number above 0"),
        ("session_absolute_timeout", -1, "a number, 0 or more"),
        ("session_merge", "yes", "True or False"),
        ("codec", None, "a text"),
    ],
)
def test_what_cannot_be_meant_is_refused(name: str, value: object, wanted: str) -> None:
    """The message names the key, the value and what it has to be."""
    with pytest.raises(ConfigError) as caught:
        StateSettings(**{name: value})  # type: ignore[arg-type]
    assert f"SHAREDCLUSTER_{name.upper()} is {value!r}" in str(caught.value)
    assert wanted in str(caught.value)


def test_what_can_be_meant_is_taken() -> None:
    """Whole numbers where fractions are possible, and zero where it means never."""
    settings = StateSettings(socket_timeout=2, cache_early=0, session_absolute_timeout=0)
    assert (settings.socket_timeout, settings.cache_early) == (2, 0)
