"""Views of runs: the models of a batch or an audit, and the runs of a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from flows.console.formats import (
    accuracy_before_after,
    before_after,
    busy_mark,
    format_ms,
    format_number,
    format_ratio,
    format_size,
    format_speedup,
    latencies,
)
from flows.console.tables import failure_sentence, rows_table, verdict_text
from quant_core.text import joined, printable
from tasks.rows import model_label

BUSY_NOTE = "busy: others used this host while it was timed; doubt the speed"


def batch_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line for each row of the models table."""
    table = rows_table(
        batch_lines(rows),
        ("model", "size", "ratio", "accuracy", "metric", "latency", "speed", "verdict"),
        right=("size", "ratio", "accuracy", "latency", "speed"),
        optional=("latency", "metric", "size"),
    )
    return _with_busy_note(table, rows)


def batch_lines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Size, accuracy and latency of each model before and after, and its verdict."""
    lines: list[dict[str, object]] = []
    for name, row in zip(unique_names(rows), rows, strict=True):
        sizes = row.get("float_size_bytes"), row.get("size_bytes")
        lines.append(
            {
                "model": name,
                "size": before_after(*sizes, format_size),
                "ratio": format_ratio(*sizes),
                "accuracy": accuracy_before_after(row, "accuracy_float"),
                "metric": row.get("metric") or "",
                "latency": before_after(*latencies(row), format_ms),
                "speed": format_speedup(row.get("speedup")) + busy_mark(row),
                "verdict": outcome_text(row),
            }
        )
    return lines


def outcome_text(row: Mapping[str, Any]) -> Text:
    """What became of a model of a batch or an audit and why, and what makes that doubtful."""
    if row["outcome"] == "failed":
        return verdict_text("failed", failure_sentence(row["stage"], row["error"], row["where"]))
    if "verdict" not in row:  # an audit has outcomes alone
        return verdict_text(row["outcome"], row["reason"])
    word = row["outcome"] if row["verdict"] == "none" else row["verdict"]
    reason = row.get("reason") if word == "not_met" else None
    return verdict_text(word, joined([reason, row.get("note")]))


def audit_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line for each row of the audits table."""
    headings = ("model", "accuracy", "metric", "speed", "verdict")
    table = rows_table(audit_lines(rows), headings, right=("accuracy", "speed"))
    return _with_busy_note(table, rows)


def audit_lines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Accuracy and speed-up of each model then and now, and its verdict."""
    lines: list[dict[str, object]] = []
    for row in rows:
        speed = before_after(row.get("speedup_before"), row.get("speedup"), format_speedup)
        lines.append(
            {
                "model": row["model"],
                "accuracy": accuracy_before_after(row, "accuracy_before"),
                "metric": row.get("metric") or "",
                "speed": speed + busy_mark(row),
                "verdict": outcome_text(row),
            }
        )
    return lines


def reports_view(reports: Mapping[str, Any]) -> RenderableType:
    """Every run in a line, and the models of the run that was named."""
    columns = (
        "run_id",
        "models",
        "done",
        "skipped",
        "failed",
        "not_met",
        "seconds",
        "host",
        "target",
    )
    headings = {column: column.replace("_", " ") for column in columns}
    runs = [{**run, "seconds": format_number(run["seconds"], 1)} for run in reports["runs"]]
    mend = "cannot be read and is left out; `quantmill report --rebuild DIR` mends it"
    table = rows_table(runs, headings, right=[headings[column] for column in columns[1:7]])
    lines = [Text(f"{printable(path)} {mend}", "yellow") for path in reports["unreadable"]]
    if "rebuilt" in reports:
        lines.append(Text(f"files written again from the journal: {len(reports['rebuilt'])}"))
        if spoiled := reports["skipped_lines"]:
            passed_over = f"spoiled lines of the journal that are passed over: {spoiled}"
            lines.append(Text(passed_over, "yellow"))
    return Group(table, batch_table(reports["models"]), *lines)


def unique_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of each model; where one input becomes several outputs, with its output's name."""
    counts = Counter(row["model"] for row in rows)
    return [
        row["model"] if counts[row["model"]] == 1 else model_label(row["model"], row["output"])
        for row in rows
    ]


def _with_busy_note(table: RenderableType, rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The table; and what its mark of a busy host means, if it has one."""
    is_marked = any(busy_mark(row) for row in rows)
    return Group(table, Text(BUSY_NOTE, style="dim")) if is_marked else table
