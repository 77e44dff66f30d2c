"""`quantmill report` shows the runs of a folder."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pyarrow
from pyarrow import parquet

from flows.cli.commands import main


def test_report_shows_the_latest_run_or_the_one_that_is_named(tmp_path, capsys):
    for day, outcome in ((1, "done"), (2, "failed")):
        run_id, when = f"run{day}", datetime(2026, 1, day, tzinfo=UTC)
        counts = {"models": 1, "done": 1, "skipped": 0, "failed": 0, "not_met": 0}
        run = {
            "run_id": run_id,
            "started_at": when,
            "seconds": 2.5,
            "host": "h",
            "target": "arm64",
            **counts,
        }
        sizes = {
            "float_size_bytes": 4_000_000,
            "size_bytes": 1_000_000,
            "speedup": 2.0,
            "float_ms": 4.0,
            "quantized_ms": 2.1,
            "busy": run_id == "run1",
        }
        judged = {
            "metric": "top1",
            "accuracy_float": 0.99,
            "accuracy": 0.98,
            "verdict": "none",
            "reason": None,
        }
        why = {"outcome": outcome, "stage": "prepare", "error": "not\x1bONNX"}
        for table, row in (
            ("runs", run),
            ("models", {"run_id": run_id, "model": "m", **sizes, **judged, **why}),
        ):
            (tmp_path / "reports" / table).mkdir(parents=True, exist_ok=True)
            parquet.write_table(
                pyarrow.Table.from_pylist([row]), tmp_path / "reports" / table / f"{run_id}.parquet"
            )
    (tmp_path / "reports" / "runs" / ".torn.parquet.tmp").write_bytes(b"PAR1")

    assert main(["report", str(tmp_path)]) == 0
    assert "failed: prepare: not\\x1bONNX" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "reports"), "--run", "run1"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["m"])
    for part in (
        "4.00 MB -> 1.00 MB",
        "4.00x smaller",
        "99.00 % -> 98.00 %",
        "top1",
        "4.00 ms -> 2.00 ms",
        "2.00x (busy)",
        "done",
    ):
        assert part in line
    assert main(["report", str(tmp_path), "--format", "json"]) == 0
    assert (
        json.loads(capsys.readouterr().out)["runs"][0]["started_at"] == "2026-01-01T00:00:00+00:00"
    )
    assert main(["report", str(tmp_path), "--run", "run3"]) == 2
    assert "run1, run2" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "elsewhere")]) == 2
    assert f"error: {tmp_path}/elsewhere/reports holds no report\n" in capsys.readouterr().err
