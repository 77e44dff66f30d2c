"""The questions of operations in SQL: `python -m deployments.dashboard.with_duckdb REPORTS`."""

from __future__ import annotations

import glob
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

SQL = Path(__file__).parent / "sql"
QUESTIONS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(SQL.glob("*.sql"))}
# Where nothing was audited yet there is no file that has these columns.
NO_AUDITS = """create view audits as select null::varchar as run_id, null::varchar as output,
    null::varchar as model, null::timestamptz as started_at, null::varchar as metric,
    null::double as accuracy, null::double as speedup, null::boolean as busy where false"""


def connect(reports: str | Path) -> duckdb.DuckDBPyConnection:
    """A connection with the views `models` and `audits` over the Parquet files of a folder.

    reports  the folder `reports` of an output folder, or a glob over several
    """
    connection = duckdb.connect()
    for table in ("models", "audits"):
        files = f"{reports}/{table}/*.parquet"
        if table == "audits" and not glob.glob(files):  # noqa: PTH207
            connection.execute(NO_AUDITS)
            continue
        quoted = files.replace("'", "''")
        # union_by_name: files of earlier versions lack columns
        rows = f"select * from read_parquet('{quoted}', union_by_name = true)"
        connection.execute(f"create view {table} as {rows}")
    return connection


def ask(question: str, reports: str | Path) -> list[dict[str, Any]]:
    """The rows that answer one of QUESTIONS."""
    with connect(reports) as connection:
        return rows(connection, QUESTIONS[question])


def rows(
    connection: duckdb.DuckDBPyConnection, query: str, values: Sequence[Any] = ()
) -> list[dict[str, Any]]:
    """What a query finds, column -> value for each row."""
    found = connection.execute(query, list(values))
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


if __name__ == "__main__":
    for name in QUESTIONS:
        print(name)
        for row in ask(name, sys.argv[1]):
            print("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
