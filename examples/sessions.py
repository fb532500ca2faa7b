"""The same login on every worker, whichever answers.

Node's tutorials end where this begins: two workers do not share a variable, so a counter or a login in memory is there
on one request and gone on the next. `SharedCluster(app)` keeps `flask.session` in Redis. `redis="auto"` takes the one
that `$REDIS_URL` names, or starts a private server for this run.
"""

import os
import secrets

from flask import Flask, redirect, request, session
from werkzeug.wrappers import Response

from sharedcluster import SharedCluster, cluster

if cluster.is_primary:
    # All workers sign the session cookie with the same key; a real program has it in its configuration.
    os.environ.setdefault("SECRET_KEY", secrets.token_hex(32))
    cluster.setup_primary(redis="auto")
    for _ in range(int(os.environ.get("WORKERS", max(2, os.cpu_count() or 1)))):
        cluster.fork()

    @cluster.on("listening")
    def listening(worker: cluster.Worker, address: cluster.ListeningAddress) -> None:
        """Say who is there."""
        print(f"worker {worker.id} listens on port {address.port}", flush=True)

else:
    app = Flask(__name__)
    app.config["SECRET_KEY"] = os.environ["SECRET_KEY"]
    SharedCluster(app)

    @app.get("/")
    def visits() -> str:
        """Count this client's visits, on whichever worker."""
        session["visits"] = session.get("visits", 0) + 1
        user = session.get("user", "nobody")
        return f"worker {cluster.worker.id}: visit {session['visits']} of {user}\n"

    @app.post("/login")
    def login() -> Response:
        """Log in as whoever you say you are."""
        session["user"] = request.form["user"]
        return redirect("/")

    cluster.serve(app, port=int(os.environ.get("PORT", "8000")))
