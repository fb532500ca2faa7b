"""What a worker loads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from flask import Flask

from sharedcluster.cluster.loading import load
from sharedcluster.flask_shortcuts.hosts import UrlAdapters
from sharedcluster.flask_shortcuts.responses import Response

APP = """
from flask import Flask

app = Flask(__name__)
"""


@pytest.mark.parametrize("more", ["", "app.config['SHAREDCLUSTER_SHORTCUTS'] = False"])
def test_a_flask_application_takes_shortcuts(more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any Flask application that is loaded does, without the extension too, unless its configuration forbids it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "shortened", raising=False)
    Path("shortened.py").write_text(APP + more)
    application = load("shortened:app").application
    monkeypatch.delitem(sys.modules, "shortened", raising=False)
    assert isinstance(application, Flask)
    assert isinstance(application.create_url_adapter, UrlAdapters) is not bool(more)
    assert (application.response_class is Response) is not bool(more)
