"""Applications that are kept: started detached, reloaded, killed, brought back, errored, saved, resurrected."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kept_apps import APP, Desk
from tests.waiting import wait_until

FILE = """
redis = "none"
port = 0
workers = 1
[apps.shop]
app = "shop:app"
[apps.shop.env]
STAGE = "development"
[apps.shop.env.production]
STAGE = "production"
[apps.second]
app = "shop:app"
"""


@pytest.fixture
def desk() -> Iterator[Desk]:
    """A folder of the test's own."""
    made = Desk()
    yield made
    made.close()


def test_a_file_of_two_apps(desk: Desk) -> None:
    """start, list, a section of env, ids, restart with another section, stop all, delete: the whole way."""
    desk.write("sharedcluster.toml", FILE)
    started = desk.cli("start").stdout
    assert "shop (id 0) started" in started
    assert "second (id 1) started" in started
    assert "runs already" in desk.cli("start").stdout
    assert {name: row["state"] for name, row in desk.apps().items()} == {"shop": "online", "second": "online"}
    assert desk.get("/").json["stage"] == "development"
    desk.cli("restart", "0", "--env", "production")
    assert desk.get("/").json["stage"] == "production"
    desk.cli("scale", "shop", "2")
    wait_until(lambda: len(desk.status()["workers"]) == 2, "two workers")
    desk.cli("restart", "shop")
    assert len(desk.status()["workers"]) == 2, "a restart keeps the scale"
    assert "Several clusters" in desk.cli("stop", ok=False).stderr
    stopped = desk.cli("stop", "all")
    assert stopped.stdout.split("\n")[:2] == ["shop stopped", "second stopped"]
    assert {row["state"] for row in desk.apps().values()} == {"stopped"}
    assert desk.cli("stop", "shop").stdout == "shop was not running\n"
    desk.cli("start", "second")
    assert desk.apps()["second"]["state"] == "online"
    desk.cli("delete", "all")
    assert desk.apps() == {}
    assert list((desk.folder / "run").iterdir()) == []


def test_new_code_by_reload(desk: Desk) -> None:
    """reload waits until the new code serves; code that does not load changes nothing and exits with 3."""
    desk.start()
    desk.write("shop.py", APP.format(version="second"))
    assert "generation 2 serves" in desk.cli("reload", "shop").stdout
    assert desk.get("/").json["version"] == "second"
    desk.write("shop.py", "broken(")
    failed = desk.cli("reload", "shop", ok=False)
    assert failed.returncode == 3
    assert "SyntaxError" in failed.stderr
    assert desk.get("/").json["version"] == "second"


def test_a_killed_worker_and_a_killed_primary_come_back(desk: Desk) -> None:
    """A worker by the primary, the primary by its attendant; `list` counts both and says what happened."""
    desk.start()
    first = desk.status()
    os.kill(first["workers"][0]["pid"], signal.SIGKILL)
    wait_until(lambda: desk.status()["counters"]["restarts"] == 1, "the worker is counted")
    wait_until(lambda: desk.get("/").status == 200, "the worker is back")
    os.kill(first["pid"], signal.SIGKILL)
    wait_until(lambda: desk.status()["pid"] != first["pid"] and desk.get("/").status == 200, "the primary is back")
    row = desk.apps()["shop"]
    assert row["state"] == "online"
    assert row["primary_restarts"] == 1
    assert "killed by SIGKILL" in row["note"]
    assert "killed by SIGKILL" in desk.cli("list").stdout
    desk.cli("reset", "shop")
    wait_until(lambda: desk.apps()["shop"]["primary_restarts"] == 0, "the counters are zero")
    assert desk.status()["counters"]["restarts"] == 0


def test_without_autorestart_a_killed_primary_stays_down(desk: Desk) -> None:
    """`list` says so, `describe` says why, and `start NAME` brings it back."""
    desk.start("--no-autorestart")
    os.kill(desk.status()["pid"], signal.SIGKILL)
    wait_until(lambda: desk.apps()["shop"]["state"] == "errored", "it is errored")
    assert "killed by SIGKILL" in desk.cli("describe", "shop").stdout
    desk.cli("start", "shop")
    assert desk.get("/").status == 200


def test_a_dead_cluster_is_noticed_and_cleaned(desk: Desk) -> None:
    """Attendant and primary killed at once: the state is `dead`, the socket is removed, a start works again."""
    desk.start()
    facts = desk.recorded()
    for role in ("attendant", "primary"):
        os.kill(facts[role]["pid"], signal.SIGKILL)
    wait_until(lambda: desk.apps()["shop"]["state"] == "dead", "it is dead")
    assert not (desk.folder / "run" / "shop.sock").exists()
    assert "its primary and its attendant are gone" in desk.cli("status", "shop", ok=False).stderr
    desk.cli("start", "shop")
    assert desk.get("/").status == 200


def test_a_cluster_serves_on_without_its_attendant(desk: Desk) -> None:
    """Nothing that serves depends on the attendant; `list` says that nobody attends, `stop` still stops."""
    desk.start()
    os.kill(desk.recorded()["attendant"]["pid"], signal.SIGKILL)
    wait_until(lambda: not desk.apps()["shop"]["attended"], "the attendant is gone")
    assert desk.get("/").status == 200
    assert "nobody attends it" in desk.cli("list").stdout
    assert desk.cli("stop", "shop").stdout == "shop stopped\n"
    assert desk.apps()["shop"]["state"] == "stopped"


def test_an_app_that_does_not_load(desk: Desk) -> None:
    """start fails with its traceback and code 3; it is kept as errored, with the traceback in describe."""
    desk.write("broken.py", "raise ValueError('the configuration is missing')\n")
    failed = desk.cli("start", "broken:app", "--redis", "none", "--port", "0", ok=False)
    assert failed.returncode == 3
    assert "ValueError: the configuration is missing" in failed.stderr
    assert desk.apps()["broken"]["state"] == "errored"
    described = desk.cli("describe", "broken").stdout
    assert "ValueError: the configuration is missing" in described
    wait_until(lambda: not desk.apps()["broken"]["attended"], "its attendant has left")


def test_workers_that_never_come_up_end_as_errored(desk: Desk) -> None:
    """It loads in the check and fails in every worker: five attempts with a growing delay, then errored, cheaply."""
    desk.write("loop.py", "import os\nif 'SHAREDCLUSTER_SLOT' in os.environ:\n    raise KeyError('no such thing')\n"
               "from flask import Flask\napp = Flask(__name__)\n")  # fmt: skip
    failed = desk.cli("start", "loop:app", "-w", "1", "--redis", "none", "--port", "0", ok=False)
    assert failed.returncode == 3
    facts = desk.recorded("loop")
    assert facts["state"] == "errored"
    assert "KeyError: 'no such thing'" in facts["failure"]
    assert facts["cpu_seconds"] < 10


def test_stop_exit_codes(desk: Desk) -> None:
    """A worker that exits with a named code has done its work: nobody replaces it, and the app ends as stopped."""
    desk.start("--stop-exit-codes", "0,64")
    with pytest.raises(OSError):  # noqa: PT011 - the connection ends with the worker, however that looks
        desk.get("/exit/64")
    wait_until(lambda: desk.apps()["shop"]["state"] == "stopped", "it is stopped")
    assert desk.recorded()["restarts"] == 0
    assert "has done its work" in desk.log()


def test_two_starts_at_once(desk: Desk) -> None:
    """One wins; the other says that it runs, and nothing runs twice."""
    codes: list[int] = []
    command = ("start", "shop:app", "--name", "shop", "-w", "1", "--port", "0", "--redis", "none")
    threads = [
        threading.Thread(target=lambda: codes.append(desk.cli(*command, ok=False).returncode)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [0, 2, 2]
    assert desk.apps()["shop"]["state"] == "online"


def test_a_changed_file_reloads(desk: Desk) -> None:
    """watch: a rolling reload when a watched file changes; an ignored one does nothing."""
    desk.start("--watch", ".", "--ignore-watch", "*.txt,state,run,__pycache__")
    desk.write("notes.txt", "nothing")
    desk.write("shop.py", APP.format(version="watched"))
    wait_until(lambda: desk.get("/").json["version"] == "watched", "the new code serves")
    assert desk.status()["counters"]["reloads"] == 1


def test_cron_reloads_all_workers_without_stopping_them(desk: Desk) -> None:
    """cron_restart with seconds: a reload every second, during which every request is answered."""
    desk.start("--cron-restart", "* * * * * *")
    answers = []

    def reloaded() -> bool:
        answers.append(desk.get("/").status)
        return bool(desk.status()["counters"]["reloads"])

    wait_until(reloaded, "it was reloaded")
    assert set(answers) == {200}
    assert "reloading: cron_restart" in desk.log()


def test_wait_ready(desk: Desk) -> None:
    """A worker does not serve before the application says that it is ready, so start takes that long."""
    desk.write(
        "slow.py",
        "import threading, time, os\nfrom flask import Flask\nfrom sharedcluster import readiness\n"
        "app = Flask(__name__)\n"
        "def warm_up():\n    time.sleep(0.6)\n    print('warm', flush=True)\n    readiness.say()\n"
        "threading.Thread(target=warm_up, daemon=True).start()\n",
    )
    desk.cli("start", "slow:app", "-w", "1", "--redis", "none", "--port", "0", "--wait-ready")
    assert "warm" in desk.log("out", "slow")


def test_save_and_resurrect(desk: Desk) -> None:
    """What runs comes back with its environment; an empty list is not saved by accident, a broken one is kept."""
    desk.write("sharedcluster.toml", FILE)
    desk.cli("start", "--only", "shop", "--env", "production")
    desk.cli("save")
    saved = desk.state / "saved.json"
    assert saved.stat().st_mode & 0o777 == 0o600
    desk.cli("stop", "all")
    refused = desk.cli("save", ok=False)
    assert "the saved list stays as it is" in refused.stderr
    assert "shop (id 0) started" in desk.cli("resurrect").stdout
    assert desk.get("/").json["stage"] == "production"
    assert "runs already" in desk.cli("resurrect").stdout
    saved.write_text(saved.read_text()[:40])
    broken = desk.cli("resurrect", ok=False)
    assert broken.returncode == 2
    (aside,) = desk.state.glob("saved.json.broken-*")
    assert str(aside) in broken.stderr


def test_startup_writes_a_unit(desk: Desk) -> None:
    """The unit names the folder of the records and the same program, and the advice can be typed."""
    home = desk.folder / "home"
    said = desk.cli("startup", "--user", HOME=str(home), XDG_CONFIG_HOME="").stdout
    unit = (home / ".config/systemd/user/sharedcluster.service").read_text()
    assert f"SHAREDCLUSTER_STATE_DIR={desk.state}" in unit
    assert "sharedcluster resurrect" in unit
    assert "systemctl --user enable sharedcluster.service" in said


def test_check_reads_every_app_of_a_file(desk: Desk) -> None:
    """check FILE loads each app and exits with the code of the first that fails; nothing is started or kept."""
    desk.write("sharedcluster.toml", FILE)
    assert desk.cli("check", "sharedcluster.toml").stdout.count("app      found") == 2
    desk.write("sharedcluster.toml", FILE.replace('[apps.second]\napp = "shop:app"', '[apps.second]\napp = "nope"'))
    failed = desk.cli("check", "sharedcluster.toml", ok=False)
    assert failed.returncode == 3
    assert 'No module named "nope"' in failed.stdout
    assert desk.apps() == {}


def test_list_is_plain_in_a_pipe(desk: Desk) -> None:
    """No escape sequences and nothing but ASCII without a terminal; colour when it is forced, never with NO_COLOR."""
    desk.start()
    plain = desk.cli("list").stdout + desk.cli("describe", "shop").stdout + desk.cli("status").stdout
    assert plain.isascii()
    assert "\x1b" not in plain
    assert "\x1b[32m" in desk.cli("list", FORCE_COLOR="1").stdout
    assert "\x1b" not in desk.cli("list", FORCE_COLOR="1", NO_COLOR="1").stdout


def test_records_are_private(desk: Desk) -> None:
    """The environment of an app holds secrets: files of ours alone, and no verb prints a value."""
    desk.cli("start", "shop:app", "--name", "shop", "-w", "1", "--port", "0", "--redis", "none",
             "--log-keep", "3", SECRET_KEY="hunter2")  # fmt: skip
    for path in desk.state.rglob("*.json"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert desk.state.stat().st_mode & 0o077 == 0
    shown = desk.cli("describe", "shop").stdout + desk.cli("list", "--json").stdout
    shown += desk.cli("describe", "shop", "--json").stdout
    assert "hunter2" not in shown


def test_a_damaged_record_is_kept_aside(desk: Desk) -> None:
    """It is named, not deleted; the next command works."""
    desk.start()
    desk.cli("stop", "shop")
    path = desk.state / "apps" / "shop" / "spec.json"
    path.write_text("{")
    failed = desk.cli("list", ok=False)
    assert failed.returncode == 2
    assert list(path.parent.glob("spec.json.broken-*"))
    assert desk.apps() == {}


def test_an_upgraded_primary_stays_attended(desk: Desk, tmp_path: Path) -> None:
    """USR2 replaces the primary; its attendant knows the new one, and brings that one back too."""
    desk.start()
    before = desk.status()["pid"]
    desk.cli("signal", "USR2", "shop")
    wait_until(lambda: desk.recorded()["primary"]["pid"] != before, "the attendant knows the new primary")
    after = desk.status()["pid"]
    assert json.loads(desk.cli("list", "--json").stdout)["apps"][0]["state"] == "online"
    os.kill(after, signal.SIGKILL)
    wait_until(lambda: desk.status()["pid"] != after and desk.get("/").status == 200, "it is brought back")
