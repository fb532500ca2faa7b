"""Why more than one process. `/sum/N` adds the numbers up to N; `/` answers at once.

While a worker computes it does nothing else: a process runs one piece of Python at a time, and gevent does not change
that. With one worker (`WORKERS=1`) everybody waits behind `/sum/30000000`; with several, the primary hands connections
to those that are free.
"""

import os
import time

from flask import Flask

from sharedcluster import cluster

app = Flask(__name__)


@app.get("/")
def hello() -> str:
    """An answer that costs nothing."""
    return f"worker {cluster.worker.id}\n"


@app.get("/sum/<int:limit>")
def add(limit: int) -> str:
    """An answer that costs a CPU for a while."""
    start = time.monotonic()
    total = sum(range(limit + 1))
    return f"worker {cluster.worker.id}: {total} after {time.monotonic() - start:.2f} s\n"


if cluster.is_primary:
    workers = int(os.environ.get("WORKERS", max(2, os.cpu_count() or 1)))
    for _ in range(workers):
        cluster.fork()

    @cluster.on("listening")
    def listening(worker: cluster.Worker, address: cluster.ListeningAddress) -> None:
        """Say who is there."""
        print(f"worker {worker.id} listens on port {address.port}", flush=True)

else:
    cluster.serve(app, port=int(os.environ.get("PORT", "8000")))
