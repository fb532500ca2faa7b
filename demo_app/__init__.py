"""A Flask app whose session, cache and messages are the same on every worker.

    sharedcluster run demo_app

Three lines make the difference to any other Flask app: the import, `shared = SharedCluster(app)`, and the decorator or
call where something is shared. Everything else is plain Flask.
"""

from __future__ import annotations

import os
import secrets
import time
from typing import Any

from flask import Flask, Response, abort, jsonify, render_template, request, session

from sharedcluster import SharedCluster

DEVELOPMENT_KEY = "development only: set SECRET_KEY to a secret of your own"

app = Flask(__name__)
app.config.update(
    SECRET_KEY=os.environ.get("SECRET_KEY") or DEVELOPMENT_KEY,  # the same in every worker, or nobody stays logged in
    SESSION_COOKIE_SAMESITE="Lax",
)
shared = SharedCluster(app)


def this_worker() -> int | None:
    """The slot of the worker that answers; None under another server, such as `flask run`."""
    return getattr(request.environ.get("sharedcluster.worker"), "slot", None)


@app.get("/")
def index() -> str:
    """The page."""
    has_key = app.config["SECRET_KEY"] != DEVELOPMENT_KEY
    return render_template("index.html", worker=this_worker(), pid=os.getpid(), has_key=has_key)


@app.get("/whoami")
def whoami() -> dict[str, Any]:
    """Which worker answered."""
    return {"worker": this_worker(), "pid": os.getpid()}


@app.post("/counter")
def counter() -> dict[str, Any]:
    """Count in the session: the next request may come to another worker and goes on from here."""
    session["count"] = session.get("count", 0) + 1
    return {"count": session["count"], "worker": this_worker()}


@app.post("/login")
def login() -> dict[str, Any]:
    """Log in under any name; the session gets a new id, so one that was planted before is worth nothing."""
    user = form_text("user", longest=40)
    shared.sessions.rotate()
    session["user"] = user
    shared.sessions.bind_user(user)
    return me()


@app.post("/logout")
def logout() -> dict[str, Any]:
    """End the session, on all workers at once."""
    session.clear()
    return me()


@app.get("/me")
def me() -> dict[str, Any]:
    """Who is logged in, and how far this session has counted."""
    return {"user": session.get("user"), "count": session.get("count", 0), "worker": this_worker()}


@app.get("/cached")
@shared.cache.cached(timeout=10)
def cached() -> dict[str, Any]:
    """A value that takes long to compute: one worker does, once in ten seconds, and all of them serve it."""
    time.sleep(0.5)
    return {"value": f"#{secrets.token_hex(3)}", "computed_by": this_worker()}


@app.post("/broadcast")
def broadcast() -> dict[str, Any]:
    """Send a message to everybody who has the page open, on whichever worker their stream is."""
    message = {"text": form_text("text", longest=500), "user": session.get("user"), "worker": this_worker()}
    shared.publish("messages", message, history=50)
    return message


@app.get("/events")
def events() -> Response:
    """The messages as server-sent events; a browser that lost its connection gets what it missed."""
    return shared.stream("messages")


@app.get("/healthz")
def healthz() -> dict[str, str]:
    """For whoever asks whether this worker serves; does not depend on Redis."""
    return {"status": "ok"}


def form_text(name: str, *, longest: int) -> str:
    """A field of the form, without surrounding space; 400 if it is empty or too long."""
    text = request.form.get(name, "").strip()
    if not 0 < len(text) <= longest:
        abort(400, f'"{name}" has to have between 1 and {longest} characters.')
    return text


@app.errorhandler(400)
def explain(error: Any) -> tuple[Response, int]:
    """Say in JSON what was wrong with a form."""
    return jsonify(error=error.description), 400


@app.after_request
def add_headers(response: Response) -> Response:
    """Nothing from elsewhere may run on the page; and this demo wants every answer from another worker."""
    response.headers["Content-Security-Policy"] = "default-src 'self'; base-uri 'none'; frame-ancestors 'none'"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "same-origin"
    if request.endpoint not in ("static", "events"):
        response.headers["Cache-Control"] = "no-store"
        # A connection stays with its worker, and a browser keeps its connections. Leave this out of your own app.
        response.headers["Connection"] = "close"
    return response
