"""Prefect's server listens on loopback alone, is told nothing it need not know, and tells nobody anything."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flows.runtime import api_server

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for key in ("DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED"):
        monkeypatch.delenv(key, raising=False)
    before = dict(os.environ)
    with api_server() as server:
        yield server
    os.environ.clear()
    os.environ.update(before)


def test_it_is_reached_from_this_host_alone(server):
    address, port = server.listener.getsockname()

    assert address == "127.0.0.1"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), timeout=5)  # this host, by another of its addresses


def test_it_gets_a_minimal_environment_with_telemetry_off(server):
    assert "SECRET_TOKEN" not in server.environment
    assert server.environment["DO_NOT_TRACK"] == "1"
    assert server.environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_telemetry_is_off_in_a_deployment_too():
    program = (
        "import flows.pipeline; from prefect._internal.analytics.enabled import is_telemetry_enabled;"
        "from prefect.settings import get_current_settings;"
        "print(is_telemetry_enabled(), get_current_settings().server.analytics_enabled)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "DO_NOT", "CI"))}

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["False", "False"]
