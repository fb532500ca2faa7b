"""How callers wait, on threads and (in the gevent run) on the loop: nobody sleeps for ever or is woken for another."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from gevent.monkey import get_original, is_module_patched

from sharedcluster.flask import find_runtime
from sharedcluster.state import SharedState
from sharedcluster.state.runtime import THREADS, Line
from sharedcluster.state.scripting import JointScript, Part, script_command
from sharedcluster.state.wire import Form, pack, pack_argument
from tests.state.browser import Browser
from tests.waiting import wait_until

needs_gevent = pytest.mark.skipif(not is_module_patched("socket"), reason="only greenlets can be killed or misled")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets."""
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def read_text(line: Line) -> bytes:
    """One read."""
    buffer = bytearray(65536)
    return bytes(buffer[: line.recv_into(buffer)])


def is_watched(line: Line) -> bool:
    """Whether the loop would tell it that there are bytes; threads need no loop."""
    return getattr(line, "_is_watched", False)


def test_the_runtime_follows_the_patch() -> None:
    """Greenlets wait on the loop, threads as threads do."""
    assert (find_runtime() is THREADS) == (not is_module_patched("socket"))


def test_waking_may_come_first() -> None:
    """Who is woken before it sleeps does not sleep, and the place can be used again."""
    parking, woken = find_runtime().make_parking(), list[int]()

    def sleep() -> None:
        parking.park()
        woken.append(1)

    for _ in range(3):
        parking.unpark()
        parking.park()
    sleeper = threading.Thread(target=sleep, daemon=True)
    sleeper.start()
    sleeper.join(0.05)
    assert sleeper.is_alive()
    parking.unpark()
    sleeper.join(5)
    assert woken == [1]


def test_each_read_has_its_own_deadline(pair: tuple[socket.socket, socket.socket]) -> None:
    """A read that is answered late moves the deadline of the next one; silence ends in a TimeoutError, in time."""
    ours, theirs = pair
    line = find_runtime().make_line(ours)
    line.settimeout(0.3)
    for turn in range(3):
        answer = threading.Timer(0.2, theirs.send, [b"%d" % turn])
        answer.start()
        assert read_text(line) == b"%d" % turn
    for timeout in (0.3, 0.1):
        line.settimeout(timeout)
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            read_text(line)
        assert timeout - 0.01 < time.monotonic() - started < timeout + 0.25
    theirs.send(b"later")
    assert read_text(line) == b"later"
    line.stop()


def test_what_nobody_waited_for_is_not_lost(pair: tuple[socket.socket, socket.socket]) -> None:
    """Bytes that come while nobody reads are there for the next reader, and the end of the stream is an empty read."""
    ours, theirs = pair
    line = find_runtime().make_line(ours)
    line.settimeout(5)
    theirs.send(b"one")
    assert read_text(line) == b"one"
    theirs.send(b"two")
    wait_until(lambda: not is_watched(line), "the loop has seen it, and that nobody reads")
    assert read_text(line) == b"two"
    theirs.close()
    assert read_text(line) == b""
    line.stop()


def test_more_than_the_kernel_takes_at_once_is_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    """A large command arrives whole."""
    ours, theirs = pair
    line, data, got = find_runtime().make_line(ours), os.urandom(3_000_000), bytearray()

    def collect() -> None:
        while len(got) < len(data):
            got.extend(theirs.recv(65536))

    reader = threading.Thread(target=collect, daemon=True)
    reader.start()
    line.settimeout(5)
    line.send(data)
    reader.join(10)
    assert got == data
    line.stop()


def test_closing_wakes_the_reader(state: SharedState) -> None:
    """Who listens on a connection that is closed under it gets an error, not silence."""
    wire = state.subscriber._wire
    assert wire is not None
    gaps = state.subscriber.gaps
    wire.close()
    wait_until(lambda: state.subscriber.gaps > gaps, "the listener noticed and connected again", deadline=10)


def test_a_lock_lets_one_in() -> None:
    """Two that want the same section go one after another, also if the first one is held up in there."""
    lock, order = find_runtime().make_lock(), list[str]()
    inside, asking = threading.Event(), threading.Event()

    def first() -> None:
        with lock:
            inside.set()
            asking.wait(5)  # what a section never does; a finalizer that runs in there may
            order.append("first")

    def second() -> None:
        inside.wait(5)
        asking.set()
        with lock:
            order.append("second")

    threads = [threading.Thread(target=target, daemon=True) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert order == ["first", "second"]


@needs_gevent
def test_a_killed_reader_leaves_nothing_behind(pair: tuple[socket.socket, socket.socket]) -> None:
    """The next one reads what came, the dead one is not switched to."""
    import gevent

    ours, theirs = pair
    line = find_runtime().make_line(ours)
    line.settimeout(5)
    victim = gevent.spawn(read_text, line)
    gevent.sleep(0)
    victim.kill()
    theirs.send(b"for the next")
    assert read_text(line) == b"for the next"
    line.stop()


@needs_gevent
def test_a_stray_switch_wakes_nobody(pair: tuple[socket.socket, socket.socket]) -> None:
    """A greenlet that is switched to by mistake goes on waiting for what it waits for."""
    import gevent

    line, parking = find_runtime().make_line(pair[0]), find_runtime().make_parking()
    line.settimeout(5)
    reader, sleeper = gevent.spawn(read_text, line), gevent.spawn(parking.park)
    gevent.sleep(0)
    done = threading.Event()
    for callback in (reader.switch, sleeper.switch, done.set):
        gevent.get_hub().loop.run_callback(callback)
    assert done.wait(5)
    assert not reader.dead
    assert not sleeper.dead
    pair[1].send(b"now")
    parking.unpark()
    assert reader.get(timeout=5) == b"now"
    sleeper.join(5)
    assert sleeper.dead
    line.stop()


@needs_gevent
def test_another_thread_may_wake_a_greenlet() -> None:
    """A native thread of gevent's pool wakes a sleeper of the loop's."""
    import gevent

    parking = find_runtime().make_parking()
    sleeper = gevent.spawn(parking.park)
    gevent.sleep(0)
    gevent.get_hub().threadpool.apply(parking.unpark)
    sleeper.join(5)
    assert sleeper.dead


@needs_gevent
def test_a_forked_child_leaves_its_parents_connection_alone(pair: tuple[socket.socket, socket.socket]) -> None:
    """A child inherits the loop with its watchers and a copy of the waiting greenlet; the bytes are the parent's."""
    import gevent

    ours, theirs = pair
    line = find_runtime().make_line(ours)
    line.settimeout(5)
    reader = gevent.spawn(read_text, line)
    gevent.sleep(0)
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(tell, b"x")
            wait_until(lambda: not is_watched(line), "the child's loop has seen the bytes, or its end")
        finally:
            os._exit(7 if reader.dead or is_watched(line) else 0)
    os.read(ready, 1)
    theirs.send(b"for the parent")
    # Not gevent's: the parent's loop, which would be faster than the child's, stands still until the child has ended.
    status = get_original("os", "waitpid")(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0
    assert reader.get(timeout=5) == b"for the parent"
    line.stop()
    os.close(ready)
    os.close(tell)


@needs_gevent
@pytest.mark.parametrize("others", [True, False])
def test_who_yields_its_turn_lets_others_have_the_cpu(monkeypatch: pytest.MonkeyPatch, *, others: bool) -> None:
    """If others ran meanwhile, what they sent is read and run first; if nobody wanted the CPU, the caller goes on."""
    import gevent

    ours, theirs = get_original("socket", "socketpair")()
    order: list[str] = []
    loop = gevent.get_hub().loop
    watcher = loop.io(ours.fileno(), 1)

    def on_readable() -> None:
        order.append("read")
        watcher.stop()
        loop.run_callback(order.append, "run")

    def sched_yield() -> None:
        order.append("yield")
        theirs.send(b"x")
        end = time.monotonic() + (0.001 if others else 0)
        while time.monotonic() < end:
            pass

    monkeypatch.setattr("sharedcluster.gevent_runtime.ALONE", 500_000 if others else 5_000_000_000)
    monkeypatch.setattr(os, "sched_yield", sched_yield)
    watcher.start(on_readable)
    gevent.sleep(0)
    try:
        loop.run_callback(order.append, "scheduled")
        find_runtime().yield_turn()
        order.append("back")
    finally:
        watcher.close()
        ours.close()
        theirs.close()
    assert order == ["scheduled", "yield", *(["read", "run"] if others else []), "back"]


@pytest.mark.skipif(not is_module_patched("socket"), reason="threads are woken by the kernel")
def test_a_bug_in_one_sleeper_does_not_keep_the_others() -> None:
    """What comes out of one goes to the hub, which reports it; those behind it wake up all the same."""
    import gevent
    from greenlet import greenlet

    runtime = find_runtime()
    parkings = [runtime.make_parking() for _ in range(4)]
    awake: list[int] = []

    def sleep(number: int) -> None:
        parkings[number].park()
        awake.append(number)
        if number == 1:
            raise ZeroDivisionError("on purpose")

    for number in range(4):
        # A plain greenlet, as those of the HTTP server: what it raises comes out in its parent, the hub.
        sleeper = greenlet(sleep, gevent.get_hub())
        gevent.get_hub().loop.run_callback(sleeper.switch, number)
    gevent.sleep(0.01)
    runtime.unpark_all(parkings)
    wait_until(lambda: len(awake) == 4, "all are awake")
    assert awake == [0, 1, 2, 3]


# -- commands that are put together by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 255, 256, 70_000])
def test_a_form_packs_as_hiredis_does(size: int) -> None:
    """The same bytes, whatever an argument is long and holds, and wherever the ones that differ stand."""
    values = [b"\r\n$1\r\n"[:size] or b"x", b"\xff" * size, b""]
    for places in ([0, 1, 2], [1, 2, 4], [0, 3, 4]):
        whole = [b"ECHO", b"constant", b"%d $1\r\n", b"", b"last"]
        form = Form([None if place in places else argument for place, argument in enumerate(whole)])
        for place, value in zip(places, values, strict=True):
            whole[place] = value
        assert b"*%d\r\n" % form.count + form.fill(values) == pack(tuple(whole))
    with pytest.raises(ValueError, match="assign sequence"):
        form.fill(values[:2])


def test_a_joint_script_s_run_is_a_command() -> None:
    """Keys of all first, then what they have in common, then what each has of its own; all counted."""
    script = JointScript("session_save", [b"common", b""])
    parts = []
    for keys, arguments in ((["k"], ["0", "a"]), (["k", "other"], [""]), ([], [])):
        packed = b"".join([pack_argument(key.encode()) for key in keys])
        form = Form([argument.encode() for argument in arguments])
        parts.append(Part(script, packed, len(keys), form.fill([]), form.count))
    assert parts[0].command() == pack(script_command("session_save", ["k"], ["common", "", "0", "a"]))
    whole = script_command("session_save", ["k", "k", "other"], ["common", "", "0", "a", ""])
    assert script.command(parts) == pack(whole)


def test_a_write_survives_that_redis_forgets_its_scripts(state: SharedState) -> None:
    """The text is loaded and the very write sent again, once."""
    browser = Browser()
    browser.set(state, count=1)
    state.commit.call("SCRIPT", "FLUSH")
    browser.set(state, count=2)
    assert browser.get(state, "count") == 2
