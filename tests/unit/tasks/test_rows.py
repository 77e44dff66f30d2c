"""A report row cannot hold a column that its table lacks, nor a value of another type."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow
import pyarrow.compute
import pytest
from pyarrow import parquet

from flows.reading import read_reports
from quant_core.evaluate.contract import Verdict
from tasks.report import SCHEMAS, read_table, write_table
from tasks.rows import TABLES, AuditRow, LayerRow, ModelRow, Outcome, RunRow, TimingRow

MODEL = {"run_id": "r", "model": "m", "digest": "d", "input": "m.onnx", "output": "o.onnx"}
LAYER = {"run_id": "r", "model": "m", "digest": "d", "position": 0, "node": "conv"}


def model_row(**values) -> ModelRow:
    return ModelRow(**{**MODEL, "outcome": Outcome.DONE, "verdict": Verdict.MET, **values})


def test_a_mistyped_column_is_an_error_where_the_row_is_built():
    with pytest.raises(TypeError, match="speedupp"):
        model_row(speedupp=2.0)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("speedup", "2.0"),
        ("size_bytes", 1.5),
        ("size_bytes", True),
        ("busy", 1),
        ("started_at", "2026-01-01T00:00:00+00:00"),
        ("started_at", datetime(2026, 1, 1)),  # without a time zone
        ("outcome", "done"),
        ("model", None),
    ],
)
def test_a_value_of_another_type_is_an_error_that_names_its_column(column, value):
    with pytest.raises(TypeError, match=f"ModelRow.{column} "):
        model_row(**{column: value})


def test_a_whole_number_is_a_real_one():
    assert model_row(speedup=2).speedup == 2.0


def test_only_rows_of_a_table_are_written_to_it(tmp_path):
    with pytest.raises(TypeError, match="models"):
        write_table(tmp_path, "models", "r", [LayerRow(**LAYER)])

    assert not list(tmp_path.glob("*/*.parquet"))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_columns_of_its_rows_in_their_order(name):
    assert SCHEMAS[name].names == [field.name for field in fields(TABLES[name])]


def test_arrow_types_follow_from_the_types_of_the_fields():
    models = SCHEMAS["models"]

    assert models.field("outcome").type == pyarrow.string()
    assert models.field("size_bytes").type == pyarrow.int64()
    assert models.field("speedup").type == pyarrow.float64()
    assert models.field("busy").type == pyarrow.bool_()
    assert models.field("started_at").type == pyarrow.timestamp("us", tz="UTC")


def test_what_is_written_is_what_a_reader_finds(tmp_path):
    moment = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)

    path = write_table(tmp_path, "models", "r", [model_row(speedup=2.0, started_at=moment)])

    (found,) = parquet.read_table(path).to_pylist()
    assert found["outcome"] == "done"
    assert found["speedup"] == 2.0
    assert found["started_at"] == moment
    assert found["error"] is None


@pytest.mark.parametrize(
    "row",
    [
        model_row(speedup=2.5, busy=False, started_at=datetime.now(UTC)),
        LayerRow(**LAYER, isolated_db=31.5, zero_point=-3),
        TimingRow(run_id="r", model="m", digest="d", stage="benchmark", rounds=7),
    ],
)
def test_a_row_comes_back_from_its_json(row):
    assert type(row).from_json(row.to_json()) == row


def test_a_row_of_another_version_is_read_for_what_it_has():
    old = {**MODEL, "outcome": "skipped", "verdict": "none", "colour": "red"}

    row = ModelRow.from_json(old)

    assert row.outcome is Outcome.SKIPPED
    assert row.verdict is Verdict.NONE
    assert row.speedup is None


def test_a_layer_row_with_the_names_of_before_keeps_its_numbers():
    row = LayerRow.from_json({**LAYER, "alone_db": 30.0, "so_far_db": 20.0})

    assert (row.isolated_db, row.cumulative_db) == (30.0, 20.0)


def test_a_row_of_a_parquet_file_with_the_names_of_before_is_read(tmp_path):
    columns = {**LAYER, "alone_db": 30.0, "so_far_db": 20.0, "sqnr_db": None}
    parquet.write_table(pyarrow.Table.from_pylist([columns]), tmp_path / "old.parquet")

    (found,) = parquet.read_table(tmp_path / "old.parquet").to_pylist()

    assert LayerRow.from_json(found) == LayerRow(**LAYER, isolated_db=30.0, cumulative_db=20.0)


def test_every_table_names_its_run_first():
    assert {fields(row)[0].name for row in TABLES.values()} == {"run_id"}
    assert set(TABLES.values()) == {RunRow, ModelRow, LayerRow, TimingRow, AuditRow}


def test_reports_of_an_earlier_schema_are_read_beside_todays(tmp_path):
    reports = tmp_path / "reports"
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    for run in ("1", "2"):
        write_table(reports, "models", run, [replace(model_row(busy=True), run_id=run)])
        write_table(reports, "runs", run, [run_row(run, moment)])
    old = reports / "models" / "1.parquet"
    parquet.write_table(parquet.ParquetFile(old).read().drop_columns(["busy"]), old)

    assert [read_reports(tmp_path, run)["models"][0]["busy"] for run in ("1", "2")] == [None, True]
    assert SCHEMAS["models"].metadata == {b"quantmill_schema": b"5"}


def test_rows_that_were_read_are_written_again_with_nulls_for_what_they_lack(tmp_path):
    write_table(tmp_path / "a", "models", "1", [model_row(speedup=2.0)])
    (found,) = read_table(tmp_path / "a", "models", ["run_id", "speedup"])[0].to_pylist()

    write_table(tmp_path / "b", "models", "1", [found])

    (again,) = read_table(tmp_path / "b", "models")[0].to_pylist()
    assert {name: value for name, value in again.items() if value is not None} == found
    with pytest.raises(TypeError, match="speedupp"):
        write_table(tmp_path / "b", "models", "1", [found | {"speedupp": 2.0}])


def test_a_torn_report_hides_no_other(tmp_path):
    for run in ("1", "2"):
        write_table(tmp_path / "reports", "runs", run, [run_row(run, datetime.now(UTC))])
    write_table(tmp_path / "reports", "models", "2", [replace(model_row(), run_id="2")])
    (tmp_path / "reports" / "runs" / "1.parquet").write_bytes(b"PAR1")

    found = read_reports(tmp_path)

    assert [run["run_id"] for run in found["runs"]] == ["2"]
    assert [Path(path).name for path in found["unreadable"]] == ["1.parquet"]


def test_files_of_earlier_and_later_versions_are_one_table_in_todays_columns(tmp_path):
    folder = tmp_path / "layers"
    folder.mkdir()
    earlier = {**LAYER, "alone_db": 30.0, "so_far_db": 20.0}
    later = {**LAYER, "run_id": "s", "isolated_db": 31, "invented_later": "x"}
    for name, columns in (("1", earlier), ("2", later)):
        parquet.write_table(pyarrow.Table.from_pylist([columns]), folder / f"{name}.parquet")
    (folder / "3.parquet").write_bytes(b"PAR1 torn PAR1")

    table, unreadable = read_table(tmp_path, "layers")
    column, _ = read_table(
        tmp_path, "layers", ["isolated_db"], pyarrow.compute.field("run_id") == "s"
    )

    assert table.schema == SCHEMAS["layers"]
    assert table["isolated_db"].to_pylist() == [30.0, 31.0]
    assert table["scale"].to_pylist() == [None, None]
    assert column.to_pydict() == {"isolated_db": [31.0]}
    assert [path.name for path in unreadable] == ["3.parquet"]


def run_row(run_id, moment) -> RunRow:
    texts = ("folder", "host", "target", "python", "quantmill", "onnx", "onnxruntime")
    counts = ("models", "done", "skipped", "failed", "not_met", "workers")
    return RunRow(
        run_id=run_id,
        started_at=moment,
        finished_at=moment,
        seconds=1.0,
        **dict.fromkeys(texts, ""),
        **dict.fromkeys(counts, 1),
    )


def test_a_name_that_is_no_unicode_is_reported_with_escapes(tmp_path):
    write_table(tmp_path, "models", "r", [model_row(model=os.fsdecode(b"\xff"))])

    assert read_table(tmp_path, "models")[0]["model"].to_pylist() == ["\\udcff"]
