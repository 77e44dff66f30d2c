"""What the reports of an output folder say: one run, and those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import pyarrow.compute as pc

from quant_core.errors import RequestError
from tasks.report import read_table

Rows = list[dict[str, Any]]

RUNS_IN_TREND = 20
TREND_COLUMNS = (
    "run_id", "output", "outcome", "verdict", "size_bytes", "metric", "accuracy", "speedup", "busy"
)  # fmt: skip


class Reports(TypedDict):
    """All runs of an output folder, oldest first, and the models of one of them.

    unreadable  the files that were passed over
    """

    runs: Rows
    models: Rows
    unreadable: list[str]


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


def read_reports(folder: Path, run_id: str | None = None) -> Reports:
    """The rows of all runs, with the models of the latest one or of the one of that id.

    folder  a batch's output folder, or the reports folder in it

    Raises: RequestError if there is no report, or no such run.
    """
    reports = _tables_of(folder)
    table, unreadable = read_table(reports, "runs")
    runs: Rows = sorted(table.to_pylist(), key=lambda run: run["run_id"])
    if not runs:
        raise _no_rows(reports / "runs", unreadable)
    ids = [run["run_id"] for run in runs]
    wanted = ids[-1] if run_id is None else run_id
    if wanted not in ids:
        raise RequestError(f"no run {wanted}", str(folder), f"Runs: {', '.join(ids[-5:])}")
    models, unreadable_models = read_table(reports, "models", rows=pc.field("run_id") == wanted)
    if not models.num_rows:
        raise _no_rows(reports / "models", unreadable_models)
    passed_over = [str(path) for path in (*unreadable, *unreadable_models)]
    return {"runs": runs, "models": models.to_pylist(), "unreadable": passed_over}


def read_page(folder: Path, run_id: str | None = None) -> PageData:
    """What the page shows of the latest run of an output folder, or of the one of that id.

    Arguments and errors are those of `read_reports`.
    """
    found, tables = read_reports(folder, run_id), _tables_of(folder)
    models = found["models"]
    ids = [row["run_id"] for row in found["runs"]]
    runs = found["runs"][: ids.index(models[0]["run_id"]) + 1]
    earlier = [row["run_id"] for row in runs[:-1]][-RUNS_IN_TREND:]
    of_digests = pc.field("digest").isin([row["digest"] for row in models if row["digest"]])
    layers, _ = read_table(tables, "layers", rows=of_digests)
    stages, _ = read_table(tables, "timings", rows=of_digests)
    return PageData(
        runs=runs,
        models=models,
        layers=_latest(layers.to_pylist(), runs),
        stages=_latest(stages.to_pylist(), runs),
        history=_history(tables, earlier),
    )


def _tables_of(folder: Path) -> Path:
    """The folder of the tables, in an output folder or that folder itself."""
    return folder if (folder / "runs").is_dir() else folder / "reports"


def _history(reports: Path, run_ids: Sequence[str]) -> dict[str, Rows]:
    if not run_ids:
        return {}
    of_runs = pc.field("run_id").isin(run_ids)
    rows = read_table(reports, "models", TREND_COLUMNS, of_runs)[0].to_pylist()
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


def _no_rows(table: Path, unreadable: Sequence[Path]) -> RequestError:
    if unreadable:
        hint = "`quantmill report --rebuild DIR` mends it"
        return RequestError("cannot be read: it is no whole Parquet file", str(unreadable[0]), hint)
    where = table if table.is_dir() else table.parent
    hint = "Name the output folder of a batch, which holds reports/"
    return RequestError("holds no report", str(where), hint)
