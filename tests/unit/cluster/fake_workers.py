"""Worker handles without processes."""

from __future__ import annotations

from sharedcluster.cluster.board import ROWS, Board
from sharedcluster.cluster.ipc import MessageSocket
from sharedcluster.cluster.worker_handle import WorkerHandle, WorkerState

BOARD = Board()


def worker(
    id: int,
    slot: int | None = None,
    *,
    generation: int = 1,
    state: WorkerState = WorkerState.LISTENING,
    at: float = 0.0,
) -> WorkerHandle:
    """A handle as it is `at` seconds, with nobody at the other end of its channel."""
    nobody = MessageSocket.__new__(MessageSocket)  # no descriptors: nothing is sent here
    row = BOARD.row(id % ROWS)
    row.clear()
    handle = WorkerHandle(id, id if slot is None else slot, generation, 100_000 + id, nobody, row, at)
    handle.state = state
    if state is WorkerState.LISTENING:
        handle.listening_at = at
    return handle
