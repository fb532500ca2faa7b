"""Three-way merge of one value that two requests have changed at the same time. Pure."""

from __future__ import annotations

from typing import Any

_MISSING: Any = object()


def merge(base: Any, theirs: Any, mine: Any) -> Any:
    """What comes out when `base` was changed to `theirs` by somebody else and to `mine` by us.

    Dicts are merged key by key, lists that both have appended to get both tails (theirs first). For everything else
    the last writer wins, which is us.
    """
    if mine == base:
        return theirs
    if theirs in (base, mine):
        return mine
    if type(mine) is dict and type(theirs) is dict:
        return _merge_dicts(base if type(base) is dict else {}, theirs, mine)
    if type(mine) is list and type(theirs) is list:
        start = base if type(base) is list else []
        if mine[: len(start)] == start and theirs[: len(start)] == start:
            return theirs + mine[len(start) :]
    return mine


def _merge_dicts(base: dict[Any, Any], theirs: dict[Any, Any], mine: dict[Any, Any]) -> dict[Any, Any]:
    merged: dict[Any, Any] = {}
    for key in [*theirs, *(key for key in mine if key not in theirs)]:
        old, new, own = base.get(key, _MISSING), theirs.get(key, _MISSING), mine.get(key, _MISSING)
        # A key that one side removed and the other left alone is gone; one that the other changed stays.
        if own is _MISSING:
            value = _MISSING if new == old else new
        elif new is _MISSING:
            value = _MISSING if own == old else own
        else:
            value = merge(old, new, own)
        if value is not _MISSING:
            merged[key] = value
    return merged
