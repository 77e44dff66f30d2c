"""The Parquet reports of an output folder, read as plain rows."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from quant_core.errors import RequestError
from tasks.rows import TABLES

Rows = list[dict[str, Any]]


def read_reports(folder: Path, run_id: str | None = None) -> dict[str, Rows]:
    """`runs`, oldest first, and the `models` of one run: of `run_id`, or of the latest.

    folder  a batch's output folder, or the reports folder in it

    Raises: RequestError if there is no report, or no such run.
    """
    reports = folder if (folder / "runs").is_dir() else folder / "reports"
    runs = sorted(_rows(reports / "runs"), key=lambda run: run["started_at"])
    wanted = runs[-1]["run_id"] if run_id is None else run_id
    if wanted not in [run["run_id"] for run in runs]:
        hint = f"Runs: {', '.join(run['run_id'] for run in runs[-5:])}"
        raise RequestError(f"no run {wanted}", str(folder), hint)
    return {"runs": runs, "models": _rows(reports / "models", wanted)}


def _rows(table: Path, run_id: str | None = None) -> Rows:
    """The rows of one table in the order in which they were written; of one run, or of all.

    Every row has the columns of today's table, whichever version wrote its file.
    """
    hint = "Name the output folder of a batch, which holds reports/"
    kind = TABLES[table.name]
    columns = [field.name for field in fields(kind)]
    rows: Rows = []
    unreadable = []
    # Names that start with a dot are files that are being written, or that are torn.
    for path in sorted(table.glob("[!.]*.parquet")):
        try:
            found = pq.ParquetFile(path).read().to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            unreadable.append((path, error))
            continue
        for row in found:
            present = {kind.renamed.get(name, name): value for name, value in row.items()}
            rows.append({**dict.fromkeys(columns), **present})
    if run_id is not None:
        rows = [row for row in rows if row["run_id"] == run_id]
    if not rows and unreadable:
        path, reason = unreadable[0]
        problem = f"cannot be read: {str(reason).splitlines()[0]}"
        raise RequestError(problem, str(path), "`quantmill report --rebuild DIR` mends it")
    if not rows:
        where = table if table.is_dir() else table.parent
        raise RequestError("holds no report", str(where), hint)
    return rows
