"""The questions of operations in Polars: the same answers as those of the SQL files."""

from __future__ import annotations

import glob
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl

WEEK = timedelta(days=6)  # a run of last week may have been an hour later in its night
AUDITS = {
    "run_id": pl.String,
    "output": pl.String,
    "model": pl.String,
    "started_at": pl.Datetime("us", "UTC"),
    "metric": pl.String,
    "accuracy": pl.Float64,
    "speedup": pl.Float64,
    "busy": pl.Boolean,
}


def ask(question: str, reports: str | Path) -> list[dict[str, Any]]:
    """The rows that answer one of QUESTIONS.

    reports  the folder `reports` of an output folder, or a glob over several
    """
    models = read(f"{reports}/models/*.parquet")
    audits = pl.concat(
        [pl.DataFrame(schema=AUDITS), read(f"{reports}/audits/*.parquet")], how="diagonal_relaxed"
    )
    return QUESTIONS[question](models, audits).to_dicts()


def read(files: str) -> pl.DataFrame:
    """All of these files; what those of earlier versions lack is null."""
    frames = [pl.read_parquet(path) for path in sorted(glob.glob(files))]  # noqa: PTH207
    return pl.concat([pl.DataFrame(), *frames], how="diagonal_relaxed")


def slower(models: pl.DataFrame, audits: pl.DataFrame) -> pl.DataFrame:
    quiet = pl.col("speedup").is_not_null() & pl.col("busy").fill_null(False).not_()
    made = models.filter((pl.col("outcome") == "done") & quiet)
    change = _change(pl.concat([made, audits.filter(quiet)], how="diagonal_relaxed"), "speedup", [])
    return change.filter(pl.col("speedup_now") < 0.9 * pl.col("speedup_before")).sort(
        pl.col("speedup_now") / pl.col("speedup_before"), "output"
    )


def less_accurate(models: pl.DataFrame, audits: pl.DataFrame) -> pl.DataFrame:
    is_known = pl.col("accuracy").is_not_null()
    made = models.filter((pl.col("outcome") == "done") & is_known)
    measured = pl.concat([made, audits.filter(is_known)], how="diagonal_relaxed")
    change = _change(measured, "accuracy", ["metric"])
    return change.filter(pl.col("accuracy_now") < pl.col("accuracy_before")).sort(
        pl.col("accuracy_now") - pl.col("accuracy_before"), "output"
    )


def failed(models: pl.DataFrame, audits: pl.DataFrame) -> pl.DataFrame:
    good = models.filter(pl.col("outcome") != "failed")
    last = good.group_by("output").agg(pl.col("run_id").max().alias("last_run"))
    failures = models.filter(pl.col("outcome") == "failed").join(last, "output", "left")
    in_a_row = pl.col("last_run").is_null() | (pl.col("run_id") > pl.col("last_run"))
    newest = [pl.col(name).last() for name in ("model", "stage", "error", "hint")]
    since, runs = pl.col("started_at").first().alias("failed_since"), pl.len().alias("runs")
    rows = failures.filter(in_a_row).sort("run_id")
    return rows.group_by("output").agg(*newest, since, runs).sort("output")


def saved(models: pl.DataFrame, audits: pl.DataFrame) -> pl.DataFrame:
    good = models.filter(pl.col("outcome") != "failed").sort("run_id")
    newest = good.group_by("output").last()
    before, after = pl.col("float_size_bytes"), pl.col("size_bytes")
    count, saved_bytes = pl.len().alias("models"), (before - after).sum().alias("saved_bytes")
    return newest.select(count, before.sum(), after.sum(), saved_bytes)


def never_met(models: pl.DataFrame, audits: pl.DataFrame) -> pl.DataFrame:
    judged = models.filter(pl.col("verdict").is_in(["met", "not_met"])).sort("run_id")
    was_met = (pl.col("verdict") == "met").any().alias("was_met")
    runs = pl.len().alias("runs")
    found = judged.group_by("output").agg(
        pl.col("model").last(), runs, pl.col("reason").last(), was_met
    )
    return found.filter(pl.col("was_met").not_()).drop("was_met").sort("output")


QUESTIONS = {
    "failed": failed,
    "less_accurate": less_accurate,
    "never_met": never_met,
    "saved": saved,
    "slower": slower,
}


def _change(measured: pl.DataFrame, value: str, same: list[str]) -> pl.DataFrame:
    """The newest value of each model, and the newest one that is a week older.

    same  columns that both must have in common
    """
    rows = measured.sort("run_id")
    newest = rows.group_by("output").last()
    now = newest.select("output", "model", *same, "started_at", pl.col(value).alias(f"{value}_now"))
    run, at = pl.col("run_id").alias("run"), pl.col("started_at").alias("at")
    earlier = rows.select("output", *same, run, at, value)
    is_older = pl.col("at") <= pl.col("started_at") - WEEK
    pairs = now.join(earlier, ["output", *same]).filter(is_older).sort("run")
    keys = ["output", "model", *same, f"{value}_now"]
    before = pairs.group_by(keys).agg(pl.col(value).last().alias(f"{value}_before"))
    return before.select("output", "model", *same, f"{value}_before", f"{value}_now")
