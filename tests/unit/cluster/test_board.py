"""The board: what a worker does at this moment, seen from another process."""

from __future__ import annotations

import os
import time

from sharedcluster.cluster.board import ROWS, STANDS_STILL, Board


def test_what_a_child_writes_is_seen_here() -> None:
    """A row written in a forked process is read in its parent."""
    board = Board()
    row = board.take()
    pid = os.fork()
    if pid == 0:
        row.waits(3, 40, 500)
        os._exit(0)
    os.waitpid(pid, 0)
    assert (row.in_flight, row.connections, row.requests) == (3, 40, 500)


def test_a_loop_stands_still_after_a_while_of_work() -> None:
    """Waiting is not standing still, however long; working is, after a while without a pause."""
    row = Board().take()
    row.works()
    now = time.monotonic_ns()
    assert not row.stands_still(now)
    assert row.stands_still(now + 2 * STANDS_STILL)
    row.waits(0, 0, 0)
    assert not row.stands_still(now + 1000 * STANDS_STILL)


def test_rows_are_used_again_and_clean() -> None:
    """There are as many as there can be workers; one that was given back says nothing of its past."""
    board = Board()
    rows = [board.take() for _ in range(ROWS)]
    assert len({row.number for row in rows}) == ROWS
    rows[5].waits(9, 9, 9)
    board.give_back(rows[5])
    assert board.take().in_flight == 0
