"""The reports of a run as a Prefect task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.rows import Row
from tasks.tables import write_table


@task(name="report", task_run_name="report {run_id}", cache_policy=NO_CACHE, persist_result=False)
def report(run_id: str, folder: Path, tables: Mapping[str, Iterable[Row]]) -> list[Path]:
    """Write this run's rows of every table; files that an interrupted attempt left are replaced."""
    return [write_table(folder, name, run_id, rows) for name, rows in tables.items()]
