"""A child process, in which the models of strangers run, gets none of this one's secrets."""

from __future__ import annotations

from quant_core.worker.child import KEPT_ENVIRONMENT, ONE_THREAD
from quant_core.worker.run import run_stage, shut_down


def test_a_child_sees_a_minimal_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    shut_down()

    seen = run_stage("environment", {}, module="tests.odd_stages")["result"]["keys"]

    shut_down()
    assert set(seen) <= {*KEPT_ENVIRONMENT, *ONE_THREAD, "PYTHONPATH", "LC_CTYPE"}
    assert "PATH" in seen
