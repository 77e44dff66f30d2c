"""Prefect's server listens on loopback alone, and gets nothing that it does not need."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from flows.runtime import dask, prefect_api
from quant_core.errors import QuantError


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for key in ("DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED"):
        monkeypatch.delenv(key, raising=False)
    before = dict(os.environ)
    monkeypatch.setattr(prefect_api, "_serving", [])  # another test's may run in this process
    with prefect_api.api_server() as server:
        yield server
    os.environ.clear()
    os.environ.update(before)


def test_it_is_reached_from_this_host_alone(server):
    address, port = server.listener.getsockname()

    assert address == "127.0.0.1"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(
            ("127.0.0.2", port), timeout=5
        )  # this host, by another of its addresses


def test_it_gets_a_minimal_environment_with_telemetry_off(server):
    assert "SECRET_TOKEN" not in server.environment
    assert server.environment["DO_NOT_TRACK"] == "1"
    assert server.environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_a_host_that_cannot_talk_to_itself_is_an_error_in_words(monkeypatch):
    def unreachable(*arguments):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    dask.check_loopback()
    monkeypatch.setattr(dask.socket, "create_connection", unreachable)

    with pytest.raises(QuantError, match="cannot be reached: network is unreach"):
        dask.check_loopback()
