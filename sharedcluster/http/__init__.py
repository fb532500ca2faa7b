"""The HTTP engine of a worker: gevent's loop and httptools; knows no Flask, no Redis, no cluster."""
