"""What a worker does at this very moment, in memory that it shares with the primary: one row a worker, no messages.

A worker writes its row twice per turn of its loop, just before and just after it waits for events (0.5 us together,
measured). So the primary knows of each worker how much it has in flight, and whether its loop waits or works, and for
how long it has been working without a pause. A heartbeat says such things too, but a second late, and a loop that
stands still says nothing at all.

Every cell is one aligned word that one process writes and another reads, which needs no lock on the machines Linux
runs on; a row may be half a turn old, never torn. (`asks` is written by both; what is lost of it is asked again.)
"""

from __future__ import annotations

import mmap
import time
from typing import Final

ROWS: Final = 1024
_CELLS: Final = 16
_WAITS, _SINCE, _IN_FLIGHT, _CONNECTIONS, _REQUESTS, _ACCEPTED, _GIVEN, _ASKED, _USED, _TOLD = range(10)
_TAKEN: Final = 10
"""The first of the cells that count per listener."""
COUNTED: Final = _CELLS - _TAKEN
"""How many listeners a row has cells for."""
STANDS_STILL: Final = 50_000_000
"""Nanoseconds of work without a pause after which a loop counts as standing still for the scheduling. Less than a
view that blocks takes; more than the kernel lets a worker wait for a CPU on a busy machine (20 ms were not enough:
a worker that was merely waiting its turn lost most of its connections to the others)."""


class Board:
    """The whole memory; made in the primary before the first fork, mapped in every process forked from it.

    A worker that is executed anew inherits no memory; it maps it by a descriptor (memfd_create(2)) of `SIZE` bytes.
    """

    SIZE: Final = ROWS * _CELLS * 8

    def __init__(self, fd: int = -1) -> None:
        self._memory = mmap.mmap(fd, self.SIZE)
        self.cells = memoryview(self._memory).cast("Q")
        self._free = list(range(ROWS - 1, -1, -1))

    def take(self) -> Row:
        """A row for a new worker; it counts as working until it says otherwise."""
        row = Row(self, self._free.pop())
        row.clear()
        return row

    def row(self, number: int) -> Row:
        """A row by its number, for the process it was taken for."""
        return Row(self, number)

    def give_back(self, row: Row) -> None:
        """The row of a dead worker."""
        self._free.append(row.number)


class Row:
    """The cells of one worker: written by it, read by the primary."""

    __slots__ = ("_cells", "_start", "number")

    def __init__(self, board: Board, number: int) -> None:
        self.number = number
        self._cells = board.cells
        self._start = number * _CELLS

    def clear(self) -> None:
        """As if the worker had just begun to work."""
        for cell in range(_CELLS):
            self._cells[self._start + cell] = 0
        self._cells[self._start + _SINCE] = time.monotonic_ns()

    # -- written by the worker -------------------------------------------------------------------------------------

    def waits(self, in_flight: int, connections: int, requests: int) -> None:
        """The loop is about to wait for events."""
        cells, start = self._cells, self._start
        cells[start + _IN_FLIGHT] = in_flight
        cells[start + _CONNECTIONS] = connections
        cells[start + _REQUESTS] = requests
        cells[start + _TOLD] = cells[start + _USED]  # last: who reads in between counts a connection twice, not never
        cells[start + _WAITS] = 1

    def accepts(self, seq: int) -> None:
        """The worker owns the connections up to `seq` from now on: written before the first read of each."""
        self._cells[self._start + _ACCEPTED] = seq

    def uses_turn(self) -> None:
        """One of the turns it was given is used up: written before the accept (`turns` says why)."""
        self._cells[self._start + _USED] += 1

    def takes(self, listener: int) -> None:
        """It has accepted a connection of this listener."""
        self._cells[self._start + _TAKEN + listener] += 1

    def is_to_tell(self) -> bool:
        """Whether all turns are used and the primary wants to hear it; asking once is answered once."""
        cells, start = self._cells, self._start
        if not cells[start + _ASKED] or cells[start + _USED] < cells[start + _GIVEN]:
            return False
        cells[start + _ASKED] = 0
        return True

    def works(self) -> None:
        """The loop has events to handle."""
        self._cells[self._start + _SINCE] = time.monotonic_ns()
        self._cells[self._start + _WAITS] = 0

    # -- read by the primary ---------------------------------------------------------------------------------------

    def ask(self, given: int) -> None:
        """Have the worker say when the turns that it was given since it was forked are used up."""
        self._cells[self._start + _GIVEN] = given
        self._cells[self._start + _ASKED] = 1

    @property
    def turns_used(self) -> int:
        """How many turns it has used since it was forked."""
        return self._cells[self._start + _USED]

    @property
    def turns_told(self) -> int:
        """How many of them are in `in_flight` and `connections`: those it had used by the last pause."""
        return self._cells[self._start + _TOLD]

    def taken(self, listener: int) -> int:
        """How many connections of this listener it has accepted itself."""
        return self._cells[self._start + _TAKEN + listener]

    @property
    def all_taken(self) -> int:
        """How many connections it has accepted itself."""
        return sum(self._cells[self._start + _TAKEN : self._start + _CELLS])

    @property
    def accepted(self) -> int:
        """The number of the last connection that the worker was passed and took; true also after its death."""
        return self._cells[self._start + _ACCEPTED]

    @property
    def in_flight(self) -> int:
        """Requests being served, as of the last pause."""
        return self._cells[self._start + _IN_FLIGHT]

    @property
    def connections(self) -> int:
        """Open connections, as of the last pause."""
        return self._cells[self._start + _CONNECTIONS]

    @property
    def requests(self) -> int:
        """Requests served since the start, as of the last pause."""
        return self._cells[self._start + _REQUESTS]

    def stands_still(self, now: int) -> bool:
        """Whether the loop has worked without a pause for too long; `now` is `time.monotonic_ns()`."""
        cells, start = self._cells, self._start
        return not cells[start + _WAITS] and now - cells[start + _SINCE] > STANDS_STILL
