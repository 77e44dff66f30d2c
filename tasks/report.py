"""The reports as Parquet: one typed table for each kind of row, one file for each run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from types import NoneType

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from quant_core.model.atomic import atomic_write
from tasks.rows import SCHEMA_VERSION, TABLES, Row, column_types

ARROW_TYPES = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime: pa.timestamp("us", tz="UTC"),
}


def schema_of(row: type[Row]) -> pa.Schema:
    """The Arrow schema of a table with such rows; every column may be null."""
    columns = column_types(row).items()
    fields = [(name, _arrow_type(types)) for name, types in columns]
    return pa.schema(fields, metadata={"quantmill_schema": str(SCHEMA_VERSION)})


def _arrow_type(types: tuple[type, ...]) -> pa.DataType:
    (kind,) = (kind for kind in types if kind is not NoneType)
    return ARROW_TYPES[str if issubclass(kind, StrEnum) else kind]


SCHEMAS = {name: schema_of(row) for name, row in TABLES.items()}


@task(name="report", task_run_name="report {run_id}", cache_policy=NO_CACHE, persist_result=False)
def report(run_id: str, folder: Path, tables: Mapping[str, Iterable[Row]]) -> list[Path]:
    """Write this run's rows of every table; files that an interrupted attempt left are replaced."""
    return [write_table(folder, name, run_id, rows) for name, rows in tables.items()]


def write_table(folder: Path, name: str, run_id: str, rows: Iterable[Row]) -> Path:
    """Write the rows to `folder/name/run_id.parquet`, which appears as a whole or not at all.

    A file that were half written would spoil the data set for all readers.

    Raises: TypeError for a row of another table.
    """
    table = _table(name, list(rows))
    path = folder / name / f"{run_id}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    for stray in path.parent.glob(".*.tmp"):
        stray.unlink(missing_ok=True)
    with atomic_write(path) as file:
        pq.write_table(table, file, compression="zstd")
    return path


def _table(name: str, rows: list[Row]) -> pa.Table:
    schema = SCHEMAS[name]
    for row in rows:
        if not isinstance(row, TABLES[name]):
            raise TypeError(f"the table {name} has no row of type {type(row).__name__}")
    columns = [pa.array([getattr(row, c.name) for row in rows], c.type) for c in schema]
    return pa.table(columns, schema=schema)
