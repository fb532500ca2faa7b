"""What our own clients are told to do; travels as one line of JSON on their command line."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """Load by `load/client.py`.

    Attributes:
        connections: Clients; each has its own connection and its own cookies.
        login: A path each client posts to once, before anything is measured.
        think: Seconds a client pauses between answer and next request (uniform from 0.5 to 1.5 times this).
        rate: Requests per second over all clients, due at fixed times whether or not earlier ones were answered; a
            wait is then counted from when the request was due, so a server that stalls cannot hide it by slowing the
            client down (coordinated omission). 0: each client asks again as soon as it was answered.
        new_connection: One request per connection.
    """

    port: int
    path: str
    connections: int
    seconds: float
    method: str = "GET"
    login: str = ""
    think: float = 0.0
    rate: float = 0.0
    new_connection: bool = False

    def dumps(self) -> str:
        """As text."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def loads(text: str) -> Plan:
        """From text."""
        return Plan(**json.loads(text))
