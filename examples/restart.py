"""A worker that dies is replaced. Start it, then ask for http://127.0.0.1:8000/ and for /crash, and see what happens.

The listener is the primary's and stays open: who connects while there is no worker at all waits for the next one.
"""

import os

from flask import Flask

from sharedcluster import cluster

app = Flask(__name__)


@app.get("/")
def hello() -> str:
    """Say who answers."""
    return f"Hello from worker {cluster.worker.id}\n"


@app.get("/crash")
def crash() -> str:
    """End this worker at once, as a bug would."""
    os._exit(1)


if cluster.is_primary:
    for _ in range(int(os.environ.get("WORKERS", os.cpu_count() or 1))):
        cluster.fork()

    @cluster.on("listening")
    def listening(worker: cluster.Worker, address: cluster.ListeningAddress) -> None:
        """Say who is there."""
        print(f"worker {worker.id} listens on port {address.port}", flush=True)

    @cluster.on("exit")
    def replace(worker: cluster.Worker, code: int | None, signal: str | None) -> None:
        """Fork again, unless the worker was asked to go."""
        if worker.exited_after_disconnect:
            print(f"worker {worker.id} left", flush=True)
            return
        print(f"worker {worker.id} died ({signal or code}): starting another one", flush=True)
        # A program that dies at its start would be started for ever: wait a moment.
        cluster.call_later(0.2, cluster.fork)

else:
    cluster.serve(app, port=int(os.environ.get("PORT", "8000")))
