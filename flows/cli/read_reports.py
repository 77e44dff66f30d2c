"""What the Parquet reports of a folder say, as plain rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from quant_core.errors import RequestError

Rows = list[dict[str, Any]]


def read_reports(folder: Path, run_id: str | None = None) -> dict[str, Rows]:
    """`runs`, oldest first, and the `models` of one of them: the latest unless `run_id` says another.

    `folder` is a batch's output folder, or the reports folder in it. Raises: RequestError if there is no report.
    """
    reports = folder if (folder / "runs").is_dir() else folder / "reports"
    runs = sorted(_rows(reports / "runs"), key=lambda run: run["started_at"])
    wanted = runs[-1]["run_id"] if run_id is None else run_id
    if wanted not in [run["run_id"] for run in runs]:
        raise RequestError(
            f"no run {wanted}",
            str(folder),
            f"Runs: {', '.join(run['run_id'] for run in runs[-5:])}",
        )
    return {"runs": runs, "models": _rows(reports / "models", wanted)}


def _rows(table: Path, run_id: str | None = None) -> Rows:
    """Rows of one table, of all runs or of one; in the order they were written."""
    hint = "Name the output folder of a batch, which holds reports/"
    try:
        found = ds.dataset(table, format="parquet")  # passes over names that start with a dot
        rows: Rows = found.to_table(
            filter=None if run_id is None else ds.field("run_id") == run_id
        ).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        if table.is_dir():
            raise RequestError(
                f"cannot be read: {str(error).splitlines()[0]}", str(table), hint
            ) from error
        raise RequestError("holds no report", str(table.parent), hint) from error
    if not rows:
        raise RequestError("holds no report", str(table), hint)
    return rows
