"""What the page shows, read from the Parquet of an output folder: one run, and those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from quant_core.errors import RequestError

Rows = list[dict[str, Any]]

RUNS_IN_TREND = 20
TREND_COLUMNS = (
    "run_id", "output", "outcome", "verdict", "size_bytes", "metric", "accuracy", "speedup", "busy"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PageData:
    """One run and what it is compared with.

    runs     of this folder, oldest first, up to the run that is shown
    models   rows of the models table of that run
    layers   digest -> its rows of the layers table, by position
    stages   digest -> its rows of the timings table
    history  path of the output -> its rows of earlier runs, oldest first, without failures
    """

    runs: Rows
    models: Rows
    layers: Mapping[str, Rows]
    stages: Mapping[str, Rows]
    history: Mapping[str, Rows]

    @property
    def run(self) -> dict[str, Any]:
        """The run that is shown."""
        return self.runs[-1]


def read_page(folder: Path, run_id: str | None = None) -> PageData:
    """The latest run of an output folder, or the one of that id.

    folder  a batch's output folder, or the reports folder in it

    Raises: RequestError if there is no report, or no such run.
    """
    reports = folder if (folder / "runs").is_dir() else folder / "reports"
    runs = sorted(_read(reports / "runs"), key=lambda run: run["started_at"])
    if not runs:
        raise RequestError("holds no report", str(folder), "Name the output folder of a batch")
    ids = [run["run_id"] for run in runs]
    wanted = ids[-1] if run_id is None else run_id
    if wanted not in ids:
        raise RequestError(f"no run {wanted}", str(folder), f"Runs: {', '.join(ids[-5:])}")
    runs = runs[: ids.index(wanted) + 1]
    earlier = [run["run_id"] for run in runs[:-1]][-RUNS_IN_TREND:]
    models = _read(reports / "models", ds.field("run_id") == wanted)
    digests = [row["digest"] for row in models if row["digest"]]
    of_digests = ds.field("digest").isin(digests)
    return PageData(
        runs=runs,
        models=models,
        layers=_latest(_read(reports / "layers", of_digests), runs),
        stages=_latest(_read(reports / "timings", of_digests), runs),
        history=_history(reports / "models", earlier),
    )


def _history(table: Path, run_ids: Sequence[str]) -> dict[str, Rows]:
    if not run_ids:
        return {}
    rows = _read(table, ds.field("run_id").isin(run_ids), TREND_COLUMNS)
    order = {run_id: i for i, run_id in enumerate(run_ids)}
    history: dict[str, Rows] = {}
    for row in sorted(rows, key=lambda row: order[row["run_id"]]):
        if row["outcome"] != "failed":
            history.setdefault(row["output"], []).append(row)
    return history


def _latest(rows: Rows, runs: Rows) -> dict[str, Rows]:
    """Digest -> the rows of the last run that made it: a model that is up to date has none."""
    order = {run["run_id"]: i for i, run in enumerate(runs)}
    made: dict[str, dict[str, Rows]] = {}
    for row in rows:
        if row["run_id"] in order:
            made.setdefault(row["digest"], {}).setdefault(row["run_id"], []).append(row)
    return {digest: of[max(of, key=order.__getitem__)] for digest, of in made.items()}


def _read(table: Path, rows: Any = None, columns: Sequence[str] | None = None) -> Rows:
    """The rows of a table that is a folder of Parquet files; nothing if there is none.

    Raises: RequestError if a file cannot be read.
    """
    if not table.is_dir():
        return []
    try:
        # A dataset ignores names that start with a dot: files that are being written.
        files = ds.dataset(table, format="parquet")
        # Files of different versions have different columns.
        fragments = [fragment.physical_schema for fragment in files.get_fragments()]
        files = files.replace_schema(pa.unify_schemas(fragments)) if fragments else files
        known = None if columns is None else [c for c in columns if c in files.schema.names]
        found: Rows = files.to_table(columns=known, filter=rows).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise RequestError(f"cannot be read: {str(error).splitlines()[0]}", str(table)) from error
    return found
