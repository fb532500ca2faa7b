"""One program that is primary and worker: Node's `cluster` module and `child_process.fork`, in Python.

People import it as `from sharedcluster import cluster`. Each file says whose side it is on:

    role         both      which of the two this process is, decided before the script's first line
    entry        worker    a fresh interpreter becomes a worker: patches gevent, then runs the script as `__main__`
    primary      primary   `cluster.fork`, events, the table of workers, the way out
    workers      primary   one worker as the primary sees it
    servers      primary   what workers asked to listen on: bound once, kept, handed off from
    departure    primary   the end of all workers in order
    this_worker  worker    `cluster.worker`: its sockets, its servers, its way out
    serving      worker    `cluster.serve`
    child        parent    `child_process.fork`: any Python program with a message channel
    channel, frames        user messages; both sides speak them
    loops, gevent_loop     what turns: a selector in a plain process, gevent's hub in a patched one

Two sockets lead to a worker. Connections and what concerns them travel on the message socket of `cluster.ipc`; user
messages on a stream of their own, so that no payload, however large, stands in front of a connection, and no payload
can be mistaken for a message of ours: there are no reserved words.
"""
