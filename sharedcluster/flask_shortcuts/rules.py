"""Which rule a path has, remembered where no part of the path is a value.

Flask asks Werkzeug anew for each request, which walks from part to part of the path. For `/` and `/login` it comes to
the same rule each time, until rules are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, cast

from werkzeug.routing import Map, MapAdapter, Rule

PATHS_LIMIT: Final = 1000
LENGTH_LIMIT: Final = 512
"""Of path and host together."""


@dataclass(frozen=True, slots=True)
class KnownRequest:
    """What the requests for one path have in common: attributes of request and URL adapter, copied, and the rule."""

    request: dict[str, Any]
    adapter: dict[str, Any]
    rule: Rule


class Rules:
    """`MapAdapter.match` of one URL map, and what requests are known by it (`contexts`)."""

    def __init__(self, url_map: Map) -> None:
        self.map = url_map
        self.requests: dict[tuple[Any, ...], KnownRequest] = {}
        self._known: dict[tuple[Any, ...], Rule] = {}
        self._add = url_map.add
        url_map.add = self.add  # type: ignore[method-assign]

    def add(self, rulefactory: Any) -> None:
        """Add to the map, as `Map.add`. What is known so far may be another rule's from now on."""
        try:
            self._add(rulefactory)
        finally:
            self._known = {}
            self.requests = {}

    def match(self, adapter: MapAdapter) -> tuple[Rule, dict[str, Any]]:
        """The rule of a request and what its path gives the view. Raises what Werkzeug raises."""
        url_map = self.map
        path, method, websocket = adapter.path_info, adapter.default_method, adapter.websocket
        facts = (
            path,
            method,
            websocket,
            adapter.server_name,
            adapter.subdomain,
            url_map.host_matching,
            url_map.redirect_defaults,
        )
        rule = self._known.get(facts)
        if rule is not None and adapter.map is url_map:
            return rule, {}
        known = self._known
        rule, values = cast(tuple[Rule, dict[str, Any]], adapter.match(return_rule=True))
        is_short = len(path) + len(adapter.server_name) <= LENGTH_LIMIT
        if is_short and not values and type(adapter) is MapAdapter and adapter.map is url_map:
            if len(known) >= PATHS_LIMIT:
                known.clear()
            known[facts] = rule  # if rules have been added meanwhile, nobody will look into this one
        return rule, values
