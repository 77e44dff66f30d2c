"""The reports as Parquet: one typed table for each kind of row, one file for each run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from quant_core.fields import field_types
from quant_core.model.atomic import atomic_write
from quant_core.text import storable
from tasks.rows import SCHEMA_VERSION, TABLES, Row

ARROW_TYPES = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime: pa.timestamp("us", tz="UTC"),
}


def schema_of(row: type[Row]) -> pa.Schema:
    """The Arrow schema of a table with such rows; every column may be null."""
    columns = field_types(row).items()
    fields = [(name, _arrow_type(types)) for name, types in columns]
    return pa.schema(fields, metadata={"quantmill_schema": str(SCHEMA_VERSION)})


def _arrow_type(types: tuple[type, ...]) -> pa.DataType:
    (kind,) = (kind for kind in types if kind is not NoneType)
    return ARROW_TYPES[str if issubclass(kind, StrEnum) else kind]


SCHEMAS = {name: schema_of(row) for name, row in TABLES.items()}


def write_table(
    folder: Path, name: str, run_id: str, rows: Iterable[Row | Mapping[str, Any]]
) -> Path:
    """Write the rows to `folder/name/run_id.parquet`, which appears as a whole or not at all.

    A file that were half written would spoil the data set for all readers.

    rows  of this table's type, or as `read_table` gives them: column -> value, absent ones null

    Raises: TypeError for a row of another table; TypeError or ValueError for a value that is not
        of its column's type.
    """
    values = [_values(name, row) for row in rows]
    table = pa.Table.from_pylist(values, SCHEMAS[name])
    path = folder / name / f"{run_id}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    for stray in path.parent.glob(".*.tmp"):
        stray.unlink(missing_ok=True)
    with atomic_write(path) as file:
        pq.write_table(table, file, compression="zstd")
    return path


def write_tables(folder: Path, run_id: str, tables: Mapping[str, Iterable[Row]]) -> None:
    """Write a run's rows of every table; files that an interrupted attempt left are replaced."""
    for name, rows in tables.items():
        write_table(folder, name, run_id, rows)


def read_table(
    folder: Path, name: str, columns: Sequence[str] | None = None, rows: pc.Expression | None = None
) -> tuple[pa.Table, list[Path]]:
    """The rows of a table, in the order of its runs, and the files of it that cannot be read.

    Files of all versions are read together, in today's columns: those of a file under an earlier
    name get today's, those that it lacks are null, those that only a later version has are left
    out. Names that start with a dot are files that are being written, or that were set aside.

    columns  the names of those to read; None: all
    rows     which rows to read, by `run_id` or `digest`; None: all
    """
    schema = SCHEMAS[name]
    if columns is not None:
        schema = pa.schema([schema.field(column) for column in columns], schema.metadata)
    parts, unreadable = [schema.empty_table()], []
    for path in sorted((folder / name).glob("[!.]*.parquet")):
        try:
            parts.append(_as_today(path, name, schema, rows))
        except (OSError, pa.ArrowException):
            unreadable.append(path)
    return pa.concat_tables(parts), unreadable


def _as_today(path: Path, name: str, schema: pa.Schema, rows: pc.Expression | None) -> pa.Table:
    """The rows of one file in the columns of `schema`."""
    renamed = TABLES[name].renamed
    today = {renamed.get(known, known): known for known in pq.read_schema(path).names}
    known = {column: today[column] for column in schema.names if column in today}
    # not read_table(path): it would take the names of folders for columns
    found = pq.read_table(path, columns=list(known.values()), filters=rows, partitioning=None)
    arrays = {column: found[earlier] for column, earlier in known.items()}
    nulls = {column: pa.nulls(len(found)) for column in schema.names if column not in arrays}
    arrays |= nulls
    return pa.table([arrays[column] for column in schema.names], schema.names).cast(schema)


def _values(name: str, row: Row | Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns of a row that the table `name` gets."""
    columns = SCHEMAS[name].names
    if isinstance(row, Row):
        if not isinstance(row, TABLES[name]):
            raise TypeError(f"the table {name} has no row of type {type(row).__name__}")
        values = {column: getattr(row, column) for column in columns}
        return {key: storable(v) if isinstance(v, str) else v for key, v in values.items()}
    if unknown := row.keys() - set(columns):
        raise TypeError(f"the table {name} has no column {', '.join(sorted(unknown))}")
    return row
