"""Messages between the primary and its workers: any value, any size, both ways, none lost without being said."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from tests.program_process import StartLab, who
from tests.waiting import wait_until

VALUES = ["text", 0, 1.5, True, None, [], {}, [1, [2, {"three": "\u2713 \U0001f600"}]]]


def test_both_ways_and_at_both_levels(start_lab: StartLab) -> None:
    """Every JSON value arrives as it was sent; the cluster's handler gets the worker, the worker's own does not."""
    lab = start_lab(2)
    lab.do("own = []\ncluster.workers[1].on('message', lambda m: own.append(m) if 'lab' not in str(m) else None)")
    lab.do(f"[cluster.workers[1].send(v) for v in {VALUES!r}]")
    wait_until(lambda: lab.at(1, "heard") == VALUES, "all arrived, in order")
    lab.at(1, "[cluster.worker.send(v) for v in heard]")
    wait_until(lambda: [f["message"] for f in lab.events("message", 1)] == VALUES, "all came back, in order")
    assert lab.do("own") == VALUES
    assert lab.at(2, "heard") == []


def test_what_is_sent_at_once_arrives(start_lab: StartLab) -> None:
    """Messages sent right after fork() wait for the worker's first handler."""
    lab = start_lab()
    lab.do("w = cluster.fork()\nfor n in range(100): w.send(n)")
    lab.wait_event("online", 1)
    wait_until(lambda: lab.at(1, "heard") == list(range(100)), "all arrived, in order")


def test_there_are_no_reserved_words(start_lab: StartLab) -> None:
    """Payloads that look like messages of Node's or ours are payloads."""
    lab = start_lab(1)
    odd = [
        {"cmd": "NODE_CLUSTER", "act": "disconnect"}, {"cmd": "NODE_HANDLE"}, ["Drain", {"timeout": 0}], {"kind": 3},
        "\u00c5\u009d\x01",
    ]  # fmt: skip
    lab.do(f"[cluster.workers[1].send(v) for v in {odd!r}]")
    wait_until(lambda: lab.at(1, "heard") == odd, "all arrived")
    lab.at(1, "[cluster.worker.send(v) for v in heard]")
    wait_until(lambda: [f["message"] for f in lab.events("message", 1)] == odd, "all came back")


def test_800_kilobytes_do_not_stand_in_front_of_connections(start_lab: StartLab) -> None:
    """Messages of 800 KB fill the channel to both workers, whose handlers are busy: clients are served anyway."""
    lab = start_lab(2)
    port = lab.serve(1, 2)
    lab.do("big = 'x' * 800_000\nboth = list(cluster.workers.values())")
    lab.do("[w.send({'lab': -1, 'code': 'time.sleep(2)'}) for w in both]")
    lab.do("[w.send([n, big]) for n in range(10) for w in both]")
    assert {who(port)["id"] for _ in range(10)} == {1, 2}
    assert all(lab.do("[w.channel._waiting > 1_000_000 for w in both]"))
    wish = "[cluster.worker.send([n, 'y' * 800000]) for n in range(10)]"
    sizes = [[n, 800_000] for n in range(10)]
    for id in (1, 2):
        assert wait_until(lambda: lab.at(id, "[[n, len(x)] for n, x in heard]", 20)[9:], "all arrived") == sizes[9:]  # noqa: B023
        lab.do(f"cluster.workers[{id}].send({{'lab': -1, 'code': {wish!r}}})")
    with ThreadPoolExecutor(4) as pool:
        assert {each["id"] for each in pool.map(who, [port] * 20)} == {1, 2}
    for id in (1, 2):
        assert lab.at(id, "[[n, len(x)] for n, x in heard]") == sizes
        lab.wait_event("message", id, count=10)
        assert all(f["message"]["long"] > 800_000 for f in lab.events("message", id))


def test_back_pressure_and_its_end(start_lab: StartLab) -> None:
    """To a worker that stands still `send` soon says False and then refuses; all that was taken on arrives."""
    lab = start_lab(1)
    lab.do("cluster.workers[1].send({'lab': -1, 'code': 'sleep_in_c(3)'})")
    lab.do("answers = [cluster.workers[1].send('x' * 65536) for _ in range(40)]")
    answers = lab.do("answers")
    assert answers[0] is True
    assert answers[-1] is False
    assert answers == sorted(answers, reverse=True)
    refused = lab.do("[cluster.workers[1].send('x' * 10_000_000) for _ in range(8)]")
    assert refused["raised"] == "BufferError"
    wait_until(lambda: lab.at(1, "len(heard)", deadline=20) == 46, "all that was not refused arrived")


def test_a_slow_handler_holds_its_sender_up(start_lab: StartLab) -> None:
    """A worker whose handler waits piles nothing up in its memory: messages stay with the primary, which sees it."""
    lab = start_lab(1)
    lab.do("w = cluster.workers[1]\nw.send({'lab': -1, 'code': 'time.sleep(2)'})")
    lab.do("answers = [w.send('x' * 100_000) for _ in range(100)]")
    time.sleep(0.5)  # the loop turns, and takes what it may
    left = lab.do("w.channel._waiting")
    assert left > 5_000_000
    wait_until(lambda: lab.at(1, "len(heard)") == 100, "all arrived")
    assert lab.do("w.channel._waiting") == 0


def test_the_callback_says_that_it_was_taken(start_lab: StartLab) -> None:
    """Called with None after the other side's handlers; with the error if it ended first, or nobody listens."""
    lab = start_lab(1)
    assert lab.do("tell(1, 'hello')") is True
    assert wait_until(lambda: [f for f in lab.facts if "taken" in f], "it is taken")[0]["error"] is None
    assert lab.at(1, "heard") == ["hello"]
    lab.do(
        "cluster.workers[1].send({'lab': -1, 'code': 'sleep_in_c(1) or os._exit(3)'})\nresult = tell(1, 'too late')"
    )
    lab.wait_exit(1)
    last = wait_until(lambda: [f for f in lab.facts if "taken" in f][1:], "the second is answered")[0]
    assert "ended before" in last["error"]


def test_a_workers_message_that_nobody_hears_is_reported(start_lab: StartLab) -> None:
    """The worker's callback gets an error, and so does its `error` event where there is no callback."""
    lab = start_lab(1)
    lab.at(1, "errors = []; cluster.worker.on('error', lambda e: errors.append(str(e)))")
    lab.do("heard = cluster.on.__self__._observers['message']; kept = heard[:]; heard.clear()")
    lab.do("cluster.workers[1].send({'lab': -1, 'code': 'cluster.worker.send(1)'})")
    time.sleep(0.3)  # both are answered meanwhile; there is nobody to hear it
    lab.do("heard.extend(kept)")
    found = lab.at(1, "errors")
    assert len(found) == 2
    assert "nobody listens" in found[0]


def test_a_message_to_a_dead_worker(start_lab: StartLab) -> None:
    """`send` says False, and the callback or the `error` event why."""
    lab = start_lab(1)
    lab.do("w = cluster.workers[1]; errors = []\nw.on('error', lambda e: errors.append(type(e).__name__))")
    lab.do("w.kill('SIGKILL')")
    lab.wait_exit(1)
    assert lab.do("w.send(1)") is False
    assert lab.do("w.send(2, lambda e: errors.append(str(e)))") is False
    wait_until(lambda: lab.do("errors") == ["NotDeliveredError", "the channel is closed"], "both are told")


def test_what_json_has_not_fails_at_the_sender(start_lab: StartLab) -> None:
    """Sets, bytes, NaN and circles raise in `send`; nothing is changed on the way, and nothing was sent."""
    lab = start_lab(1)
    lab.do("circle = []; circle.append(circle)")
    for value, kind in {"{1}": "Type", "b'x'": "Type", "float('nan')": "Value", "circle": "Value"}.items():
        assert lab.do(f"cluster.workers[1].send({value})")["raised"] == f"{kind}Error"
    lab.do("cluster.workers[1].send('next')")
    wait_until(lambda: lab.at(1, "heard") == ["next"], "only what can be written arrived")


def test_msgpack_carries_bytes_and_times(start_lab: StartLab) -> None:
    """`serialization="msgpack"`: what JSON has not, both ways."""
    lab = start_lab()
    lab.do("cluster.setup_primary(serialization='msgpack'); got = []")
    lab.fork(1)
    lab.do("import datetime; now = datetime.datetime.now(datetime.UTC)")
    lab.do("value = {'raw': bytes(range(256)), 'at': now, 'n': 2**63}")
    lab.do("cluster.workers[1].on('message', lambda m: got.append(m) if 'raw' in m else None)")
    lab.do("cluster.workers[1].send(value)")
    wait_until(lambda: lab.at(1, "len(heard)") == 1, "it arrived")
    lab.at(1, "cluster.worker.send(heard[0]) or None")
    wait_until(lambda: lab.do("len(got)") == 1, "it came back")
    assert lab.do("[got[0]['raw'] == value['raw'], got[0]['n'] == value['n']]") == [True, True]


def test_garbage_is_logged_and_survived(start_lab: StartLab) -> None:
    """Bytes that are no message, on either socket and from either side: a line in the log, and everything goes on."""
    lab = start_lab(1)
    port = lab.serve(1)
    garbage = "b'GET / HTTP/1.1\\r\\n\\r\\n' + b'\\xc5' * 50 + bytes(range(256))"
    lab.do(f"cluster.workers[1].channel._socket.send({garbage})")
    lab.at(1, f"cluster.worker._channel._socket.send({garbage})")
    lab.do(f"cluster.workers[1].handle.channel.socket.send({garbage})")
    lab.at(1, f"cluster.worker._wire._channel.socket.send({garbage})")
    # A head that is right, with a payload that is not.
    lab.do("import struct; head = struct.pack('!2sBII', b'\\xc5\\x9d', 2, 7, 5)")
    lab.do("cluster.workers[1].channel._socket.send(head + b'{oops')")
    assert lab.at(1, "'alive'") == "alive"
    assert who(port)["id"] == 1
    assert lab.output.count("are no message, skipped") == 2
    assert "sent what is no message" in lab.output
    lab.wait_for("cannot be read, skipped")
    lab.do("cluster.disconnect()")
    assert lab.wait_exit(1) == (0, None, True)


def test_both_flood_each_other(start_lab: StartLab) -> None:
    """Both sides send much more than fits into any buffer at the same time, without waiting: no deadlock."""
    lab = start_lab(1)
    wish = "[cluster.worker.send([n, 'y' * 50000]) for n in range(300)] and None"
    lab.do(f"w = cluster.workers[1]; w.send({{'lab': -1, 'code': {wish!r}}})")
    lab.do("[w.send([n, 'x' * 50_000]) for n in range(300)]")
    wait_until(lambda: lab.at(1, "len(heard)") == 300, "all arrived there")
    lab.wait_event("message", 1, count=300)
