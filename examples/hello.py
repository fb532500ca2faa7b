"""A Flask application on all CPUs. Start it with `python examples/hello.py`, then open http://127.0.0.1:8000/."""

import os

from flask import Flask

from sharedcluster import cluster

app = Flask(__name__)


@app.get("/")
def hello() -> str:
    """Say who answers."""
    return f"Hello from worker {cluster.worker.id}, process {os.getpid()}\n"


if cluster.is_primary:
    print(f"primary {os.getpid()} is running", flush=True)
    for _ in range(int(os.environ.get("WORKERS", os.cpu_count() or 1))):
        cluster.fork()

    @cluster.on("listening")
    def listening(worker: cluster.Worker, address: cluster.ListeningAddress) -> None:
        """Say where."""
        print(f"worker {worker.id} listens on http://{address.address}:{address.port}/", flush=True)

else:
    cluster.serve(app, port=int(os.environ.get("PORT", "8000")))
