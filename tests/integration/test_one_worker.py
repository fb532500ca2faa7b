"""`drain ID` and `describe ID`: one worker of a running cluster."""

from __future__ import annotations

import json

from tests.conftest import StartCluster
from tests.waiting import wait_until


def test_describe_and_drain_by_id(start_cluster: StartCluster) -> None:
    """A worker is described with its memory, drained after its replacement is there, and both need an id that is."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none", "--name", "shop")
    described = cluster.cli("describe", "1", "--json")
    facts = json.loads(described.stdout)
    assert (facts["id"], facts["slot"], facts["state"]) == (1, 0, "listening")
    assert 0 < facts["uss"] <= facts["rss"]
    assert "uss" in cluster.cli("describe", "shop", "2").stdout
    drained = cluster.cli("drain", "1")
    assert drained.returncode == 0, drained.stderr
    wait_until(lambda: [w["id"] for w in cluster.workers()] == [3, 2] and cluster.is_ready(), "it was replaced")
    wrong = cluster.cli("drain", "99")
    assert wrong.returncode == 2
    assert "Their ids: 2, 3" in wrong.stderr
    assert cluster.cli("drain").returncode == 2
