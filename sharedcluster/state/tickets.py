"""What callers have on its way to Redis, and which of it goes as one (`connection` says when; pure but for `tell`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from sharedcluster.errors import Bug
from sharedcluster.state.runtime import Parking
from sharedcluster.state.scripting import JointScript, Part
from sharedcluster.state.wire import ReplyError

# Callers whose parts run as one: Redis does nothing else meanwhile, half a millisecond for so many saves.
RUN_LIMIT = 64


class Ticket:
    """One caller's commands on their way: what to send, how many replies to expect, and what came of it.

    Those who run with others bring a part of a script instead of data.
    """

    __slots__ = ("abandoned", "batch", "count", "data", "error", "lost", "parking", "part", "replies")

    def __init__(self, data: bytes, count: int, part: Part | None = None) -> None:
        self.data = data
        self.count = count
        self.part = part
        self.replies: list[Any] | None = None
        self.error = ""
        self.lost = self.abandoned = False  # lost: the connection broke; sending again may help
        self.batch: list[Ticket] | None = None  # set when the caller is to lead
        self.parking: Parking | None = None  # set for those who wait

    def fail(self, error: str, *, lost: bool = False) -> None:
        """Nothing came of it, and why; `lost` as above."""
        self.error = error
        self.lost = lost


class Submitted(Ticket):
    """A part on its way, which nobody waits for."""

    __slots__ = ("_then", "is_done")

    def __init__(self, part: Part) -> None:
        Ticket.__init__(self, b"", 1, part)
        self.is_done = False
        self._then: list[Callable[[], object]] = []

    def when_done(self, function: Callable[[], object]) -> None:
        """Have a function called once when `GroupCommit.settle` need not wait: now, or then, in the thread that
        submitted. It must neither wait nor raise.
        """
        self._then.append(function)
        if self.is_done:
            self.tell()

    def tell(self) -> None:
        """Call who waits for it to be done. Whoever takes it out calls it, for it may be noted at the same moment."""
        then = self._then
        while then:
            try:
                function = then.pop()
            except IndexError:
                return
            function()


_part_of = attrgetter("part")


class Run(Ticket):
    """What goes over the wire for several callers' parts of one script."""

    __slots__ = ("_tickets",)

    def __init__(self, script: JointScript, tickets: Sequence[Ticket]) -> None:
        Ticket.__init__(self, script.command([*map(_part_of, tickets)]), 1)
        self._tickets = tickets

    def hand_out(self) -> list[Any]:
        """Give each caller what became of its part: of the whole run, if that was refused. Returns all of it."""
        assert self.replies is not None
        (answers,) = self.replies
        if type(answers) is ReplyError:
            answers = [answers] * len(self._tickets)
        if len(answers) != len(self._tickets):
            raise Bug(f"{len(answers)} answers for {len(self._tickets)} parts of a script")
        for ticket, answer in zip(self._tickets, answers, strict=True):
            ticket.replies = [answer]
        return answers  # type: ignore[no-any-return]


def join(batch: list[Ticket]) -> tuple[list[Ticket], list[Run]]:
    """What is sent for a batch, and the runs in it: each of parts of one script, and of `RUN_LIMIT` at most."""
    if not any(map(_part_of, batch)):
        return batch, []
    sent: list[Ticket] = []
    by_script: dict[JointScript, list[Ticket]] = {}
    for ticket in batch:
        if ticket.part is None:
            sent.append(ticket)
        else:
            by_script.setdefault(ticket.part.script, []).append(ticket)
    runs = [
        Run(script, tickets[start : start + RUN_LIMIT])
        for script, tickets in by_script.items()
        for start in range(0, len(tickets), RUN_LIMIT)
    ]
    return [*sent, *runs], runs
