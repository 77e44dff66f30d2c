"""The batch on a real Prefect server and Dask workers: models are made, or fail with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import onnxruntime as ort
import pandas
import polars
import pyarrow.dataset
import pytest

from flows.console.events import StageBegan
from flows.manifest.outputs import FOLDER
from quant_core.errors import RequestError
from tests.pipeline.conftest import QUICK, age, save_data, save_model

pytestmark = pytest.mark.slow  # every test starts batches on a real Prefect and a real Dask

STAGES = ("prepare", "calibrate", "quantize", "validate", "benchmark")


def by_name(result):
    return {row.model: row for row in result.rows}


def tables(result) -> dict[str, list[dict]]:
    return {
        name: pyarrow.dataset.dataset(result.reports / name).to_table().to_pylist()
        for name in ("runs", "models", "layers", "timings")
    }


def test_models_are_made_validated_timed_and_reported(mill, run):
    manifest = mill(
        "a", "b", evaluation={"data": "data.npy"}, contract={"metric": "cosine", "min": 0.9}
    )

    result = run(manifest)

    assert result.exit_code == 0
    for job in manifest.jobs:
        before, after = (
            ort.InferenceSession(path).get_inputs()[0].name for path in (job.input, job.output)
        )
        assert before == after
    row = by_name(result)["a"]
    assert (row.outcome, row.verdict, row.metric) == ("done", "met", "cosine")
    assert row.size_bytes == manifest.jobs[0].output.stat().st_size
    assert row.speedup > 0
    found = tables(result)
    assert [r["models"] for r in found["runs"]] == [2]
    assert {r["model"] for r in found["models"]} == {"a", "b"}
    assert {r["node"] for r in found["layers"] if r["isolated_db"] and r["cumulative_db"]} >= {
        "conv",
        "gemm",
    }
    assert {r["stage"] for r in found["timings"]} == {*STAGES}
    assert not list((manifest.folder / FOLDER / "cache").iterdir())


def test_bad_samples_fail_their_model_alone(mill, run, tmp_path):
    samples = np.zeros((4, 3, 8, 8), np.float32)
    samples[2, 0, 0, 0] = np.nan
    np.save(tmp_path / "data-bad.npy", samples)
    np.save(tmp_path / "data-good.npy", np.ones((4, 3, 8, 8), np.float32))
    age(tmp_path / "data-bad.npy"), age(tmp_path / "data-good.npy")

    result = run(mill("good", "bad", calibration={"data": "data-{name}.npy"}))

    assert by_name(result)["good"].outcome == "done"
    assert by_name(result)["bad"].outcome == "failed"
    assert "NaN" in by_name(result)["bad"].error


def test_an_answer_that_fits_no_column_of_a_report_fails_its_model_alone(mill, run, monkeypatch):
    from flows.batch import batch  # imports Prefect, which reads PREFECT_API_URL then

    entry_of = batch.model_entry

    def model_entry(model, run_id):
        if model.job.name == "odd":
            raise TypeError("ModelRow.size_bytes is 'large', which is not int or NoneType")
        return entry_of(model, run_id)

    monkeypatch.setattr(batch, "model_entry", model_entry)

    rows = by_name(run(mill("good", "odd", **QUICK)))

    assert rows["good"].outcome == "done"
    assert (rows["odd"].outcome, rows["odd"].stage) == ("failed", "report")
    assert "size_bytes is 'large'" in rows["odd"].error


def test_without_continue_on_error_nothing_is_started_after_a_failure(mill, run, tmp_path):
    names = [f"m{k}" for k in range(8)]
    manifest = mill(*names, batch={"continue_on_error": False}, **QUICK)
    (tmp_path / "models" / "m0.onnx").write_bytes(b"no model" * 9999)  # the largest is the first

    result = run(manifest)

    assert result.counts["failed"] > 1
    assert by_name(result)["m7"].error == "not started: another failed"


def test_a_model_that_is_replaced_while_it_is_made_fails_and_is_made_next_time(mill, run, tmp_path):
    manifest = mill("a", "replaced", **QUICK)
    save_model(tmp_path / "models" / "another.onnx", seed=9)
    (tmp_path / "models" / "another.onnx").rename(tmp_path / "models" / "replaced.other")

    row = by_name(run(manifest))["replaced"]

    assert (row.outcome, row.stage) == ("failed", "publish")
    assert "changed while it was made" in row.error
    assert not Path(row.output).exists()
    assert run(manifest).counts == {"done": 1, "skipped": 1, "failed": 0, "not_met": 0}


def test_up_to_date_models_are_skipped_until_something_that_made_them_changes(mill, run, tmp_path):
    manifest = mill("a", "b", "c", **QUICK)
    first = run(manifest)
    assert first.counts["done"] == 3

    second = run(manifest)
    assert second.counts == {"done": 0, "skipped": 3, "failed": 0, "not_met": 0}
    assert by_name(second)["a"].size_bytes == by_name(first)["a"].size_bytes

    save_model(tmp_path / "models" / "a.onnx", seed=9)
    manifest.jobs[1].output.write_bytes(b"changed by hand")
    third = run(manifest)
    assert {name: row.outcome for name, row in by_name(third).items()} == {
        "a": "done",
        "b": "done",
        "c": "skipped",
    }

    assert run(manifest, force=True, only=["c"]).counts["done"] == 1

    save_data(tmp_path / "data.npy", seed=1)
    assert run(manifest).counts["done"] == 3


def test_a_batch_with_nothing_to_make_starts_neither_prefect_nor_workers(mill, run, monkeypatch):
    manifest = mill("a", "b", **QUICK)
    first = run(manifest)
    monkeypatch.setattr("flows.runtime.dask.api_and_dask", None)

    second = run(manifest)

    assert second.counts == {"done": 0, "skipped": 2, "failed": 0, "not_met": 0}
    assert [row["workers"] for row in tables(second)["runs"]] == [2, 0]
    summary = json.loads((second.reports / "summary.json").read_text())
    assert (summary["run_id"], summary["state"]) == (second.run_id, "Completed")

    journal = manifest.folder / FOLDER / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]))  # the first run was killed before its reports

    assert run(manifest).run_id == first.run_id
    assert run(manifest).counts["skipped"] == 2


def test_the_reports_of_many_runs_are_read_together_by_four_readers(mill, run):
    manifest = mill("a", "segfault")
    run(manifest)
    reports = run(manifest).reports

    for name, rows in {"runs": 2, "models": 4, "timings": 9}.items():
        glob = f"{reports}/{name}/*.parquet"
        assert pyarrow.dataset.dataset(reports / name).to_table().num_rows == rows
        assert (
            duckdb.sql(f"select * from read_parquet('{glob}', union_by_name=true)")
            .fetchall()
            .__len__()
            == rows
        )
        assert len(polars.read_parquet(glob)) == rows
        assert len(pandas.read_parquet(reports / name)) == rows
    models = pandas.read_parquet(reports / "models")
    assert models["started_at"].dt.tz is not None
    assert json.loads(models["config"].iloc[0])["bits"] == 8


def test_what_was_timed_is_kept_and_makes_the_same_models_again(mill, run):
    manifest = mill("a", "b")
    run(manifest)
    table = manifest.folder / FOLDER / "costs.jsonl"
    timed, made = table.read_bytes(), [job.output.read_bytes() for job in manifest.jobs]

    again = run(manifest, force=True)

    assert timed
    assert [row.outcome for row in again.rows] == ["done", "done"]
    assert table.read_bytes() == timed
    assert [job.output.read_bytes() for job in manifest.jobs] == made


def test_a_run_that_was_cut_short_keeps_what_is_finished_and_does_the_rest(mill, run):
    """The journal lacks the end of the run and one model, whose stages are half done."""
    manifest = mill("a", "b", batch={"keep_cache": True})
    first = run(manifest)
    path = manifest.folder / FOLDER / "journal.jsonl"
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["event"] != "end"]
    path.write_text("\n".join(line for line in lines if json.loads(line).get("name") != "b") + "\n")
    cache = manifest.folder / FOLDER / "cache" / by_name(first)["b"].digest
    for stage in ("quantize", "validate", "sensitivity", "benchmark"):
        (cache / f"{stage}.json").unlink(missing_ok=True)
    (cache / "out" / ".quantmill-half").mkdir()  # killed while it wrote the model
    (cache / "out" / ".quantmill-half" / "b_int8.onnx").write_bytes(b"half")
    before, worked = tables(first)["layers"], []

    again = run(manifest, on_progress=worked.append)

    assert again.run_id == first.run_id
    # one model on two workers: they share the samples that tell what each node costs
    assert [event for event in worked if isinstance(event, StageBegan)] == [
        StageBegan("b", str(manifest.folder / "b_int8.onnx"), stage)
        for stage in ("quantize", "validate", "sensitivity", "benchmark")
    ]
    assert sorted(map(str, tables(again)["layers"])) == sorted(map(str, before))
    assert [row.outcome for row in again.rows] == ["done", "done"]
    assert sorted(path.name for path in manifest.folder.glob("*")) == [
        FOLDER,
        "a_int8.onnx",
        "b_int8.onnx",
        "reports",
    ]
    assert len(tables(again)["models"]) == 2
    assert len(tables(again)["runs"]) == 1


def test_what_failed_in_a_run_that_was_cut_short_is_tried_again_from_the_stage_that_failed(
    mill, run
):
    manifest = mill("a", "segfault")
    first = run(manifest)
    path = manifest.folder / FOLDER / "journal.jsonl"
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["event"] != "end"]
    path.write_text("\n".join(lines) + "\n")
    worked = []

    again = run(manifest, on_progress=worked.append)

    assert again.run_id == first.run_id
    begun = [event for event in worked if isinstance(event, StageBegan)]
    assert [(event.model, event.stage) for event in begun] == [("segfault", "quantize")]
    assert [row.outcome for row in again.rows] == ["done", "failed"]
    assert len(tables(again)["models"]) == 2


def test_a_missed_contract_is_a_verdict_with_its_reason_and_the_file_is_there(mill, run):
    manifest = mill("a", contract={"metric": "cosine", "min": 0.9, "min_speedup": 1000.0})

    result = run(manifest)

    assert by_name(result)["a"].verdict == "not_met"
    assert "speedup" in by_name(result)["a"].reason
    assert manifest.jobs[0].output.exists()
    assert result.exit_code == 1


def test_only_globs_that_match_nothing_are_a_wrong_request(mill, run):
    with pytest.raises(RequestError, match="matches no model"):
        run(mill("a"), only=["zzz*"])
