"""The questions of operations have the same answer in DuckDB, Polars and pandas."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from deployments.dashboard import with_duckdb, with_pandas, with_polars
from quant_core.evaluate.contract import Verdict
from tasks.report import write_table
from tasks.rows import AuditOutcome, AuditRow, ModelRow, Outcome

NIGHT = datetime(2026, 5, 4, 2, tzinfo=UTC)
NIGHTS = 9
APP = Path(__file__).parents[3] / "deployments" / "dashboard" / "app.py"
ENGINES = {"duckdb": with_duckdb, "polars": with_polars, "pandas": with_pandas}


def row(name: str, night: int, **values) -> ModelRow:
    made = ModelRow(
        run_id=f"run-{night}",
        model=name,
        digest="d",
        input=f"in/{name}.onnx",
        output=f"out/{name}.onnx",
        outcome=Outcome.DONE,
        verdict=Verdict.MET,
        reason="as promised",
        float_size_bytes=400,
        size_bytes=100,
        metric="top1",
        accuracy=0.99,
        speedup=2.0,
        busy=False,
        started_at=NIGHT + timedelta(days=night),
    )
    return replace(made, **values)


def failure(name: str, night: int, error: str) -> ModelRow:
    nothing = dict.fromkeys(("reason", "float_size_bytes", "size_bytes", "accuracy", "speedup"))
    failed = {"outcome": Outcome.FAILED, "verdict": Verdict.NONE, "stage": "calibrate"}
    return row(name, night, **nothing, **failed, error=error, hint="Give samples")


def night_of(night: int) -> list[ModelRow]:
    """The rows of one night: `good` stays as it is, each other model has its own trouble."""
    is_last = night == NIGHTS - 1
    rows = [
        row("good", night),
        row("slower", night, speedup=1.0 if is_last else 2.0),
        row("busy", night, speedup=1.0 if is_last else 2.0, busy=is_last),
        row("wronger", night, accuracy=0.9 if is_last else 0.99),
        row("judged_anew", night, accuracy=0.5 if is_last else 0.99, metric=f"m{int(is_last)}"),
        row("missed", night, verdict=Verdict.NOT_MET, reason=f"drop 0.{night}"),
        row("met_once", night, verdict=Verdict.MET if night == 3 else Verdict.NOT_MET),
        failure("fails", night, f"error {night}") if night > 5 else row("fails", night),
        failure("never_made", night, "no such file"),
        failure("mended", night, "gone") if night == 4 else row("mended", night),
    ]
    skipped = replace(row("skipped", night), outcome=Outcome.SKIPPED, speedup=1.0)
    return [*rows, skipped if night else row("skipped", night)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Nine nights, the first of which an earlier version reported, and an audit of the last."""
    folder = tmp_path_factory.mktemp("it's") / "reports"
    for night in range(NIGHTS):
        path = write_table(folder, "models", f"run-{night}", night_of(night))
        if night == 0:
            earlier = pq.ParquetFile(path).read().drop_columns(["busy", "host_load", "note"])
            pq.write_table(earlier, path)
    audited = AuditRow(
        run_id=f"run-{NIGHTS}",
        model="audited",
        digest="d",
        output="out/good.onnx",
        outcome=AuditOutcome.REGRESSED,
        metric="top1",
        accuracy=0.8,
        speedup=1.5,
        started_at=NIGHT + timedelta(days=NIGHTS),
    )
    write_table(folder, "audits", "audit", [audited])
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_what_got_slower_since_last_week(reports, engine):
    rows = ENGINES[engine].ask("slower", reports)

    assert [tuple(row.values()) for row in rows] == [
        ("out/slower.onnx", "slower", 2.0, 1.0),
        ("out/good.onnx", "audited", 2.0, 1.5),
    ]
    assert list(rows[0]) == ["output", "model", "speedup_before", "speedup_now"]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_got_less_accurate_since_last_week(reports, engine):
    rows = ENGINES[engine].ask("less_accurate", reports)

    assert [tuple(row.values()) for row in rows] == [
        ("out/good.onnx", "audited", "top1", 0.99, 0.8),
        ("out/wronger.onnx", "wronger", "top1", 0.99, 0.9),
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_failed_and_why(reports, engine):
    rows = ENGINES[engine].ask("failed", reports)

    assert [(row["model"], row["error"], row["runs"]) for row in rows] == [
        ("fails", "error 8", 3),
        ("never_made", "no such file", 9),
    ]
    assert rows[0]["stage"] == "calibrate"
    assert rows[0]["hint"] == "Give samples"
    assert rows[0]["failed_since"] == NIGHT + timedelta(days=6)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_size_saved_in_all(reports, engine):
    (row,) = ENGINES[engine].ask("saved", reports)

    assert row == {
        "models": 10,
        "float_size_bytes": 4000,
        "size_bytes": 1000,
        "saved_bytes": 3000,
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_what_never_met_its_contract(reports, engine):
    rows = ENGINES[engine].ask("never_met", reports)

    assert [tuple(row.values()) for row in rows] == [("out/missed.onnx", "missed", 9, "drop 0.8")]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("question", with_duckdb.QUESTIONS)
def test_every_question_is_answered_before_the_first_audit(reports, tmp_path, engine, question):
    write_table(tmp_path, "models", "run-0", night_of(0))

    assert isinstance(ENGINES[engine].ask(question, tmp_path), list)
    assert ENGINES[engine].QUESTIONS.keys() == with_duckdb.QUESTIONS.keys()


@pytest.mark.slow
def test_the_live_page_shows_the_last_run_the_answers_and_one_model_over_the_runs(
    reports, monkeypatch
):
    from streamlit.testing.v1 import AppTest

    (reports / "summary.json").write_text('{"state": "Running", "message": "<b>it\'s</b>"}')
    monkeypatch.setattr("sys.argv", ["app.py", str(reports)])

    page = AppTest.from_file(APP, default_timeout=60).run()

    assert not page.exception
    assert {one.label: one.value for one in page.metric} == {
        "models": "10",
        "saved": "3.0 kB",
        "failed": "2",
        "slower or less accurate": "4",
        "never met": "1",
    }
    assert page.subheader[0].value == "Last run: Running"
    assert page.text[0].value.startswith("<b>it's</b>")
    assert len(page.dataframe) == 5
    assert len(page.selectbox[0].options) == 11

    monkeypatch.setattr("sys.argv", ["app.py", str(reports / "models")])
    assert "Name a folder of reports" in AppTest.from_file(APP).run().error[0].value
