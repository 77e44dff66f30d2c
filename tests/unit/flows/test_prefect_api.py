"""A run has a Prefect of its own; an inherited server that cannot be used is one clear error."""

from __future__ import annotations

import http.server
import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from flows.console.artifacts import with_progress
from flows.console.events import ModelDone, ignore
from flows.runtime import own_server, prefect_api
from flows.runtime.prefect_api import (
    Prefect,
    api_server,
    is_lost,
    settings_of_environment,
    unused_settings,
)
from quant_core.errors import QuantError
from quant_core.evaluate.contract import Verdict
from tasks.rows import ModelRow, Outcome


@pytest.fixture(autouse=True)
def _no_server_yet(monkeypatch):
    """As in a process of its own: other tests share one server."""
    monkeypatch.setattr(prefect_api, "_serving", [])


def test_inherited_settings_are_named_and_not_used(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("PREFECT_API_KEY", "secret")

    assert {"PREFECT_API_KEY", "PREFECT_API_URL"} <= set(unused_settings(Prefect.OWN))
    assert unused_settings(Prefect.INHERIT) == ()


def _refuse(status):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "refuses us"), (503, "has failed"), (404, "is no API of Prefect")],
)
def test_what_an_inherited_server_answers_is_said_in_words(monkeypatch, status, words):
    server = _refuse(status)
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = f"http://127.0.0.1:{server.server_port}/api"
    with (
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(QuantError, match=words) as caught,
        api_server(Prefect.INHERIT),
    ):
        pass
    server.shutdown()

    assert caught.value.where == url


def test_a_dead_inherited_server_is_an_error():
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"

    with (
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(QuantError, match="does not answer"),
        api_server(Prefect.INHERIT),
    ):
        pass


def test_a_server_of_our_own_is_told_no_events(monkeypatch):
    """Nobody could read them there, and a tiny model's batch makes a dozen."""
    from prefect.events import emit_event

    own = SimpleNamespace(url="http://127.0.0.1:9/api")
    monkeypatch.setattr(prefect_api, "_serving", [own])

    with settings_of_environment(Prefect.OWN):
        assert emit_event("stage.began", {"prefect.resource.id": "stage"}) is None


def test_a_lost_server_is_asked_for_nothing(monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    asked = []
    monkeypatch.setattr("prefect.artifacts.update_progress_artifact", lambda *a: asked.append(a))
    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", lambda *a, **k: "an id")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"

    row = ModelRow("run", "m", "", "m.onnx", "out.onnx", Outcome.DONE, Verdict.NONE)

    with temporary_settings({PREFECT_API_URL: url}):
        listen = with_progress("batch", 1, ignore, is_lost)
        listen(ModelDone(row))
        assert is_lost()

    assert not asked


def test_a_large_database_of_an_inherited_home_is_kept(monkeypatch, tmp_path):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    database = tmp_path / "prefect.db"
    database.touch()
    os.truncate(database, 1 << 30)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setattr(own_server.sys, "executable", "true")

    with temporary_settings(restore_defaults={PREFECT_API_URL}), api_server(Prefect.INHERIT):
        pass

    assert database.stat().st_size == 1 << 30


def test_a_server_that_dies_is_not_waited_for(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\nsleep 0.3; echo 'OSError: no more of it' >&2; echo bye >&2; exit 1"
    )
    python.chmod(0o755)
    monkeypatch.setattr(own_server.sys, "executable", str(python))

    started = time.monotonic()
    with api_server(Prefect.OWN) as server, pytest.raises(QuantError, match="no more of it"):
        server.wait()

    assert time.monotonic() - started < own_server.START_UP_S / 2
