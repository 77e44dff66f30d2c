"""What a run leaves behind for people and programs beside its tables: Prefect's UI, and a summary in JSON."""

from __future__ import annotations

import contextlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quant_core.model.atomic import atomic_write
from quant_core.text import plain, printable

SHOWN_ROWS = 500  # in Prefect's UI


def show_in_prefect(
    kind: str,
    run_id: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    facts: Mapping[str, object],
) -> None:
    """One table and one summary in Prefect's UI; a lost API is no reason to lose a run."""
    from prefect.artifacts import (  # `cell` needs no Prefect
        create_markdown_artifact,
        create_table_artifact,
    )

    lines = [f"- {cell(key.replace('_', ' '))}: {cell(value)}" for key, value in facts.items()]
    with contextlib.suppress(Exception):
        table = [{column: cell(row.get(column)) for column in columns} for row in rows[:SHOWN_ROWS]]
        create_table_artifact(table, key=f"quantmill-{kind}-models", description=f"{kind} {run_id}")
        create_markdown_artifact(
            "\n".join([f"# {kind.title()} {run_id}", *lines]), key=f"quantmill-{kind}-summary"
        )


def cell(value: object) -> str:
    """As Prefect's UI may show it: names from strangers are neither Markdown, HTML nor control characters there."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else html.escape(printable(value), quote=False)
    return text.replace("`", "&#96;").replace("|", "\\|")


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """The summary as JSON, there as a whole or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written_at = datetime.now(UTC).isoformat()
    values = plain({**summary, "written_at": written_at})
    with atomic_write(path) as file:
        file.write(json.dumps(values, indent=2, allow_nan=False).encode() + b"\n")


def says(path: Path, flow_run_id: str) -> bool:
    """Whether that summary is of this run already."""
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads(path.read_text(encoding="utf-8"))["flow_run_id"] == flow_run_id)
    return False


def wrong(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a program has to know of each model that failed, missed its contract or got worse."""
    keys = ("model", "outcome", "verdict", "reason", "stage", "error", "where", "hint", "output")
    bad = (
        row
        for row in rows
        if row["outcome"] in ("failed", "regressed") or row.get("verdict") == "not_met"
    )
    return [{key: row.get(key) for key in keys} for row in bad]
