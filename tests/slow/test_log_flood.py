"""200 MB through rotation: not a line is lost, torn or written twice, and every request is answered meanwhile."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from sharedcluster.operating.rotation import rotated_files
from tests.kept_apps import Desk, read_logs

FLOOD = """
from flask import Flask
app = Flask(__name__)

@app.get("/flood/<int:client>/<int:first>")
def flood(client, first):
    for number in range(first, first + 10000):
        print(client, number, "x" * 950)
    return "done"
"""


@pytest.fixture
def desk() -> Iterator[Desk]:
    """A folder of the test's own."""
    made = Desk()
    yield made
    made.close()


@pytest.mark.timeout(300)
def test_200_megabytes(desk: Desk) -> None:
    """Two clients, two workers, ten times 10000 lines each of a kilobyte; files of 10 MB."""
    desk.write("flood.py", FLOOD)
    desk.cli("start", "flood:app", "-w", "2", "--port", "0", "--redis", "none", "--log-keep", "100")
    answers: list[int] = []

    def ask(client: int) -> None:
        for first in range(0, 100000, 10000):
            answers.append(desk.get(f"/flood/{client}/{first}", "flood").status)  # noqa: PERF401 - as they come

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 20
    path = desk.state / "logs" / "flood.out.log"
    seen: Counter[tuple[int, int]] = Counter()
    for data in read_logs(path):
        for line in data.splitlines():
            match = re.search(rb" w\d out \| (\d) (\d+) x{950}$", line)
            assert match, line[:200]
            seen[int(match[1]), int(match[2])] += 1
    assert seen == Counter((client, number) for client in range(2) for number in range(100000))
    assert len(rotated_files(str(path))) >= 5
    assert "log_lines_lost" not in desk.status("flood")["counters"]
