"""gevent's own WSGI server, forked: one listening socket, workers accept themselves."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import importlib  # noqa: E402 - after patching
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402

import gevent  # noqa: E402
from gevent import pywsgi, socket  # noqa: E402


def main() -> None:
    """`run_pywsgi.py MODULE:NAME PORT WORKERS`."""
    target, port, workers = sys.argv[1:4]
    module, _, name = target.partition(":")
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", int(port)))
    listener.listen(2048)
    children = []
    for _ in range(int(workers)):
        pid = gevent.os.fork()
        if pid == 0:
            app = getattr(importlib.import_module(module), name)
            pywsgi.WSGIServer(listener, app, log=None).serve_forever()
        children.append(pid)

    def end() -> None:
        for pid in children:
            os.kill(pid, signal.SIGKILL)

    gevent.signal_handler(signal.SIGTERM, end)
    for pid in children:
        gevent.os.waitpid(pid, 0)


main()
