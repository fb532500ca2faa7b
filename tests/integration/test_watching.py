"""--reload: a saved file is served; one that does not load is shown, and the next save recovers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster_process import ROOT
from tests.conftest import StartCluster
from tests.waiting import wait_until

APP = "from flask import Flask\napp = Flask(__name__)\napp.get('/')(lambda: {!r})\n"


@pytest.mark.parametrize("library", ["watchfiles", "polling"])
def test_saving_reloads(start_cluster: StartCluster, tmp_path: Path, library: str) -> None:
    """With the library and without it."""
    project, hidden = tmp_path / "project", tmp_path / "hidden"
    project.mkdir()
    hidden.mkdir()
    if library == "polling":
        (hidden / "watchfiles.py").write_text("raise ImportError('not installed')\n")
    (project / "edited.py").write_text(APP.format("one"))
    cluster = start_cluster(
        "edited", "-w", "1", "--redis", "none", "--reload", cwd=project, env={"PYTHONPATH": f"{hidden}:{ROOT}"}
    )
    wait_until(lambda: "watching" in cluster.output(), "it watches")
    versions = iter(range(100))

    def saved() -> bool:
        # Saved again until it is noticed: the watcher may not have been looking yet the first time.
        version = f"two {next(versions)}"
        (project / "edited.py").write_text(APP.format(version))
        try:
            wait_until(lambda: cluster.get("/").body == version.encode(), "it is served", deadline=4)
        except AssertionError:
            return False
        return True

    wait_until(saved, "a saved file is served", deadline=20)
    (project / "edited.py").write_text("def broken(:\n")
    wait_until(lambda: "reload stopped" in cluster.output() and "SyntaxError" in cluster.output(), "it is shown")
    assert cluster.get("/").body.startswith(b"two")
    (project / "edited.py").write_text(APP.format("mended"))
    wait_until(lambda: cluster.get("/").body == b"mended", "the next save recovers")
    assert cluster.stop() == 0
    wait_until(lambda: not cluster.left_over(), "nothing is left")
