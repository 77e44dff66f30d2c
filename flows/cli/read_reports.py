"""The Parquet reports of an output folder, read as plain rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from quant_core.errors import RequestError

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
    """The rows of one table in the order in which they were written; of one run, or of all."""
    hint = "Name the output folder of a batch, which holds reports/"
    try:
        # A dataset ignores names that start with a dot: files that are being written.
        dataset = ds.dataset(table, format="parquet")
        of_run = None if run_id is None else ds.field("run_id") == run_id
        rows: Rows = dataset.to_table(filter=of_run).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        if table.is_dir():
            problem = f"cannot be read: {str(error).splitlines()[0]}"
            raise RequestError(problem, str(table), hint) from error
        raise RequestError("holds no report", str(table.parent), hint) from error
    if not rows:
        raise RequestError("holds no report", str(table), hint)
    return rows
