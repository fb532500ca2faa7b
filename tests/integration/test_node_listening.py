"""`cluster.serve`: listeners that the primary binds once, shares, and keeps."""

from __future__ import annotations

import http.client
import os
import socket
from pathlib import Path

import pytest

from sharedcluster.flask_shortcuts import texts
from tests.program_process import StartLab, who
from tests.redis_process import free_port
from tests.waiting import wait_until


def test_port_0_is_one_port_for_all_workers(start_lab: StartLab) -> None:
    """Every worker is told the same real port, and it answers."""
    lab = start_lab(3)
    port = lab.serve(1, 2, 3)
    assert port > 0
    assert {who(port)["id"] for _ in range(6)} == {1, 2, 3}


def test_a_flask_application_takes_the_shortcuts(start_lab: StartLab) -> None:
    """As under `sharedcluster run`; not if its configuration forbids it, nor if its Flask has not been read."""
    lab = start_lab(1)
    is_known = not texts.unknown(texts.DISPATCH)
    for wants in (True, False):
        code = f"""
import flask
app = flask.Flask("served")
app.config["SHAREDCLUSTER_SHORTCUTS"] = {wants}
app.add_url_rule("/", "index", lambda: type(flask.current_app.full_dispatch_request).__name__)
result = cluster.serve(app, port=0).port
"""
        client = http.client.HTTPConnection("127.0.0.1", lab.at(1, code), timeout=10)
        client.request("GET", "/")
        assert client.getresponse().read().decode() == ("Dispatch" if wants and is_known else "method")
        client.close()


def test_several_servers_of_one_worker(start_lab: StartLab) -> None:
    """The n-th server on port 0 has the same port in every worker, the next one another; each has its own hand-off."""
    lab = start_lab(2)
    first, second = [lab.at(1, "serve(0)") for _ in range(2)]
    assert first != second
    assert [lab.at(2, "serve(0)") for _ in range(2)] == [first, second]
    only_one = lab.at(1, f"serve({free_port()})")
    assert {who(only_one)["id"] for _ in range(4)} == {1}
    assert {who(second)["id"] for _ in range(4)} == {1, 2}
    assert len(lab.events("listening", 1)) == 3


def test_listen_and_close_again_and_again(start_lab: StartLab) -> None:
    """Opening and closing on port 0 never collides with a server that is still open."""
    lab = start_lab(1)
    kept = lab.at(1, "serve(0)")
    for _ in range(4):
        port = lab.at(1, "serve(0)")
        assert port != kept
        assert who(port)["id"] == 1
        lab.at(1, "servers.pop().close()")
    assert who(kept)["id"] == 1


def test_a_taken_port_is_the_askers_error(start_lab: StartLab) -> None:
    """EADDRINUSE is raised in the worker that asked, which lives on and gets the port when it is free."""
    lab = start_lab(1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = lab.at(1, f"serve({port})")
        assert found["raised"] == "OSError"
        assert found["errno"] == 98
        assert "in use" in found["text"]
    assert lab.at(1, f"serve({port})") == port
    assert who(port)["id"] == 1


def test_twice_the_same_port_in_one_worker(start_lab: StartLab) -> None:
    """The second server of a worker on a fixed port is a second bind, and fails as one."""
    lab = start_lab(1)
    port = lab.serve(1)
    found = lab.at(1, f"serve({port})")
    # The first one is known as port 0, so this is another address that is taken.
    assert found["errno"] == 98
    again = free_port()
    assert lab.at(1, f"serve({again})") == again
    assert lab.at(1, f"serve({again})")["errno"] == 98


def test_no_permission_is_a_permission_error(start_lab: StartLab, tmp_path: Path) -> None:
    """EACCES comes as PermissionError with advice; the worker lives on."""
    lab = start_lab(1)
    if os.getuid() != 0 and int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) > 42:
        found = lab.at(1, "serve(42)")
        assert found["raised"] == "PermissionError"
        assert "above 1023" in found["text"]
    (tmp_path / "file").write_text("")
    found = lab.at(1, f"serve(path={str(tmp_path / 'file' / 's.sock')!r})")
    assert found["raised"] == "NotADirectoryError"
    assert who(lab.serve(1))["id"] == 1


def test_a_name_that_does_not_resolve(start_lab: StartLab) -> None:
    """The error says so."""
    lab = start_lab(1)
    found = lab.at(1, "serve(host='no.such.host.invalid')")
    assert found["raised"] == "OSError"
    assert "does not resolve" in found["text"]


def ask(path: Path) -> bytes:
    """One request over a unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        # A path longer than sun_path is reached by its folder.
        folder = os.open(path.parent, os.O_DIRECTORY)
        client.connect(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_unix_sockets(start_lab: StartLab, tmp_path: Path) -> None:
    """A path longer than the kernel allows, relative to the worker's folder; its file is gone after the end."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    lab = start_lab()
    lab.do(f"cluster.setup_primary(cwd={str(folder)!r})")
    lab.fork(2)
    for id in (1, 2):
        assert lab.at(id, "serve(path='app.sock')") == str(folder / "app.sock")
    answers = [ask(folder / "app.sock") for _ in range(2)]
    assert all(any(b'"id": %d' % id in answer for answer in answers) for id in (1, 2))
    told = lab.events("listening", 1)[0]["arguments"][0][1]
    assert told == {"address": str(folder / "app.sock"), "port": 0, "address_type": -1, "fd": None}
    lab.do("cluster.disconnect()")
    lab.wait_exit(2)
    wait_until(lambda: not (folder / "app.sock").exists(), "the file is gone")


def test_ipv6(start_lab: StartLab) -> None:
    """`::` answers on both, `::1` on itself only."""
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").read_text():
        pytest.skip("no IPv6 here")
    lab = start_lab(1)
    both, one = lab.serve(1, host="::"), lab.serve(1, host="::1", port=free_port())
    assert lab.events("listening", 1)[0]["arguments"][0][1]["address_type"] == 6
    for host, port in (("::1", both), ("127.0.0.1", both), ("::1", one)):
        connection = http.client.HTTPConnection(host, port, timeout=10)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", one), timeout=5)


def test_a_descriptor_of_the_primary(start_lab: StartLab) -> None:
    """`fd=N` serves on a listening socket that the primary has open, as with socket activation."""
    lab = start_lab()
    lab.do("import socket; opened = socket.create_server(('127.0.0.1', 0)); number = opened.detach()")
    fd = lab.do("number")
    lab.fork(2)
    port = lab.serve(1, 2, fd=fd)
    assert {who(port)["id"] for _ in range(4)} == {1, 2}
    assert lab.events("listening", 1)[0]["arguments"][0][1]["fd"] == fd


def test_the_backlog_reaches_the_kernel(start_lab: StartLab) -> None:
    """The first worker's `backlog` is the listener's."""
    lab = start_lab(1)
    port = lab.serve(1, backlog=7)
    code = f"import psutil\nresult = open('/proc/net/tcp').read().count(':{port:04X} 00000000:0000 0A')"
    assert lab.do(code) == 1
    # ss(8) shows it as Send-Q of a listening socket; here it is asked of the socket itself (TCP_INFO, tcpi_sacked).
    info = lab.do(
        "import socket, struct\n"
        "s = [x for x in cluster.on.__self__.servers._by_index.values()][0].listener.socket\n"
        "result = struct.unpack_from('I', s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 28)[0]"
    )
    assert info == 7


def test_a_server_closes_and_listens_again_while_another_serves(start_lab: StartLab) -> None:
    """Closing takes one worker out of the rotation; listening again brings it back; no request is refused."""
    lab = start_lab(2)
    port = free_port()
    assert lab.serve(1, 2, port=port) == port
    lab.at(1, "servers.pop().close()")
    assert {who(port)["id"] for _ in range(4)} == {2}
    assert lab.at(1, f"serve({port})") == port
    assert {who(port)["id"] for _ in range(4)} == {1, 2}


def test_a_port_changes_hands(start_lab: StartLab) -> None:
    """One worker closes its server, the last on that port; another worker binds it, then the first one again."""
    lab = start_lab(2)
    port = free_port()
    for id in (1, 2, 1):
        assert lab.at(id, f"serve({port})") == port
        assert who(port)["id"] == id
        lab.at(id, "servers.pop().close()")
    with pytest.raises(OSError, match="refused"):
        who(port)


def test_close_waits_for_what_is_in_flight(start_lab: StartLab) -> None:
    """`Server.close(callback)`: a running request is answered first, an idle connection does not hold it up."""
    lab = start_lab(1)
    port = lab.serve(1)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/slow/0.5")
    idle = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    idle.request("GET", "/")
    idle.getresponse().read()
    lab.at(1, "servers[0].close(lambda: cluster.worker.send('closed'))")
    assert not lab.events("message")
    assert connection.getresponse().status == 200
    assert lab.wait_event("message", 1)["message"] == "closed"
    connection.close()
    idle.close()


def test_unknown_limits_are_refused(start_lab: StartLab) -> None:
    """A misspelt option of `serve` is a TypeError; those of the HTTP engine work."""
    lab = start_lab(1)
    assert lab.at(1, "serve(keepalive=5)")["raised"] == "TypeError"
    port = lab.serve(1, limit_body=10)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/", body=b"x" * 100)
    assert connection.getresponse().status == 413
    connection.close()
