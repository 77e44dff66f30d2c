"""The questions of operations in pandas: the same answers as those of the SQL files."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import pandas as pd

WEEK = pd.Timedelta(days=6)  # a run of last week may have been an hour later in its night
AUDITS = ["run_id", "output", "model", "started_at", "metric", "accuracy", "speedup", "busy"]


def ask(question: str, reports: str | Path) -> list[dict[str, Any]]:
    """The rows that answer one of QUESTIONS.

    reports  the folder `reports` of an output folder, or a glob over several
    """
    models, audits = read(f"{reports}/models/*.parquet"), read(f"{reports}/audits/*.parquet")
    answer = QUESTIONS[question](models, audits.reindex(columns=AUDITS))
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.itertuples(index=False)]


def read(files: str) -> pd.DataFrame:
    """All of these files; what those of earlier versions lack is missing."""
    frames = [pd.read_parquet(path) for path in sorted(glob.glob(files))]  # noqa: PTH207
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def slower(models: pd.DataFrame, audits: pd.DataFrame) -> pd.DataFrame:
    measured = pd.concat([models[models.outcome == "done"], audits], ignore_index=True)
    quiet = measured[measured.speedup.notna() & ~measured.busy.eq(True)]
    change = _change(quiet, "speedup", [])
    change["ratio"] = change.speedup_now / change.speedup_before
    return change[change.ratio < 0.9].sort_values(["ratio", "output"]).drop(columns="ratio")


def less_accurate(models: pd.DataFrame, audits: pd.DataFrame) -> pd.DataFrame:
    measured = pd.concat([models[models.outcome == "done"], audits], ignore_index=True)
    change = _change(measured[measured.accuracy.notna()], "accuracy", ["metric"])
    change["drop"] = change.accuracy_now - change.accuracy_before
    return change[change["drop"] < 0].sort_values(["drop", "output"]).drop(columns="drop")


def failed(models: pd.DataFrame, audits: pd.DataFrame) -> pd.DataFrame:
    last = models[models.outcome != "failed"].groupby("output").run_id.max()
    last_run = models.output.map(last)
    in_a_row = last_run.isna() | (models.run_id > last_run.fillna(""))
    failures = models[(models.outcome == "failed") & in_a_row].sort_values("run_id")
    return failures.groupby("output", as_index=False).agg(
        model=("model", "last"),
        stage=("stage", "last"),
        error=("error", "last"),
        hint=("hint", "last"),
        failed_since=("started_at", "first"),
        runs=("run_id", "count"),
    )


def saved(models: pd.DataFrame, audits: pd.DataFrame) -> pd.DataFrame:
    newest = models[models.outcome != "failed"].sort_values("run_id").groupby("output").tail(1)
    before, after = newest.float_size_bytes.sum(), newest.size_bytes.sum()
    return pd.DataFrame(
        {
            "models": [len(newest)],
            "float_size_bytes": [before],
            "size_bytes": [after],
            "saved_bytes": [before - after],
        }
    )


def never_met(models: pd.DataFrame, audits: pd.DataFrame) -> pd.DataFrame:
    judged = models[models.verdict.isin(["met", "not_met"])].sort_values("run_id")
    found = judged.groupby("output", as_index=False).agg(
        model=("model", "last"),
        runs=("run_id", "count"),
        reason=("reason", "last"),
        was_met=("verdict", lambda verdicts: (verdicts == "met").any()),
    )
    return found[~found.was_met.astype(bool)].drop(columns="was_met")


QUESTIONS = {
    "failed": failed,
    "less_accurate": less_accurate,
    "never_met": never_met,
    "saved": saved,
    "slower": slower,
}


def _change(measured: pd.DataFrame, value: str, same: list[str]) -> pd.DataFrame:
    """The newest value of each model, and the newest one that is a week older.

    same  columns that both must have in common
    """
    rows = measured.sort_values("run_id")
    now = rows.groupby("output").tail(1).rename(columns={value: f"{value}_now"})
    earlier = rows[["output", *same, "run_id", "started_at", value]].rename(
        columns={"run_id": "run", "started_at": "at", value: f"{value}_before"}
    )
    pairs = now.merge(earlier, on=["output", *same])
    older = pairs[pairs["at"] <= pairs["started_at"] - WEEK].sort_values("run")
    columns = ["output", "model", *same, f"{value}_before", f"{value}_now"]
    return older.groupby("output").tail(1)[columns]
