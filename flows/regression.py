"""When a model got worse: made again since the run before, or audited since it was made.

A run makes another file, so that what turns with the rounding of its weights is no loss. An audit
measures the same file again: there only a standard error of the accuracy is none, and speed is held
against the lower quartile of what was measured (flows/audit/audit.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant_core.metrics import find_metric

# Shares of the earlier value that may be lost. A quarter of all timings on a shared host vary by
# some per cent; the accuracy is of the same samples, where one decision of a hundred may turn.
MAX_SLOWDOWN = 0.10  # deployments/dashboard/sql/slower.sql has the same
MAX_ACCURACY_LOSS = 0.01
MAX_GROWTH = 0.01


def regressions(row: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[str]:
    """One phrase for each thing that got worse; nothing for the first run of a model."""
    if before is None:
        return []
    if row["outcome"] == "failed":
        return ["succeeded before"]
    found = []
    if before["verdict"] == "met" and row["verdict"] == "not_met":
        found.append("met its contract before")
    is_comparable = row.get("metric") == before.get("metric")
    if is_comparable and _fell(row, before, "accuracy", MAX_ACCURACY_LOSS):
        found.append("less accurate than before")
    is_quiet = not row.get("busy") and not before.get("busy")
    if is_quiet and _fell(row, before, "speedup", MAX_SLOWDOWN):
        found.append("slower than before")
    if _fell(before, row, "size_bytes", MAX_GROWTH):
        found.append("larger than before")
    return found


def accuracy_lost(
    metric: str, before: float | None, today: float | None, samples: int
) -> str | None:
    """How much accuracy is lost beyond noise, in words; None if none is."""
    if before is None:
        return None
    if today is None:
        return f"{metric} was {before:.4f} and cannot be measured"
    noise = find_metric(metric).noise(before, samples)
    return f"{metric} {today:.4f}, was {before:.4f}" if today < before - noise else None


def _fell(now: Mapping[str, Any], before: Mapping[str, Any], column: str, share: float) -> bool:
    """Whether the value now is lower than before by more than this share of it."""
    value, earlier = now.get(column), before.get(column)
    if value is None or earlier is None:
        return False
    return bool(value < earlier - share * abs(earlier))
