"""What a run of a batch came to, as its row says it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from flows.batch.rows import run_row
from flows.console.result import BatchResult
from flows.entries import RunEntry


def test_a_clock_that_jumps_adds_no_seconds_to_a_run(tmp_path):
    began = datetime.now(UTC)
    result = BatchResult("run", (), Path("reports"), 3.0)

    row = run_row(RunEntry("run", "", began), result, began + timedelta(days=2), 1, tmp_path)

    assert row.seconds == 3.0
    assert row.finished_at - row.started_at == timedelta(days=2)
