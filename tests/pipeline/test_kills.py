"""kill -9 of the coordinator at three random moments; tests/bench/kills.py does it fifty times."""

from __future__ import annotations

import pytest

from tests.bench.kills import storm


@pytest.mark.slow
def test_rows_and_files_after_kills_are_those_of_an_undisturbed_run(tmp_path, harness):
    after, calm, hits = storm(tmp_path, kills=3, models=6, options=("--prefect", "inherit"))

    assert hits > 0
    assert after["files"] == calm["files"]
    assert after["tables"] == calm["tables"]
    assert [name for name in after["others"] if name.endswith(".tmp")] == []
